"""What the processor does for an epoch that a GPU trains: milliseconds of everything but the kernels, which do nothing here.

    python benchmarks/host.py

Rows, schedules, numbers and bookkeeping of the loop that a GPU takes, on a processor, with kernels stubbed: one learner and eight by
`fit_many`, at the batches an epoch has on ML-100K (1,250 of 64 rows, 79 of 1,024), one row a batch here, so that rows cost next to
nothing. `loop` is the training part of one learner's epoch, `epoch` all of it, with a validation of 64 rows and fastai's events.
Processor time, medians of `--repeats` fits of `--epochs` epochs after a warm one. A GPU waits for this once an epoch, and no kernel
makes it less: it is the least that an epoch takes."""
import argparse,statistics,time

import numpy as np,torch
from fastai.callback.progress import ProgressCallback
from common import record
from cfext import *
import cfext.kernels as kernels
from cfext.learner import CFLearner
from cfext.many import _Together

loops = []
def timed_epoch(learn):
    t = time.process_time()
    kernels.kernel_epoch(learn)
    loops.append(time.process_time()-t)

def stub():
    "Let learners on a processor take a GPU's loop, with kernels that do nothing"
    kernels.kernel_hurdle.__globals__['kernel_ready'] = lambda device: None
    kernels.KernelSteps.several = lambda self, sizes: None
    torch.cuda._device_count_nvml = lambda: 0 # asked anew by each look at random numbers, where there is no GPU
    CFLearner._fast_epoch = timed_epoch
    _Together.pick = lambda self: 'kernels'

def make(n, seed):
    df = synth_ratings(90, 60, n+64)
    dls = CFDataLoaders.from_df(df, item_name='title', seed=seed, bs=1, device='cpu', splitter=lambda o: (np.arange(n),np.arange(n,n+64)))
    learn = cf_learner(dls, n_factors=5, y_range=(0,5.5), seed=seed)
    learn.remove_cbs([ProgressCallback])
    learn.dls.loaders[1] = learn.dls.valid.new(learn.dls.valid_ds, bs=64)
    return learn

def fit_one(n, epochs):
    learn = make(n, 0)
    t = time.process_time()
    with learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3, wd=0.1)
    return (time.process_time()-t)/epochs*1e3

def fit_eight(n, epochs):
    learns = [make(n, s) for s in range(8)]
    t = time.process_time()
    fit_many(learns, epochs, 5e-3, wd=0.1)
    return (time.process_time()-t)/epochs*1e3

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--epochs', type=int, default=5)
    args = p.parse_args()
    stub()
    res = {}
    for n in (1250,79):
        times = []
        for r in range(args.repeats+1):
            loops.clear()
            times.append((fit_one(n, args.epochs), statistics.median(loops)*1e3, fit_eight(n, args.epochs)))
        epoch,loop,eight = zip(*times[1:])
        med = {k: float(f'{statistics.median(v):.3g}') for k,v in dict(loop=loop, epoch=epoch, eight=eight).items()}
        res[f'{n} batches'] = dict(ms=med, least={k: float(f'{min(v):.3g}') for k,v in dict(loop=loop, epoch=epoch, eight=eight).items()}, eight_by_one=round(med['eight']/med['epoch'], 2))
        print(n, res[f'{n} batches'], flush=True)
    record('host_cpu', res)
