"""Which settings should closed forms have where nobody chooses? Lists on three public sets, every rating or interaction a choice.

    CFEXT_DATA=<folder> python benchmarks/closed_defaults.py [--seeds 2] [--sets latest-small ml-100k ml-1m]

NDCG@10 of iALS (64 factors, 16 rounds) over a grid of its two weights, of EASE and of ItemKNN over their one, all items ranked but those
of the training rows, on a random fifth of the rows held out, anew with every seed. The figures are for choosing one setting for all three
sets, not for comparing models: those of a grid that is searched on validation rows are in `ranking_ml100k.json` and `ncf_ml1m.json`.
MovieLens 1M is the training file of the NCF split alone.
"""
import argparse,inspect,statistics,time,warnings
from itertools import product

import pandas as pd
from cfext import *
from common import data_dir,mean_sd,record

GRIDS = {'iALS':(IALS, [dict(alpha0=a, lam=l) for a,l in (*product((0.1,0.3), (0.003,0.01,0.02)), *product((1.,), (0.001,0.003,0.006)))]),
         'EASE':(EASE, [dict(reg=float(r)) for r in (30,100,300,1000)]),
         'ItemKNN':(ItemKNN, [dict(k=k) for k in (20,100,300)])}

def ml1m(): return pd.read_csv(data_dir('ncf-ml-1m')/'ml-1m.train.rating.gz', sep='\t', header=None, names=['user','item','rating'])
SETS = {'latest-small':lambda: read_ratings(data_dir('ml-latest-small-2016')), 'ml-100k':lambda: read_ratings(data_dir('ml-100k')), 'ml-1m':ml1m}

def judged(dls, model):
    "NDCG@10 of the validation rows"
    return cf_learner(dls, model).evaluate(10, bar=False).loc[type(model).__name__,'NDCG@10']

def said(kw): return ', '.join(f'{k} {v:g}' for k,v in kw.items())

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--sets', nargs='+', default=list(SETS), choices=SETS)
    a = p.parse_args()
    warnings.simplefilter('ignore')
    got = {s: {} for s in a.sets}
    for s,seed in product(a.sets, range(a.seeds)):
        dls = CFDataLoaders.from_df(SETS[s](), rating_name=None, seed=seed, device='cpu')
        got[s].setdefault('popularity', []).append(judged(dls, Popularity(dls)))
        for n,(cls,grid) in GRIDS.items():
            for kw in grid:
                t = time.perf_counter()
                got[s].setdefault(f'{n}, {said(kw)}', []).append(judged(dls, cls(dls, **kw)))
                print(f'{s}, seed {seed}: {n}, {said(kw)}: {got[s][f"{n}, {said(kw)}"][-1]:.4f} in {time.perf_counter()-t:.1f} s', flush=True)
    over = {n: {said(kw): statistics.fmean(statistics.fmean(got[s][f'{n}, {said(kw)}']) for s in a.sets) for kw in grid} for n,(_,grid) in GRIDS.items()}
    now = {n: said({k: inspect.signature(cls).parameters[k].default for k in grid[0]}) for n,(cls,grid) in GRIDS.items()}
    for n,o in over.items():
        print(f'{n}, mean over the sets (default: {now[n]})')
        for k,v in sorted(o.items(), key=lambda kv: -kv[1]): print(f'  {k:24} {v:.4f}')
    record('closed_defaults', dict(what='NDCG@10 on a random fifth of the rows', seeds=a.seeds, defaults=now, over_sets=over,
                                   results={s: {n: mean_sd(v) for n,v in o.items()} for s,o in got.items()}))
