"""Time of fitting 8 models of ML-100K at once against one model alone, 64 rows a batch.

    python benchmarks/fit_many.py [--n 8] [--repeats 5] [--device cpu]

An epoch of one learner (its own fast loop) and an epoch of `fit_many` take turns; the ratio is that of their medians. Where both ran
by kernels, the time of their steps is told apart from that of all the rest (schedules, bookkeeping, validation, callbacks). Then
the weights of every third member after a whole fit are held against those of the same learner fitted alone. The record is written
before that, and again with the difference. The record of a GPU is a file of its own."""
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
from cfext.many import _Together

ways,steps = {'one':set(),'many':set()},[]

def watch():
    "Note how steps run, and how long those of kernels take"
    epoch,fast = _Together.epoch,CFLearner._fast_epoch
    def together(self, tick):
        epoch(self, tick)
        ways['many'].add(self.way)
    def alone(self):
        before = len(steps)
        fast(self)
        ways['one'].add('kernels' if len(steps)>before else 'recorded' if getattr(self, '_step_graph', None) else 'called')
    _Together.epoch,CFLearner._fast_epoch = together,alone
    if not torch.cuda.is_available(): return
    from cfext.kernels import KernelSteps
    run = KernelSteps.run
    def timed_run(self, *args, **kwargs):
        torch.cuda.synchronize()
        t = time.perf_counter()
        yield from run(self, *args, **kwargs)
        torch.cuda.synchronize()
        steps.append((self.n_models, time.perf_counter()-t))
    KernelSteps.run = timed_run

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
    if args.n<2: ap.error(f'--n {args.n}: a model alone is what the others are held against, so there should be 2 or more')
    if args.repeats<1: ap.error(f'--repeats {args.repeats}: there is nothing to take a median of, so there should be 1 or more')
    watch()
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
    steps.clear() # of warming up
    res = []
    for _ in range(args.repeats):
        res.append((alone(0)[1], many(args.n)))
        print('one {:.3f} s, together {:.3f} s'.format(*res[-1]), flush=True)
    one,all_ = (statistics.median(o) for o in zip(*res))
    how = {k: ', '.join(sorted(v)) for k,v in ways.items()}
    print(f'one {one:.3f} s ({how["one"]}), {args.n} at once {all_:.3f} s ({how["many"]}): {all_/one:.2f} times')
    of = {k: [t for m,t in steps if m==k] for k in (1,args.n)}
    alone_s,many_s = (statistics.median(o) if o else None for o in of.values())
    if alone_s and many_s: print(f'of that steps by kernels: one {alone_s:.4f} s, {args.n} at once {many_s:.4f} s: {many_s/alone_s:.2f} times')
    got = dict(device=args.device, n=args.n, one=one, many=all_, ratio=all_/one, pairs=res, ways=how, steps_one=alone_s, steps_many=many_s, epochs=args.epochs)
    name = 'fit_many' if args.device=='cpu' else 'fit_many_gpu'
    record(name, got)
    learns,worst = fit_many(make, args.epochs, 5e-3, n=args.n, wd=0.1),0.
    for s,l in list(enumerate(learns))[::3]:
        with no_random(s, reproducible=False): o,_ = alone(s, args.epochs)
        worst = max(worst, *((p-q).abs().max().item() for p,q in zip(l.model.parameters(), o.model.parameters())))
    print(f'largest difference of a weight after {args.epochs} epochs: {worst:.2e}')
    record(name, dict(got, largest_difference=worst))
