"""Loaders from a frame of 20 million rows: time and peak memory, beside fastai's.

    python benchmarks/loaders.py [--rows 20000000] [--repeats 3]

Each build runs in a process of its own, in turn; the frame is made first and is not part of the time. Memory is the largest
resident size during the build less that just before it (Linux resets the mark on request), beside the bytes of the frame's ids and ratings.
"""
import argparse,json,statistics,subprocess,sys,time
from pathlib import Path

def child(which, rows):
    import gc
    import numpy as np,pandas as pd
    from fastai.collab import CollabDataLoaders
    from cfext.data import CFDataLoaders
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(1, 138_494, rows), item=(26_744*rng.random(rows)**2).astype(np.int64)*5+1, rating=rng.integers(1, 11, rows)/2))
    cls = CFDataLoaders if which=='cfext' else CollabDataLoaders
    cls.from_df(df[:1000], seed=1, device='cpu')   # imports and caches warm
    gc.collect()
    status = lambda k: next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(k))*1024
    Path('/proc/self/clear_refs').write_text('5')
    before,t = status('VmRSS'),time.perf_counter()
    dls = cls.from_df(df, seed=42, bs=8192, device='cpu')
    secs,peak = time.perf_counter()-t,status('VmHWM')-before
    print(json.dumps(dict(secs=secs, peak=peak, frame=int(df.memory_usage(index=False).sum()), train=len(dls.train_ds), valid=len(dls.valid_ds))))

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--rows', type=int, default=20_000_000)
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--child')
    a = p.parse_args()
    if a.child: sys.exit(child(a.child, a.rows))
    from common import record
    runs = dict(fastai=[], cfext=[])
    for _ in range(a.repeats):
        for k in runs:
            r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--child', k, '--rows', str(a.rows)], capture_output=True, text=True, check=True)
            runs[k].append(json.loads(r.stdout.splitlines()[-1]))
            print(k, runs[k][-1], flush=True)
    med = {k: {m: statistics.median(r[m] for r in v) for m in ('secs','peak','frame')} for k,v in runs.items()}
    res = dict(rows=a.rows, runs=runs, median=med, times_as_fast=med['fastai']['secs']/med['cfext']['secs'],
               peak_over_frame={k: v['peak']/v['frame'] for k,v in med.items()})
    print({k: res[k] for k in ('median','times_as_fast','peak_over_frame')})
    record('loaders', res)
