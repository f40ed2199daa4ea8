"""Boosted trees on ML-100K u1..u5: ids as out-of-fold embeddings, as target encodings and as categories, and the dot model alone.

    python benchmarks/features_ml100k.py

All trees get age, gender, the genres and the time; they differ in what they get for user and item. Hyper-parameters (of the dot
model, then of each set of trees) are chosen on a random 10% of u1.base; no row of u1.test .. u5.test has a part in it, and u1's
choices are used for all five. Ids as categories end at the widest trees of the grid; 255 and 511 leaves were tried on the same rows and are
worse (.9202 and .9204 against .9191). Data: $CFEXT_DATA/ml-100k (default ../shared/data)."""
import argparse,datetime,itertools,json,os,platform,warnings
from pathlib import Path

import fastai,lightgbm as lgb
import numpy as np,pandas as pd,sklearn,torch
from sklearn.preprocessing import TargetEncoder
from cfext.data import CFDataLoaders
from cfext.features import EmbeddingFeatures
from cfext.learner import cf_learner

warnings.filterwarnings('ignore')
here = Path(__file__).resolve()
data = Path(os.environ.get('CFEXT_DATA', here.parents[2]/'shared/data'))/'ml-100k'
n_jobs = int(os.environ.get('OMP_NUM_THREADS', 2))
cols = ['user','item','rating','time']

def side_columns(df):
    "Age and gender of the user, genres of the item, time"
    users = pd.read_csv(data/'u.user', sep='|', header=None, names=['user','age','gender','job','zip'])
    items = pd.read_csv(data/'u.item', sep='|', header=None, encoding='latin-1')
    genres = items.iloc[:,5:].set_axis([f'genre{i}' for i in range(19)], axis=1).assign(item=items[0])
    res = df.merge(users[['user','age','gender']], on='user', how='left').merge(genres, on='item', how='left')
    return res.assign(gender=(res.gender=='F').astype('int8'))

def read(name): return side_columns(pd.read_csv(data/name, sep='\t', header=None, names=cols))

def rmse(pred, df): return float(np.sqrt(np.mean((np.clip(pred, 1, 5)-df.rating)**2)))

