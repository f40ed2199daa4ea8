"""RMSE of one model and of each kind of ensemble on the published folds of ML-100K.

    python benchmarks/ensembles_ml100k.py [--folds u1 u2 ...] [--quick]

Every choice (learning rate, epochs, width, prior, weights of a blend, which ensemble is 'best') is made on rows held out of a
fold's training rows; its test rows are predicted once, at the end, by models that were trained on all its training rows."""
import argparse,sys,time,warnings
from pathlib import Path

import numpy as np,pandas as pd,torch
sys.path.insert(0, str(Path(__file__).parent))
from common import data_dir,record,mean_sd
from fastai.callback.progress import ProgressCallback
from cfext.sources import *
from cfext.data import *
from cfext.learner import *
from cfext.averaging import *
from cfext.blend import *

warnings.simplefilter('ignore')
scale,bs = (1,5),512

def loaders(train, rows, bs):
    "Loaders that train on `train` and hold out `rows`"
    df = pd.concat([train, rows], ignore_index=True)
    n = len(train)
    return CFDataLoaders.from_df(df, splitter=lambda o: (np.arange(n), np.arange(n, len(o))), seed=0, bs=bs, device='cpu')

def fit(dls, f, cbs=None, unk_p=0.01, **kw):
    "A learner fitted in silence; the same seed gives the same learner"
    learn = cf_learner(dls, unk_p=unk_p, **kw)
    learn.remove_cbs([ProgressCallback])
    with learn.no_logging(),torch.random.fork_rng():
        torch.manual_seed(kw.get('seed', 0))
        f(learn, cbs)
    return learn

def preds(members):
    "Mean of the members' predictions of their validation rows, cut to the scale"
    res = []
    for m in members:
        m.remove_cbs([ProgressCallback])
        res.append(m.get_preds()[0].clamp(*scale))
    return torch.stack(res).mean(0)[:,0].numpy()

def dot(dls, cfg, seed=0, cbs=None):
    return fit(dls, lambda l,cbs: l.fit_one_cycle(cfg['epochs'], cfg['lr'], wd=cfg['wd'], cbs=cbs), cbs, n_factors=cfg['n_factors'], y_range=(0,5.5), seed=seed)

def gibbs(dls, cfg, seed=0, **feats):
    cb = GibbsMF(cfg['burn'], cfg['every'], lam=cfg.get('lam', 5.), seed=seed, **feats)
    fit(dls, lambda l,cbs: l.fit(cfg['sweeps'], cbs=cbs), cb, n_factors=cfg['n_factors'], seed=seed, unk_p=0)
    return cb.members()

