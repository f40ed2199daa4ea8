"""Lists for everybody: the ten best of 26,744 items for each of 138,493 users (the sizes of MovieLens 20M), seen items left out,
by `top_items` and by implicit's `recommend`, on the same factors, the same histories and the same threads.

Factors are drawn (64, normal, item norms spread evenly over 0 to 1), histories too: 144 items a user, by a power law. The users are
taken 8,192 at a time, by one and then by the other, so that both meet the same moods of the machine; the lists are compared.
On a GPU cfext has the tables and the histories there, and its time ends when the lists are back in host memory; implicit's
`recommend` has all threads of the processor. The record of a GPU is a file of its own.

    python benchmarks/topk.py                # all users; on the GPU where there is one
    python benchmarks/topk.py --device cpu   # on the processor
    python benchmarks/topk.py --quick        # two slices of users

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
device = sys.argv[sys.argv.index('--device')+1] if '--device' in sys.argv else 'cuda' if torch.cuda.is_available() else 'cpu'
n_users,n_items,d,k,n_each = (16_384 if quick else 138_493),26_744,64,10,144

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
    dls = CFDataLoaders(*(ResidentDL(Ratings(o, torch.ones(len(o), 1), classes, None), device=device) for o in (x, x[:0])), device=device)
    peer = AlternatingLeastSquares(factors=d, num_threads=torch.get_num_threads())
    peer.user_factors,peer.item_factors = (t.detach()[1:].numpy().copy() for t in (model.user_factors, model.item_factors))
    return SimpleNamespace(model=model.to(device), dls=dls),peer,S

def timed(f):
    t = time.perf_counter()
    res = f()
    return time.perf_counter()-t,res

if __name__=='__main__':
    learn,peer,S = made()
    users = torch.arange(1, n_users+1)
    ours = lambda us: tuple(o.cpu() for o in top_items(learn, us.to(device), k, seen='train'))
    theirs = lambda us: peer.recommend((us-1).numpy(), S[(us-1).numpy()], N=k, filter_already_liked_items=True)
    ours(users[:8192]),theirs(users[:500])
    seen_items(learn.dls, 'train')
    ts,same,gap = dict(cfext=[], implicit=[]),0,0.
    for j,us in enumerate(users.split(8192)):
        res = {}
        for n,f in (('cfext',ours), ('implicit',theirs))[::1 if j%2 else -1]:
            s,res[n] = timed(lambda: f(us))
            ts[n].append(s)
        same += int(((res['cfext'][0]-1).numpy()==res['implicit'][0]).all(1).sum())
        gap = max(gap, float(np.abs(res['cfext'][1].numpy()-res['implicit'][1]).max()))
    total,ratio = {n: sum(v) for n,v in ts.items()},float(np.median(np.array(ts['implicit'])/np.array(ts['cfext'])))
    print({n: round(v, 2) for n,v in total.items()}, f'implicit/cfext, median of {len(ts["cfext"])} slices: {ratio:.2f}; equal lists {same/n_users:.6f}, largest difference of a score {gap:.1e}')
    if not quick: record('topk' if device=='cpu' else 'topk_gpu', dict(what=f'seconds for the {k} best of {n_items:,} items for {n_users:,} users, {d} factors, {len(S.data):,} seen pairs left out, and for each slice of 8,192 users',
                                      versions=dict(implicit=version('implicit')), seconds=total, slices={n: mean_sd(v) for n,v in ts.items()},
                                      median_ratio=ratio, equal_lists=same/n_users, largest_score_difference=gap))
