"""Where `RowAdam` begins to pay: seconds a step of Adam (dense, fused) and of `RowAdam`, for tables of growing size.

    python benchmarks/rows.py

A table of users of 10,000 rows and one of items that grows, 32 factors, random ids, both through `cf_learner` and the loop that it
takes by default. Medians of `--repeats` interleaved rounds after a warm one."""
import argparse,statistics,time

import numpy as np,pandas as pd,torch
from fastai.optimizer import Adam
from common import record
from loop import Clock,cuda,dev,synth
from cfext import *

def epochs(n_items, bs, n):
    df = synth(n, 10_000, n_items)
    df['item'] = np.random.default_rng(1).integers(0, n_items, n, dtype=np.int32)
    df.loc[0,'item'] = n_items-1
    items = IdMap(np.arange(n_items))
    for name,opt in (('Adam',Adam),('RowAdam',RowAdam)):
        dls = CFDataLoaders.from_df(df, bs=bs, seed=42, device=dev, valid_pct=0.01)
        torch.manual_seed(0)
        model = DotProductBias(dls.n_users, n_items+1, 32, y_range=(0,5.5))
        learn = cf_learner(dls, model, opt_func=opt)
        def epoch(learn=learn):
            clock = Clock()
            with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3, cbs=clock)
            return clock.s/len(learn.dls.train)
        yield name,epoch

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=3)
    args = p.parse_args()
    res = []
    for bs in (1024,8192):
        for n_items in (10**3,10**4,3*10**4,10**5,3*10**5,10**6,10**7):
            es = dict(epochs(n_items, bs, 12*bs))
            times = {k:[] for k in es}
            for r in range(args.repeats+1):
                for k,e in es.items():
                    s = e()
                    if r: times[k].append(s)
            row = dict(bs=bs, n_items=n_items, **{f'{k}_ms':round(statistics.median(v)*1e3, 2) for k,v in times.items()})
            row['ratio'] = round(row['Adam_ms']/row['RowAdam_ms'], 2)
            res.append(row)
            print(row, flush=True)
    record('rows' if cuda else 'rows_cpu', dict(steps=res))
