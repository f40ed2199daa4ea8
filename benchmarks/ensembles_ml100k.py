"""RMSE of one model, of each kind of ensemble and of blends of them, on the published folds of ML-100K.

    python benchmarks/ensembles_ml100k.py [--folds u1 u2 ...] [--keep FOLDER]

Every choice is made on rows held out of a fold's own training rows: settings from the grids below, the weights of blends, and
which ensemble is 'best'. These rows are drawn as the fold's test rows were: the share of their rows that users lost to the test
file is dealt to other users at random. The test rows are predicted once, by models trained on all training rows.
The grids themselves, and the widths and lengths that are not in a grid, were looked for on training rows of u1 alone; these are
test rows of u2 to u5, so that only the figure of u1 is free of any look at test rows.
Predictions are kept in FOLDER as they come; what is there is not computed again, so folds can be run apart and put together.
Seconds are indicative: other work may have run beside."""
import argparse,json,sys,tempfile,time,warnings
from functools import partial
from pathlib import Path

import numpy as np,pandas as pd,torch
sys.path.insert(0, str(Path(__file__).parent))
from common import data_dir,record,mean_sd
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import no_random
from cfext.sources import *
from cfext.data import *
from cfext.learner import *
from cfext.averaging import *
from cfext.blend import *
from cfext.folds import *
from cfext.many import *

warnings.simplefilter('ignore')
scale = (1,5)
rmse = lambda p,y: float(np.sqrt(((p-y)**2).mean()))

class Part:
    "Rows to train on and rows to predict"
    def __init__(self, train, rows): self.train,self.rows,self.y = train,rows,rows.rating.to_numpy()
    def dls(self, keep=None, bs=512, seed=0):
        "Loaders that train on `train`, or on the rows `keep` of it, and hold out `rows`"
        df = pd.concat([self.train, self.rows], ignore_index=True)
        n = len(self.train)
        return CFDataLoaders.from_df(df, splitter=lambda o: (np.arange(n) if keep is None else keep, np.arange(n, len(o))), seed=seed, bs=bs, device='cpu')

def parts_of(df):
    "(training rows split once more, training rows and test rows)"
    train,test = df[~df.is_valid].reset_index(drop=True),df[df.is_valid].reset_index(drop=True)
    rng,share = np.random.default_rng(7),df.groupby('user').is_valid.mean()
    dealt = pd.Series(rng.permutation(share.to_numpy()), share.index)
    out = rng.random(len(train))<train.user.map(dealt).to_numpy()
    return Part(train[~out].reset_index(drop=True), train[out].reset_index(drop=True)),Part(train, test)

def quiet(learn):
    learn.remove_cbs([ProgressCallback])
    return learn

def mean_of(members): return torch.stack([quiet(m).get_preds()[0].clamp(*scale) for m in members]).mean(0)[:,0].numpy()

def fit(learn, f, *args, seed=0, **kwargs):
    with quiet(learn).no_logging(),no_random(seed, reproducible=False): getattr(learn, f)(*args, **kwargs)
    return learn

# one model, and copies of it

def dot(dls, seed=0, **kw): return quiet(cf_learner(dls, seed=seed, **{'n_factors':50, 'y_range':(0,5.5), **kw}))
def cycle(c): return dict(n_epoch=c['epochs'], lr_max=c['lr'], wd=c['wd'])
def one(part, c): return mean_of([fit(dot(part.dls()), 'fit_one_cycle', **cycle(c))])
def seeds(part, c, n=5): return mean_of(fit_many([dot(part.dls(seed=s), s) for s in range(n)], **cycle(c)))
def subsets(part, c, by, k=5):
    return mean_of(fit_many([dot(part.dls(tr, seed=s), s) for s,(tr,_) in enumerate(fold_rows(part.train, k, by))], **cycle(c)))

# several models of one run

def swa(part, c): return mean_of([fit(dot(part.dls()), 'fit_flat_cos', 10, c['lr'], wd=c['wd'], pct_start=0.9, cbs=SWA(0.5))])
def ema(part, c): return mean_of([fit(dot(part.dls()), 'fit_flat_cos', 8, c['lr'], wd=c['wd'], cbs=EMA(0.995))])
def snapshots(part, c):
    cb = Snapshots()
    fit(dot(part.dls()), 'fit_sgdr', 3, 2, c['lr'], wd=c['wd'], cbs=cb)
    return mean_of(cb.members())