def recipe(df, n_factors=50, epochs=5, lr=5e-3, wd=.1, bs=64, seed=42):
    "cfext's dot model with the lesson's schedule, in a plain torch loop with a fused optimizer, on `df` less one row"
    torch.manual_seed(seed)
    dls = CFDataLoaders.from_df(df[['user','item','rating']], user_name='user', item_name='item', rating_name='rating', bs=bs, seed=seed,
                                splitter=lambda d: (range(1, len(d)),[0]), device='cpu')
    learn = cf_learner(dls, n_factors=n_factors, y_range=(0,5.5))
    x,y,model = dls.train_ds.x.long(),dls.train_ds.y,learn.model
    opt = torch.optim.AdamW(model.parameters(), lr, betas=(.9,.99), eps=1e-5, weight_decay=wd, fused=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=epochs*-(-len(x)//bs), div_factor=25, final_div_factor=4e3, base_momentum=.85)
    model.train()
    for _ in range(epochs):
        for idx in torch.randperm(len(x)).split(bs):
            (model(x[idx])-y[idx]).square().mean().backward()
            opt.step(); opt.zero_grad(); sched.step()
    return learn

def dot_preds(learn, df):
    with learn.no_bar(): return np.asarray(learn.predict(df[['user','item']], unk='mean')[2]).ravel()

def trees(F, y, G, at, leaves=31, lr=.1, min_leaf=50, **kwargs):
    m = lgb.LGBMRegressor(n_estimators=max(at), num_leaves=leaves, learning_rate=lr, min_child_samples=min_leaf, colsample_bytree=.5,
                          subsample=.7, subsample_freq=1, random_state=1, n_jobs=n_jobs, verbose=-1).fit(F, y, **kwargs)
    return {r: m.predict(G, num_iteration=r) for r in at}

def sets(fit, test, dot):
    "Name -> (columns of the training rows, columns of the test rows)"
    X,Y = fit.drop(columns='rating'),test.drop(columns='rating')
    res,fits = {},{}
    def fit_once(d):
        key = tuple(d.time[:9]),len(d)  # both forms need the same fits
        if key not in fits: fits[key] = recipe(d, **dot)
        return fits[key]
    for form in ('aligned','free'):
        ef = EmbeddingFeatures(fit_once, form=form, cv=5)
        res[f'embeddings out of fold, {form}'] = ef.fit_transform(X, fit.rating),ef.transform(Y)
    full = EmbeddingFeatures(fit_once(fit), cv=None)
    res['embeddings in sample'] = full.fit_transform(X),full.transform(Y)
    te = TargetEncoder(target_type='continuous', random_state=1)
    enc = lambda o,a: o.drop(columns=['user','item']).assign(user=a[:,0], item=a[:,1])
    res['target encoding'] = enc(X, te.fit_transform(X[['user','item']], fit.rating)),enc(Y, te.transform(Y[['user','item']]))
    cat = lambda o: o.assign(**{c: pd.Categorical(o[c], categories=sorted(X[c].unique())) for c in ('user','item')})
    res['ids as categories'] = cat(X),cat(Y)
    return res

def grid(**kwargs): return [dict(zip(kwargs, o)) for o in itertools.product(*kwargs.values())]

def select():
    "Choose on a random 10% of u1.base"
    df = read('u1.base')
    mask = np.random.default_rng(0).random(len(df))<.1
    fit,val = df[~mask].reset_index(drop=True),df[mask].reset_index(drop=True)
    notes = dict(dot=[dict(params=kw, rmse=rmse(dot_preds(recipe(fit, **kw), val), val))
                      for kw in [dict(), dict(wd=.2)]])
    print(notes['dot'], flush=True)
    dot = min(notes['dot'], key=lambda o: o['rmse'])['params']
    at = (50,100,200,400,800,1600)
    for name,(F,G) in sets(fit, val, dot).items():
        notes[name] = []
        for kw in grid(leaves=[3,7,31,127]):
            for r,p in trees(F, fit.rating, G, at, **kw).items(): notes[name].append(dict(params=dict(at=[r], **kw), rmse=rmse(p, val)))
        print(name, min(notes[name], key=lambda o: o['rmse']), flush=True)
    return {k: min(v, key=lambda o: o['rmse'])['params'] for k,v in notes.items()},notes

def main():
    best,notes = select()
    res = {}
    for u in range(1, 6):
        fit,test = read(f'u{u}.base'),read(f'u{u}.test')
        res.setdefault('mean of the training rows', []).append(rmse(np.full(len(test), fit.rating.mean()), test))
        res.setdefault('dot model alone', []).append(rmse(dot_preds(recipe(fit, **best['dot']), test), test))
        for name,(F,G) in sets(fit, test, best['dot']).items():
            res.setdefault(name, []).append(rmse(list(trees(F, fit.rating, G, **best[name]).values())[0], test))
        print(u, {k: round(v[-1], 4) for k,v in res.items()}, flush=True)
    table = {k: dict(mean=float(np.mean(v)), sd=float(np.std(v, ddof=1)), folds=v) for k,v in res.items()}
    ram = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30
    model = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine())
    info = dict(date=str(datetime.date.today()), machine=f'{os.cpu_count()} x {model}, {ram:.0f} GiB', command='python benchmarks/features_ml100k.py',
                versions={m.__name__: m.__version__ for m in (torch,fastai,sklearn,lgb,pd,np)})
    here.with_suffix('.json').write_text(json.dumps(dict(rmse=table, chosen=best, selection=notes, **info), indent=1)+'\n')
    print(pd.DataFrame(table).T[['mean','sd']].round(4).to_string())

if __name__=='__main__':
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(n_jobs)
    main()
