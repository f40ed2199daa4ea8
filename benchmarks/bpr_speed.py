"""Bayesian personalised ranking: training rows a second, and what they buy, beside implicit's and Cornac's own.

MovieLens 100K (a quarter of each user held out) and 1M (the NCF paper's split, one item a user held out), every row a choice, 64
factors and an item bias, one uniform negative a row. Each library has a small grid, chosen by NDCG@10 on a fifth of each user's
training rows; the best is fitted anew, and only that meets the held-out rows (all items ranked, by the same code for all). implicit
and Cornac step after each row in C; cfext steps Adam after each batch, in PyTorch. Rows a second alone says little: the
table has NDCG@10 and the seconds that it took beside it. One thread each; processor seconds, so that what else runs does not count,
and wall seconds beside them.

    python benchmarks/bpr_speed.py                 # both sets
    python benchmarks/bpr_speed.py --only ml1m     # this one anew; the other stays in the record

Needs implicit and cornac: pip install implicit cornac.
"""
import argparse,json,os,time,warnings
os.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1')
from importlib.metadata import version

import numpy as np,pandas as pd,scipy.sparse as sp,torch
from cfext import *
from common import data_dir,here,record

warnings.simplefilter('ignore')
d,seed = 64,0

def since(t): return time.process_time()-t[0],time.perf_counter()-t[1]

def ml100k():
    df = read_ratings(data_dir('ml-100k'))[['user','item']]
    u = np.random.default_rng(seed).permutation(len(df))
    held = np.zeros(len(df), bool)
    held[u] = (df.user.iloc[u].groupby(df.user.iloc[u]).cumcount()<np.round(0.25*df.user.iloc[u].map(df.user.value_counts()))).to_numpy()
    return df,held

def ml1m():
    base = data_dir('ncf-ml-1m')
    train,test = (pd.read_csv(base/f, sep='\\t', header=None, usecols=[0,1], names=['user','item']) for f in ('ml-1m.train.rating.gz','ml-1m.test.rating'))
    return pd.concat([train,test], ignore_index=True),np.arange(len(train)+len(test))>=len(train)

def cf(dls, bs, lr, wd, epochs):
    dls = CFDataLoaders(dls.train, dls.valid.new(dls.valid_ds.subset(slice(0, 0))), device='cpu') # the others look at no validation rows
    learn = cf_learner(dls, n_factors=d, loss_func=BPRLoss(), cbs=Negatives(1, seed=seed), seed=seed, unk_p=0)
    learn.dls.train.bs = bs
    torch.manual_seed(seed)
    t = time.process_time(),time.perf_counter()
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr, wd=wd)
    return since(t),learn.model

def table(U, V, n_users, n_items):
    model = DotProduct(n_users, n_items, V.shape[1])
    with torch.no_grad():
        model.user_factors[:len(U)],model.item_factors[:len(V)] = torch.as_tensor(U),torch.as_tensor(V)
    return model

def imp(dls, learning_rate, regularization, epochs):
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    x = dls.train_ds.x.long().numpy()
    S = sp.csr_matrix((np.ones(len(x), np.float32), (x[:,0],x[:,1])), shape=(dls.n_users,dls.n_items))
    m = BayesianPersonalizedRanking(factors=d, learning_rate=learning_rate, regularization=regularization, iterations=epochs,
                                    num_threads=torch.get_num_threads(), random_state=seed)
    t = time.process_time(),time.perf_counter()
    m.fit(S, show_progress=False)
    return since(t),table(m.user_factors, m.item_factors, dls.n_users, dls.n_items)

