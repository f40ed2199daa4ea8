"""Lists for everybody: the ten best of 26,744 items for each of 138,493 users (the sizes of MovieLens 20M), seen items left out,
by `top_items` and by implicit's `recommend`, on the same factors, the same histories and the same threads.

Factors are drawn (64, normal, item norms spread evenly over 0 to 1), histories too: 144 items a user, by a power law. Each repeat
runs one after the other over the same users; the lists are compared.

    python benchmarks/topk.py             # three repeats
    python benchmarks/topk.py --quick     # one, 10,000 users

Needs implicit: pip install implicit.
"""
import os,sys,time
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
from types import SimpleNamespace

import numpy as np,pandas as pd,torch
import scipy.sparse as sp
from cfext import *
from implicit.cpu.als import AlternatingLeastSquares
from importlib.metadata import version
from common import mean_sd,record

quick = '--quick' in sys.argv
n_users,n_items,d,k,n_each = (10_000 if quick else 138_493),26_744,64,10,144

def made():
    "A dot product over drawn factors, loaders over drawn histories, and implicit's form of both"
    g = torch.Generator().manual_seed(0)
    model = DotProduct(n_users+1, n_items+1, d)
    with torch.no_grad():
        model.user_factors.normal_(0, 0.3, generator=g)
        model.item_factors.normal_(0, 0.3, generator=g).mul_(torch.rand(n_items+1, 1, generator=g))
    rng = np.random.default_rng(0)
    p = 1/np.arange(1, n_items+1)**0.8
    rows,cols = np.repeat(np.arange(n_users), n_each),rng.choice(n_items, n_users*n_each, p=p/p.sum())
    S = sp.csr_matrix((np.ones(len(rows), np.float32), (rows,cols)), shape=(n_users,n_items))
    S.sum_duplicates()
    x = torch.from_numpy(np.stack(S.nonzero(), 1).astype(np.int32))+1
    classes = dict(user=IdMap(range(n_users)), item=IdMap(range(n_items)))
    dls = CFDataLoaders(*(ResidentDL(Ratings(o, torch.ones(len(o), 1), classes, None)) for o in (x, x[:0])), device='cpu')
    peer = AlternatingLeastSquares(factors=d, num_threads=torch.get_num_threads())
    peer.user_factors,peer.item_factors = (t.detach()[1:].numpy().copy() for t in (model.user_factors, model.item_factors))
    return SimpleNamespace(model=model, dls=dls),peer,S

def timed(f):
    t = time.perf_counter()
    res = f()
    return time.perf_counter()-t,res

if __name__=='__main__':
    learn,peer,S = made()
    users = torch.arange(1, n_users+1)
    ours = lambda us: top_items(learn, us, k, seen='train')
    theirs = lambda us: peer.recommend((us-1).numpy(), S[(us-1).numpy()], N=k, filter_already_liked_items=True)
    ours(users[:500]),theirs(users[:500])
    seen_items(learn.dls, 'train')
    ts,same = dict(cfext=[], implicit=[]),[]
    for r in range(1 if quick else 3):
        ts['cfext'].append((o := timed(lambda: ours(users)))[0])
        ts['implicit'].append((i := timed(lambda: theirs(users)))[0])
        same.append(float(((o[1][0]-1).numpy()==i[1][0]).all(1).mean()))
        gap = float(np.abs(o[1][1].numpy()-i[1][1]).max())
        print({n: round(v[-1], 2) for n,v in ts.items()}, 'equal lists', same[-1], 'largest difference of a score', gap, flush=True)
    med = {n: float(np.median(v)) for n,v in ts.items()}
    print(f"implicit/cfext: {med['implicit']/med['cfext']:.2f}")
    if not quick: record('topk', dict(what=f'seconds for the {k} best of {n_items:,} items for {n_users:,} users, {d} factors, {len(S.data):,} seen pairs left out',
                                      versions=dict(implicit=version('implicit')), seconds={n: mean_sd(v) for n,v in ts.items()},
                                      ratio_of_medians=med['implicit']/med['cfext'], equal_lists=same, largest_score_difference=gap))