def side(dls, path):
    "Features of users and items: what was rated, and age, gender, occupation, year and genres"
    users = pd.read_csv(path/'u.user', sep='|', names=['user','age','gender','job','zip'], index_col='user')
    users = users.assign(age=(users.age//10).astype(str))
    raw = pd.read_csv(path/'u.item', sep='|', encoding='latin-1', header=None, index_col=0)
    items = raw[list(range(5, 24))].rename(columns=lambda c: f'genre{c}').assign(year=(pd.to_datetime(raw[2], format='%d-%b-%Y').dt.year//8).astype(str))
    (u,i) = rated_features(dls)
    return dict(user_x=torch.cat([u, cat_features(dls, 'user', users, ['age','gender','job'])], 1),
                item_x=torch.cat([i, cat_features(dls, 'item', items, list(items.columns))], 1))

def members_of(kind, dls, cfg, path, seeds):
    "Predictions of a kind of model or ensemble for the rows held out; `seeds` keeps the point models"
    d,rated = cfg['dot'],lambda: dict(zip(('user_x','item_x'), rated_features(dls)))
    point = lambda f,cb: fit(dls, f, cb, n_factors=d['n_factors'], y_range=(0,5.5), seed=0)
    if kind in ('DotProductBias','seeds'):
        while len(seeds)<(1 if kind=='DotProductBias' else cfg['n_seeds']): seeds.append(dot(dls, d, len(seeds)))
        return preds(seeds)
    if kind in ('SWA','EMA'):
        cb = SWA(0.5) if kind=='SWA' else EMA(0.98)
        return preds([point(lambda l,cbs: l.fit(d['epochs'], d['lr']/3, wd=d['wd'], cbs=cbs), cb)])
    if kind=='snapshots':
        cb = Snapshots()
        point(lambda l,cbs: l.fit_sgdr(2, 3, d['lr'], wd=d['wd'], cbs=cbs), cb)
        return preds(cb.members())
    feats = {'posterior':dict, 'posterior, rated features':rated, 'posterior, all features':lambda: side(dls, path)}[kind]()
    return preds(gibbs(dls, cfg['gibbs'], **feats))

kinds = ['DotProductBias','seeds','SWA','EMA','snapshots','posterior','posterior, rated features','posterior, all features']
rmse = lambda p,y: float(np.sqrt(((p-y)**2).mean()))

def tune(train, quick):
    "Recipes of the point model and of the posterior, by rows held out of one fold's training rows"
    inner = np.random.default_rng(7).random(len(train))<0.1
    dls,y = loaders(train[~inner], train[inner], bs),train.rating[inner].to_numpy()
    def _best(grid, run):
        res = [(rmse(preds(run(c)), y), c) for c in grid] if len(grid)>1 else [(None, grid[0])]
        for r in res: print('  tune', *r, flush=True)
        return min(res, key=lambda o: o[0] or 0)[1]
    dots = [dict(lr=lr, wd=wd, n_factors=f, epochs=e) for lr in (0.01,0.02) for wd in (0.2,0.5) for f,e in (((50,5),) if quick else ((50,5),(50,8),(100,8)))]
    draws = [dict(n_factors=f, lam=lam, sweeps=140 if quick else 400, burn=20, every=2) for f,lam in (((20,5.),) if quick else ((10,5.),(20,5.),(30,2.)))]
    return dict(n_seeds=3 if quick else 5, dot=_best(dots, lambda c: [dot(dls, c)]), gibbs=_best(draws, lambda c: gibbs(dls, c, **side(dls, data_dir('ml-100k')))))

def one_fold(fold, cfg, path):
    "Test RMSE of every kind; blends are fitted on rows held out of the training rows"
    df = read_ratings(path, fold)[['user','item','rating','is_valid']]
    train,test = df[~df.is_valid].reset_index(drop=True),df[df.is_valid].reset_index(drop=True)
    inner = np.random.default_rng(7).random(len(train))<0.1
    y_in,y_out = train.rating[inner].to_numpy(),test.rating.to_numpy()
    held,out,secs,seeds = {},{},{},([],[])
    for kind in kinds:
        held[kind] = members_of(kind, loaders(train[~inner], train[inner], bs), cfg, path, seeds[0])
        t = time.perf_counter()
        out[kind] = members_of(kind, loaders(train, test, bs), cfg, path, seeds[1])
        secs[kind] = round(time.perf_counter()-t, 1)
        print(f'  {fold} {kind}: held out {rmse(held[kind], y_in):.4f}, test {rmse(out[kind], y_out):.4f}, {secs[kind]} s', flush=True)
    for name,b in (('greedy blend', greedy_blend(held, y_in)), ('stack, non-negative', stack(held, y_in, 'nnls')), ('stack, ridge', stack(held, y_in, 'ridge'))):
        print('  ', name, b, flush=True)
        out[name] = np.clip(b.predict(out), *scale)
        held[name] = None
        secs[name] = b.score
    inner_rmse = {k: rmse(p, y_in) for k,p in held.items() if p is not None}
    blends = {k: secs.pop(k) for k in ('greedy blend','stack, non-negative','stack, ridge')}
    chosen = min({**inner_rmse, **blends}.items(), key=lambda o: o[1])[0]
    return dict(test={k: rmse(p, y_out) for k,p in out.items()}, held_out={**inner_rmse, **blends}, chosen=chosen, seconds=secs)

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--folds', nargs='+', default=[f'u{j}' for j in range(1, 6)])
    ap.add_argument('--quick', action='store_true', help='a small grid, and fewer draws')
    args = ap.parse_args()
    path = data_dir('ml-100k')
    first = read_ratings(path, args.folds[0])
    cfg = tune(first[~first.is_valid].reset_index(drop=True), args.quick)
    res = {f: one_fold(f, cfg, path) for f in args.folds}
    table = {k: mean_sd([r['test'][k] for r in res.values()]) for k in next(iter(res.values()))['test']}
    table['best, chosen on training rows'] = mean_sd([r['test'][r['chosen']] for r in res.values()])
    print(pd.DataFrame({k: dict(mean=v['mean'], **dict(zip(res, v['values']))) for k,v in table.items()}).T.round(4))
    record('ensembles_ml100k', dict(quick=args.quick, config=cfg, rmse=table, folds=res))
