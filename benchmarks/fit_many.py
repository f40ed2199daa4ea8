"""Time of fitting 8 models of ML-100K at once against one model alone, 64 rows a batch.

    python benchmarks/fit_many.py [--n 8] [--repeats 5] [--device cpu]

An epoch of one learner (its own fast loop) and an epoch of `fit_many` take turns; the ratio is that of their medians. Then the
weights of every third member after a whole fit are held against those of the same learner fitted alone."""
import argparse,statistics,sys,time
from pathlib import Path

import torch
sys.path.insert(0, str(Path(__file__).parent))
from common import data_dir,record
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import no_random
from cfext.sources import *
from cfext.data import *
from cfext.learner import *
from cfext.many import *

def timed(f, device):
    if device!='cpu': torch.cuda.synchronize()
    t = time.perf_counter()
    f()
    if device!='cpu': torch.cuda.synchronize()
    return time.perf_counter()-t

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--n', type=int, default=8)
    ap.add_argument('--repeats', type=int, default=5)
    ap.add_argument('--epochs', type=int, default=1, help='of the fits that are held against each other')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = ap.parse_args()
    df = read_ratings(data_dir('ml-100k'))
    def make(seed):
        learn = cf_learner(CFDataLoaders.from_df(df, seed=seed, bs=64, device=args.device), n_factors=50, y_range=(0,5.5), seed=seed)
        learn.remove_cbs([ProgressCallback])
        learn.dls.loaders[1] = learn.dls.valid.new(learn.dls.valid_ds.subset(slice(0, 64)))
        return learn
    def alone(seed, epochs=1):
        learn = make(seed)
        with learn.no_logging(): t = timed(lambda: learn.fit_one_cycle(epochs, 5e-3, wd=0.1), args.device)
        return learn,t
    def many(n):
        learns = [make(s) for s in range(n)]
        return timed(lambda: fit_many(learns, 1, 5e-3, wd=0.1), args.device)
    alone(0),many(args.n)
    res = []
    for _ in range(args.repeats):
        res.append((alone(0)[1], many(args.n)))
        print('one {:.2f} s, together {:.2f} s'.format(*res[-1]), flush=True)
    one,all_ = (statistics.median(o) for o in zip(*res))
    print(f'one {one:.2f} s, {args.n} at once {all_:.2f} s: {all_/one:.2f} times')
    learns,worst = fit_many(make, args.epochs, 5e-3, n=args.n, wd=0.1),0.
    for s,l in list(enumerate(learns))[::3]:
        with no_random(s, reproducible=False): o,_ = alone(s, args.epochs)
        worst = max(worst, *((p-q).abs().max().item() for p,q in zip(l.model.parameters(), o.model.parameters())))
    print(f'largest difference of a weight after {args.epochs} epochs: {worst:.2e}')
    record('fit_many', dict(device=args.device, n=args.n, one=one, many=all_, ratio=all_/one, pairs=res, largest_difference=worst, epochs=args.epochs))
