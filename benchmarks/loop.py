"""Time of a training epoch: fastai, a plain PyTorch loop and cfext, side by side on the same rows and the same model.

    python benchmarks/loop.py                 # everything that this machine can do
    python benchmarks/loop.py --only ml100k   # ml100k, big (needs a GPU), stream, growth; the others stay in the record if it is of this machine

Every contestant trains a dot product with biases (50 factors, sigmoid range) by AdamW over a one-cycle schedule, and visits every
row once an epoch: fastai's own loader draws rows with replacement, and is given a permutation instead. One warm epoch each, then
`--repeats` rounds in turn; what is compared are medians. An epoch of fastai on 20 million rows is timed on its first batches and
scaled. Growth: cfext alone, synthetic rows."""
import argparse,math,statistics,time
from functools import partial

import numpy as np,pandas as pd,torch
from fastai.callback.core import Callback,CancelEpochException,CancelFitException
from fastai.collab import CollabDataLoaders,collab_learner
from common import data_dir,record,recorded
from cfext import *

cuda = torch.cuda.is_available()
dev = torch.device('cuda' if cuda else 'cpu')
sync = torch.cuda.synchronize if cuda else lambda: None

class Clock(Callback):
    "Time the training part of an epoch, or its batches `skip` to `skip+take`"
    order = 100
    def __init__(self, take=None, skip=20): self.take,self.skip = take,skip
    def before_train(self):
        sync()
        self.t = time.perf_counter()
    def after_train(self):
        sync()
        if not self.take: self.s = time.perf_counter()-self.t

class Part(Clock):
    def after_batch(self):
        if self.iter+1==self.skip:
            sync()
            self.t = time.perf_counter()
        if self.iter+1==self.skip+self.take:
            sync()
            self.s = (time.perf_counter()-self.t)*self.n_iter/self.take
            raise CancelFitException()

def fastai_epoch(df, bs, take=None):
    dls = CollabDataLoaders.from_df(df[['user','item','rating']], bs=bs, valid_pct=0.2, seed=42, device=dev)
    dl = dls.train
    dl.get_idxs = lambda: np.random.permutation(len(dl.dataset)).tolist() if take is None else np.random.permutation(len(dl.dataset))[:bs*(take+40)].tolist()
    learn = collab_learner(dls, n_factors=50, y_range=(0,5.5))
    def epoch():
        clock = Part(take) if take else Clock()
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3, wd=0.1, cbs=clock)
        return clock.s
    return epoch

def cf_epoch(df, bs, fast=None, n_factors=50, valid_pct=0.2, resident=None, n_items=None):
    "`n_items`: give the model a row for each item of a catalogue, also for those without ratings"
    dls = CFDataLoaders.from_df(df[['user','item','rating']], bs=bs, seed=42, device=dev, valid_pct=valid_pct, resident=resident)
    model = 'dot' if n_items is None else DotProductBias(dls.n_users, n_items+1, n_factors, y_range=(0,5.5))
    learn = cf_learner(dls, model, n_factors=n_factors, y_range=(0,5.5), fast=fast)
    def epoch():
        clock = Clock()
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3, wd=0.1, cbs=clock)
        return clock.s
    epoch.learn = learn
    return epoch

def plain_epoch(df, bs):
    "What a careful user writes by hand: resident tensors, fused AdamW, no synchronisation"
    dls = CFDataLoaders.from_df(df[['user','item','rating']], bs=bs, seed=42, device=dev)
    X,Y = dls.train_ds.x,dls.train_ds.y
    model = DotProductBias(dls.n_users, dls.n_items, 50, y_range=(0,5.5)).to(dev)
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, betas=(0.95,0.99), eps=1e-5, fused=True)
    def epoch():
        sched = torch.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=math.ceil(len(X)/bs)+1)
        sync(); t = time.perf_counter()
        order = torch.randperm(len(X), device=dev)
        for at in order.split(bs):
            loss = torch.nn.functional.mse_loss(model(X[at].long()), Y[at])
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
        sync()
        return time.perf_counter()-t
    return epoch

def side_by_side(epochs, repeats):
    "Median seconds of each, measured in turn after a warm epoch"
    times = {k:[] for k in epochs}
    for e in epochs.values(): e()
    for _ in range(repeats):
        for k,e in epochs.items(): times[k].append(e())
    med = {k: statistics.median(v) for k,v in times.items()}
    first = next(iter(med))
    res = dict(seconds={k: float(f'{v:.4g}') for k,v in med.items()}, times_faster={k: round(med[first]/v, 1) for k,v in med.items()},
               all={k: [float(f'{o:.4g}') for o in v] for k,v in times.items()})
    print(pd.DataFrame({k: res[k] for k in ('seconds','times_faster')}).to_string(), flush=True)
    return res