def cornac(dls, learning_rate, lambda_reg, epochs):
    from cornac.data import Dataset
    from cornac.models import BPR
    data = Dataset.from_uir([(u,i,1.) for u,i in dls.train_ds.x.tolist()], seed=seed)
    m = BPR(k=d, max_iter=epochs, learning_rate=learning_rate, lambda_reg=lambda_reg, num_threads=torch.get_num_threads(), seed=seed)
    t = time.process_time(),time.perf_counter()
    m.fit(data)
    s = since(t)
    U,V = np.zeros((dls.n_users,d+1), np.float32),np.zeros((dls.n_items,d+1), np.float32)
    for raw,i in data.uid_map.items(): U[raw] = np.append(m.u_factors[i], 1)
    for raw,i in data.iid_map.items(): V[raw] = np.append(m.i_factors[i], m.i_biases[i])
    return s,table(U, V, dls.n_users, dls.n_items)

grids = dict(ml100k={'cfext':(cf, [dict(bs=2048, lr=0.02, wd=w, epochs=e) for w in (0.5,1.) for e in (10,)]),
                     'implicit':(imp, [dict(learning_rate=l, regularization=0.01, epochs=e) for l in (0.005,0.01) for e in (100,)]),
                     'cornac':(cornac, [dict(learning_rate=l, lambda_reg=0.01, epochs=e) for l in (0.02,0.05) for e in (50,)])},
             ml1m={'cfext':(cf, [dict(bs=8192, lr=0.02, wd=w, epochs=e) for w,e in ((0.3,8),(0.15,8),(0.3,20),(0.15,20))]),
                   'implicit':(imp, [dict(learning_rate=l, regularization=0.01, epochs=e) for l,e in ((0.005,100),(0.005,200),(0.002,100),(0.002,200))]),
                   'cornac':(cornac, [dict(learning_rate=l, lambda_reg=0.01, epochs=e) for l,e in ((0.02,50),(0.02,100),(0.01,50),(0.01,100))])})

def one_set(name, repeats):
    df,held = dict(ml100k=ml100k, ml1m=ml1m)[name]()
    dls = CFDataLoaders.from_df(df, rating_name=None, splitter=lambda o: (np.flatnonzero(~held), np.flatnonzero(held)), device='cpu', bs=2048, seed=seed)
    inner = inner_loaders(dls, 0.2, seed)
    ndcg = lambda l,m: float(cf_learner(l, m).evaluate(k=10, bar=False)['NDCG@10'].iloc[0])
    best,res = {},{}
    for n,(fit,grid) in grids[name].items():
        tried = [ndcg(inner, fit(inner, **kw)[1]) for kw in grid]
        best[n] = grid[int(np.argmax(tried))]
        res[n] = dict(setting=best[n], tried=tried, seconds=[])
        print(name, n, best[n], [round(o, 4) for o in tried], flush=True)
    for r in range(repeats):
        for n,(fit,_) in grids[name].items():
            s,model = fit(dls, **best[n])
            res[n]['seconds'].append(s)
            if r==0: res[n]['ndcg'] = ndcg(dls, model)
    for n in grids[name]:
        cpu,wall = np.median(res[n]['seconds'], 0).tolist()
        res[n].update(cpu_seconds=cpu, wall_seconds=wall, rows_per_cpu_second=len(dls.train_ds)*best[n]['epochs']/cpu)
        print(name, n, f"NDCG@10 {res[n]['ndcg']:.4f} in {cpu:.2f} s ({wall:.2f} by the clock), {res[n]['rows_per_cpu_second']/1e6:.3f}M rows/s", flush=True)
    res['popularity'] = dict(ndcg=ndcg(dls, Popularity(dls)))
    return res

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--only', choices=list(grids))
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    old = json.loads((here/'bpr_speed.json').read_text())['results'] if a.only else {}
    res = {**old, **{n: one_set(n, a.repeats if n=='ml100k' else 1) for n in grids if a.only in (None,n)}}
    record('bpr_speed', dict(what='BPR, 64 factors, one negative a row: processor and wall seconds of fits in turn, rows by the median of the former, NDCG@10 on held-out rows',
                             versions={o: version(o) for o in ('implicit','cornac')}, results=res))
