"""Measures of lists for 100,000 users, each with 100 scored candidates: cfext and torchmetrics' retrieval metrics, and ranx.

All start from the same flat arrays (user, score, relevant) and end with the mean over users of recall, NDCG, hit rate and average
precision at 10; cfext's time includes choosing the ten best. torchmetrics sorts and cuts once for each metric, ranx once for all;
ranx runs on the first tenth of the users, once compiled, and its time is given with and without the making of its own containers.
The values are compared: torchmetrics divides average precision by the relevant items that are listed, the others by all of them.

    python benchmarks/metrics_speed.py                # two repeats (torchmetrics takes minutes)
    python benchmarks/metrics_speed.py --device cuda  # the arrays of cfext and torchmetrics on a GPU, into a record of its own
    python benchmarks/metrics_speed.py --quick        # one, 5,000 users

Needs torchmetrics and ranx: pip install torchmetrics ranx.
"""
import sys,time
from importlib.metadata import version

import numpy as np,torch
from cfext import *
from cfext.metrics import list_measures
from common import mean_sd,record

quick = '--quick' in sys.argv
device = sys.argv[sys.argv.index('--device')+1] if '--device' in sys.argv else 'cpu'
n,m,k = (5_000 if quick else 100_000),100,10
names = dict(recall='recall@10', NDCG='ndcg@10', MAP='map@10')
names['hit rate'] = 'hit_rate@10'

def made():
    "Flat arrays: user (n*m,), score, relevant; one to five relevant a user"
    rng = np.random.default_rng(0)
    score = rng.random((n,m), dtype=np.float32)
    rel = rng.random((n,m)).argsort(1)<rng.integers(1, 6, (n,1))
    return tuple(torch.from_numpy(np.ascontiguousarray(o).reshape(-1)).to(device) for o in (np.repeat(np.arange(n), m), score, rel))

def cf(user, score, rel):
    n = len(user)//m
    recs = top_places(score.view(n, m), k)[1]
    hits = hit_matrix(recs, torch.stack([user, torch.arange(m, device=user.device).repeat(n)], 1)[rel])
    return {f: list_measures[f](*hits).nanmean().item() for f in names}

def tm(user, score, rel):
    from torchmetrics import retrieval as r
    res = {}
    for f,cls in dict(recall=r.RetrievalRecall, NDCG=r.RetrievalNormalizedDCG, MAP=r.RetrievalMAP).items() | {('hit rate', r.RetrievalHitRate)}:
        metric = cls(top_k=k)
        metric.update(score, rel, indexes=user)
        res[f] = metric.compute().item()
    return res

def rx(user, score, rel):
    "Mean values, and seconds without the making of the containers"
    import ranx
    ids = np.array([f'd{i}' for i in range(m)])
    n = len(user)//m
    s,r = (o.view(n, m).cpu().numpy() for o in (score, rel))
    run = ranx.Run({f'q{i}': dict(zip(ids, map(float, s[i]))) for i in range(n)})
    qrels = ranx.Qrels({f'q{i}': {d: 1 for d in ids[r[i]]} for i in range(n)})
    t = time.perf_counter()
    res = ranx.evaluate(qrels, run, list(names.values()))
    return {f: float(res[v]) for f,v in names.items()},time.perf_counter()-t

def timed(f, *args):
    t = time.perf_counter()
    res = f(*args)
    return time.perf_counter()-t,res

if __name__=='__main__':
    data,ts,vals = made(),dict(cfext=[], torchmetrics=[]),{}
    cf(*data)
    for _ in range(1 if quick else 2):
        for name,f in (('cfext',cf), ('torchmetrics',tm)):
            s,vals[name] = timed(f, *data)
            ts[name].append(s)
            print(name, f'{s:.3f} s', {a: round(b, 5) for a,b in vals[name].items()}, flush=True)
    some = [o[:n//10*m] for o in data]
    rx(*(o[:50*m] for o in data))
    with_making,(vals['ranx'],alone) = timed(rx, *some)
    tenth,vals['cfext on the tenth'] = timed(cf, *some)
    print('ranx on a tenth', f'{with_making:.2f} s, {alone:.2f} without containers, cfext {tenth:.3f}', vals['ranx'], vals['cfext on the tenth'], flush=True)
    med = {a: float(np.median(b)) for a,b in ts.items()}
    print(f"torchmetrics/cfext {med['torchmetrics']/med['cfext']:.1f}, ranx/cfext {with_making/tenth:.1f}, {alone/tenth:.1f}")
    if not quick: record('metrics_speed' if device=='cpu' else 'metrics_speed_gpu', dict(what=f'seconds for {", ".join(names)} at {k} of {n:,} users with {m} scored candidates each',
        versions={p: version(p) for p in ('torchmetrics','ranx')}, seconds={a: mean_sd(b) for a,b in ts.items()},
        ranx_on_a_tenth=dict(seconds=with_making, without_containers=alone, cfext=tenth), values=vals,
        ratio_of_medians=dict(torchmetrics=med['torchmetrics']/med['cfext'], ranx=with_making/tenth, ranx_without_containers=alone/tenth)))