def synth(n_rows, n_users=138_493, n_items=26_744, seed=0):
    "Random rows with MovieLens-like popularity, ids only"
    rng = np.random.default_rng(seed)
    items = (n_items*rng.random(n_rows)**3).astype(np.int32)
    return pd.DataFrame(dict(user=rng.integers(0, n_users, n_rows, dtype=np.int32), item=items, rating=rng.integers(1, 6, n_rows).astype('float32')))

def ml100k(args):
    df = read_ratings(data_dir('ml-100k'))[['user','item','rating']]
    for bs in (64,1024):
        print(f'ML-100K, bs {bs}')
        yield {f'ML-100K, bs {bs}': side_by_side({'fastai':fastai_epoch(df, bs), 'plain PyTorch':plain_epoch(df, bs), 'cfext':cf_epoch(df, bs)}, args.repeats)}

def copy_bandwidth(gib=4):
    "GiB/s read and written by a copy on the device"
    a = torch.empty(gib*2**28, device=dev)
    b = torch.empty_like(a)
    b.copy_(a); sync()
    t = time.perf_counter()
    for _ in range(10): b.copy_(a)
    sync()
    return 2*10*gib/(time.perf_counter()-t)

def big(args):
    if not cuda: return
    df = synth(20_000_000)
    for bs in (8192,65536):
        print(f'20M rows, bs {bs}')
        torch.cuda.reset_peak_memory_stats()
        ours = cf_epoch(df, bs)
        ours()
        peak = torch.cuda.max_memory_allocated()
        r = side_by_side({'fastai':fastai_epoch(df, bs, take=60), 'plain PyTorch':plain_epoch(df, bs), 'cfext':ours}, args.repeats)
        ps,ds = list(ours.learn.model.parameters()),ours.learn.dls.train_ds
        n_bytes = sum(p.numel() for p in ps)*4
        moved = len(ours.learn.dls.train)*(8*n_bytes+bs*50*4*8) # gradient written; weights, gradient and averages read; weights and averages written; factors of the batch
        yield {f'20M rows, bs {bs}': dict(**r, peak_mib=round(peak/2**20), data_mib=round(sum(o.numel()*o.element_size() for d in (ds, ours.learn.dls.valid_ds) for o in (d.x,d.y))/2**20),
            states_mib=round(4*n_bytes/2**20), copy_gib_s=round(copy_bandwidth()), share_of_copy_bandwidth=round(moved/2**30/r['seconds']['cfext']/copy_bandwidth(), 3))}

def growth(args):
    "Seconds an epoch and microseconds a step of cfext, one thing growing at a time; `times` says how many epochs were timed, after a warm one if more than one"
    n = 2_000_000 if cuda else 200_000
    def one(df, bs=8192, n_items=None, times=3, **kwargs):
        e = cf_epoch(df, bs, valid_pct=0.02, n_items=n_items, **kwargs)
        if times>1: e()
        s = statistics.median(e() for _ in range(times))
        return dict(s=float(f'{s:.4g}'), us_a_step=round(s/len(e.learn.dls.train)*1e6, 1), times=times)
    def all_items(c):
        df = synth(n, 10_000, c)
        df['item'] = np.random.default_rng(1).integers(0, c, n, dtype=np.int32)
        return df
    grown = {'catalogue': ((10**3,10**4,10**5,10**6,10**7), lambda c: one(all_items(c), n_items=c, times=3 if cuda or c<10**7 else 1)),
             'factors': ((8,16,32,64,128,256), lambda f: one(synth(n, 100_000, 20_000), n_factors=f)),
             'rows': ((10**5,10**6,10**7,10**8), lambda r: one(synth(r, 100_000, 20_000), times=3 if cuda or r<10**8 else 1))}
    res = {}
    for k,(sizes,f) in grown.items():
        res[k] = {s: f(s) for s in sizes}
        print(k, res[k], flush=True)
        yield {'growth':res}

def stream(args):
    "What it costs that rows stay in host memory and are sent a block ahead"
    n = 20_000_000 if cuda else 1_000_000
    df = synth(n)
    for bs in (8192,65536):
        print(f'{n:,} rows, bs {bs}, rows on the device and in host memory')
        yield {f'{n/1e6:g}M rows in host memory, bs {bs}': side_by_side({'streamed':cf_epoch(df, bs, resident=False), 'resident':cf_epoch(df, bs, resident=True)}, args.repeats)}

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=['ml100k','big','stream','growth'])
    p.add_argument('--repeats', type=int, default=5)
    args = p.parse_args()
    name = 'loop' if cuda else 'loop_cpu'
    res = recorded(name)
    for part in args.only:
        for new in globals()[part](args): # recorded one by one, for the next may not end
            res.update(new)
            record(name, res)
