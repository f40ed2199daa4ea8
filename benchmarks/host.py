"""What the processor does for an epoch that a GPU trains: milliseconds of everything but the kernels, which do nothing here.

    python benchmarks/host.py

Rows, schedules, numbers and bookkeeping of the loop that a GPU takes, on a processor, with kernels stubbed: one learner and eight by
`fit_many`, at the batches an epoch has on ML-100K (1,250 of 64 rows, 79 of 1,024), one row a batch here, so that rows cost next to
nothing. `loop` is the training part of one learner's epoch, `epoch` all of it, with a validation of 64 rows and fastai's events.
`read` and `eight_read` are the parts of `epoch` and `eight` that are done while the device trains: losses averaged and handed to the
recorder. A GPU waits for the rest once an epoch, and no kernel makes it less. Processor time, but for the parts: that clock takes 10
microseconds or more to look at, which is as much as some of them, so theirs is the wall's, and nothing else should run beside.
Medians of `--repeats` fits of `--epochs` epochs after a warm one."""
import argparse,statistics,time

import numpy as np,torch
from fastai.callback.progress import ProgressCallback
from common import record
from cfext import *
import cfext.kernels as kernels
from cfext.learner import CFLearner
from cfext.loop import _Books
from cfext.many import _Together

loops,reads = [],[]
def timed_epoch(learn):
    t = time.process_time()
    kernels.kernel_epoch(learn)
    loops.append(time.process_time()-t)

def stub():
    "Let learners on a processor take a GPU's loop, with kernels that do nothing"
    kernels.kernel_hurdle.__globals__['kernel_ready'] = lambda device: None
    kernels.KernelSteps.several = lambda self, sizes: None
    tick = _Books.tick
    def timed_tick(self, **kwargs):
        t = time.perf_counter()
        try: return tick(self, **kwargs)
        finally: reads.append(0. if kwargs.get('last') else time.perf_counter()-t)
    _Books.tick = timed_tick
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
    torch.set_num_threads(1)
    res = {}
    for n in (1250,79):
        runs = []
        for r in range(args.repeats+1):
            loops.clear()
            row = {}
            for k,f in dict(epoch=fit_one, eight=fit_eight).items():
                reads.clear()
                row[k] = f(n, args.epochs)
                row['read' if k=='epoch' else 'eight_read'] = sum(reads)/args.epochs*1e3
            runs.append({'loop':statistics.median(loops)*1e3, **row})
        over = lambda f: {k: float(f'{f([r[k] for r in runs[1:]]):.3g}') for k in runs[0]}
        med = over(statistics.median)
        res[f'{n} batches'] = dict(ms=med, least=over(min), eight_by_one=round((med['eight']-med['eight_read'])/(med['epoch']-med['read']), 2))
        print(n, res[f'{n} batches'], flush=True)
    record('host_cpu', res)