def langevin(part, c):
    cb = Langevin(c['eps'], c['tau'], c['lam'], cycles=3, explore=0.5)
    fit(dot(part.dls(), n_factors=c['n_factors'], y_range=None, config=dict(mean=float(part.train.rating.mean()))), 'fit', 24, cbs=cb)
    return mean_of(cb.members())
def dropout(part, c):
    dls = part.dls()
    learn = cf_learner(dls, 'nn', emb_szs=((dls.n_users,50), (dls.n_items,50)), y_range=(0,5.5), seed=0, config=dict(layers=(100,), ps=c['ps'], embed_p=c['embed_p'], use_bn=False))
    return mean_of(dropout_members(fit(learn, 'fit_one_cycle', 6, 5e-3, wd=c['wd']), 20))

# the posterior

def side(dls):
    "Features of users and items: what was rated, and age, gender, occupation, year and genres"
    path = data_dir('ml-100k')
    users = pd.read_csv(path/'u.user', sep='|', names=['user','age','gender','job','zip'], index_col='user')
    users = users.assign(age=(users.age//10).astype(str))
    raw = pd.read_csv(path/'u.item', sep='|', encoding='latin-1', header=None, index_col=0)
    items = raw[list(range(5, 24))].rename(columns=lambda c: f'genre{c}').assign(year=(pd.to_datetime(raw[2], format='%d-%b-%Y').dt.year//8).astype(str))
    u,i = rated_features(dls)
    return torch.cat([u, cat_features(dls, 'user', users, ['age','gender','job'])], 1),torch.cat([i, cat_features(dls, 'item', items, list(items.columns))], 1)

def gibbs(part, c, feats):
    dls = part.dls()
    cb = GibbsMF(30, 2, lam=5., **dict(zip(('user_x','item_x'), feats(dls))))
    fit(dot(dls, n_factors=c['n_factors'], y_range=None, unk_p=0), 'fit', 180, cbs=cb)
    return mean_of(cb.members())

# a member of another kind

class AutoEncoder(torch.nn.Module):
    "Items as rows of ratings, through two sparsified layers and back (Muller, Martel and Indiveri 2018)"
    def __init__(self, R, h=500, dim=5):
        super().__init__()
        self.R,self.Rt = R.to_sparse_csr(),R.T.contiguous().to_sparse_csr()
        sz = [R.shape[1], h, h, R.shape[1]]
        new = lambda *s, std: torch.nn.ParameterList([torch.nn.Parameter(torch.randn(*o)*std(o)) for o in s])
        pairs = list(zip(sz, sz[1:]))
        self.W = new(*pairs, std=lambda o: (2/sum(o))**0.5)
        self.b = new(*[(o,) for _,o in pairs], std=lambda o: 0)
        self.u,self.v = (new(*[(p[j],dim) for p in pairs], std=lambda o: 1e-3) for j in (0,1))
    def forward(self):
        class Sparse(torch.autograd.Function):
            @staticmethod
            def forward(ctx, W): return self.R@W
            @staticmethod
            def backward(ctx, g): return self.Rt@g
        h,pen = None,0.
        for j,(W,b,u,v) in enumerate(zip(self.W, self.b, self.u, self.v)):
            near = (1-(u*u).sum(1)[:,None]-(v*v).sum(1)+2*u@v.T).clamp(min=0)
            pen = pen + 10*W.square().sum() + 0.003*near.square().sum()
            h = (Sparse.apply(W*near) if j==0 else h@(W*near)) + b
            if j<2: h = h.sigmoid()
        return h,pen

def autoencoder(part, c):
    dls = part.dls()
    x,y = dls.train_ds.x.long(),dls.train_ds.y[:,0]
    R,M = torch.zeros(2, dls.n_items, dls.n_users)
    R[x[:,1],x[:,0]],M[x[:,1],x[:,0]] = y,1.
    with no_random(0, reproducible=False): m = AutoEncoder(R)
    opt = torch.optim.LBFGS(m.parameters(), max_iter=100, history_size=10, line_search_fn='strong_wolfe', tolerance_change=0, tolerance_grad=1e-7)
    def closure():
        opt.zero_grad()
        out,pen = m()
        loss = ((out-R)*M).square().sum()/2 + pen
        loss.backward()
        return loss
    opt.step(closure)
    x = dls.valid_ds.x.long()
    with torch.no_grad(): return m()[0][x[:,1],x[:,0]].clamp(*scale).numpy()

points = [dict(lr=lr, wd=wd, epochs=e) for lr,wd,e in ((0.01,0.5,5), (0.01,0.7,8), (0.02,0.7,8))]
lrs = [dict(lr=lr, wd=wd) for lr,wd in ((0.005,0.5), (0.01,0.7))]
nothing,rated = lambda dls: (),rated_features
kinds = { # name: (function, settings to choose from; a name: as chosen for that kind)
    'DotProductBias': (one, points),
    'seeds': (seeds, 'DotProductBias'),
    'bagging': (partial(subsets, by='bag'), 'DotProductBias'),
    'folds': (partial(subsets, by='random'), 'DotProductBias'),
    'SWA': (swa, lrs),
    'EMA': (ema, lrs),
    'snapshots': (snapshots, lrs),
    'Langevin': (langevin, [dict(eps=0.04, tau=1.2, lam=12., n_factors=20)]),
    'MC dropout': (dropout, [dict(ps=0.3, embed_p=0.1, wd=0.1)]),
    'Gibbs posterior': (partial(gibbs, feats=nothing), [dict(n_factors=10)]),
    'Gibbs posterior, what was rated': (partial(gibbs, feats=rated), [dict(n_factors=10)]),
    'Gibbs posterior, all features': (partial(gibbs, feats=side), [dict(n_factors=10)]),
    'autoencoder': (autoencoder, [dict()])}
blends = {'greedy blend':greedy_blend, 'stack, non-negative':partial(stack, how='nnls'), 'stack, ridge':partial(stack, how='ridge')}

def kept(path, f):
    "What `f` gives, or gave at an earlier call: (predictions, seconds)"
    if path.is_file():
        d = np.load(path)
        return d['p'],float(d['t'])
    t = time.perf_counter()
    p = f()
    t = time.perf_counter()-t
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_name('part.npz'), p=p, t=t)
    path.with_name('part.npz').replace(path)
    return p,t

def one_fold(fold, keep):
    "Test RMSE of every kind"
    inner,outer = parts_of(read_ratings(data_dir('ml-100k'), fold)[['user','item','rating','is_valid']])
    held,out,chosen,secs = {},{},{},{}
    for kind,(f,grid) in kinds.items():
        tries = [chosen[grid]] if isinstance(grid, str) else grid
        got = [kept(keep/fold/f'{kind}-inner-{json.dumps(c, sort_keys=True)}.npz', lambda: f(inner, c))[0] for c in tries]
        best = int(np.argmin([rmse(p, inner.y) for p in got]))
        held[kind],chosen[kind] = got[best],tries[best]
        out[kind],secs[kind] = kept(keep/fold/f'{kind}-test-{json.dumps(tries[best], sort_keys=True)}.npz', lambda: f(outer, tries[best]))
        print(f"{fold} {kind}: held out {', '.join(f'{rmse(p, inner.y):.4f}' for p in got)}; test in {secs[kind]:.0f} s", flush=True)
    fits = {n: f(held, inner.y) for n,f in blends.items()}
    judged = {**{k: rmse(p, inner.y) for k,p in held.items()}, **{n: b.score for n,b in fits.items()}}
    gains = {n: dict(gain=b.gain, over=b.best, interval=b.interval, weights=b.weights) for n,b in fits.items()}
    out.update({n: np.clip(b.predict(out), *scale) for n,b in fits.items()})
    return dict(rows=(len(inner.train), len(inner.y), len(outer.train), len(outer.y)), test={k: rmse(p, outer.y) for k,p in out.items()}, held_out=judged,
                best=min(judged, key=judged.get), chosen=chosen, blends=gains, seconds={k: round(t, 1) for k,t in secs.items()})

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--folds', nargs='+', default=[f'u{j}' for j in range(1, 6)])
    ap.add_argument('--keep', type=Path, help='folder of predictions; default: a new one')
    args = ap.parse_args()
    keep = args.keep or Path(tempfile.mkdtemp())
    res = {f: one_fold(f, keep) for f in args.folds}
    table = {k: mean_sd([r['test'][k] for r in res.values()]) for k in res[args.folds[0]]['test']}
    table['best, chosen on training rows'] = mean_sd([r['test'][r['best']] for r in res.values()])
    print(pd.DataFrame({k: dict(mean=v['mean'], **dict(zip(res, v['values']))) for k,v in table.items()}).T.round(4))
    record('ensembles_ml100k', dict(rmse=table, folds=res))
