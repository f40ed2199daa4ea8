"""Gradient accumulation: time a row and peak memory, beside plain training and fastai's own accumulation.

    OMP_NUM_THREADS=1 python benchmarks/accumulate.py --out benchmarks/accumulate.json

Time is that of the batch loop alone, runs interleaved, as the median of paired ratios. Memory is measured twice, since a CPU
has no allocator that keeps a peak: bytes of the tensors that autograd saved for the backward pass at the worst moment
(counted exactly, with hooks), and the growth of the process's peak resident size over a fit, each in a process of its own.

mlp, cnn and dot run in fastai's loop, whose cost a batch is in each time. `cf_learner` has loops of its own, without accumulation a
faster one than with it: that row says what windows cost there, beside the same callback in fastai's loop."""
import argparse,json,os,platform,statistics,subprocess,sys,time,weakref
from pathlib import Path

import torch
from torch import nn
from fastai.basics import *
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation

from cfext.callbacks import *
from cfext.data import CFDataLoaders
from cfext.learner import cf_learner
from cfext.sources import synth_ratings
from datetime import date # after the star imports, which bring a `datetime` of their own

def mlp(): return nn.Sequential(nn.Linear(40,256), nn.ReLU(), nn.Linear(256,256), nn.ReLU(), nn.Linear(256,1))
def cnn():
    conv = lambda a,b: nn.Sequential(nn.Conv2d(a,b,3,1,1), nn.GroupNorm(4,b), nn.ReLU())
    return nn.Sequential(conv(3,16), conv(16,16), nn.MaxPool2d(2), conv(16,32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32,1))
class Dot(nn.Module):
    "A ratings model, whose step (all of two tables) costs far more than a batch's gradient"
    def __init__(self):
        super().__init__()
        self.u,self.i = nn.Embedding(3000,50),nn.Embedding(3000,50)
    def forward(self, x): return (self.u(x[:,0])*self.i(x[:,1])).sum(1, keepdim=True)

def learner(kind, bs, n, cbs=None):
    torch.manual_seed(0)
    x = {'mlp': lambda: torch.randn(n,40), 'cnn': lambda: torch.randn(n,3,32,32), 'dot': lambda: torch.randint(0,3000,(n,2))}[kind]()
    batches = list(zip(x.split(bs), torch.randn(n,1).split(bs)))
    model = dict(mlp=mlp, cnn=cnn, dot=Dot)[kind]()
    dls = DataLoaders(DataLoader(batches, bs=None), DataLoader(batches[:1], bs=None))
    learn = Learner(dls, model, loss_func=nn.MSELoss(), cbs=cbs)
    learn.logger = noop
    learn.remove_cb(ProgressCallback)
    learn.create_opt()
    return learn

class Clock(Callback):
    order = 100
    def before_train(self): self.t = time.perf_counter()
    def after_train(self): self.t = time.perf_counter()-self.t

def interleaved(learns, rows, repeats):
    "Microseconds a row of each learner, one after the other in each round, and the median of paired ratios of two"
    ts = {nm: [] for nm in learns}
    for i in range(repeats+1): # the first round is warm-up
        for nm,l in learns.items():
            l.fit(1, 1e-4)
            if i: ts[nm].append(l.clock.t)
    return {nm: round(statistics.median(v)/rows*1e6, 3) for nm,v in ts.items()},lambda a,b: round(statistics.median([x/y for x,y in zip(ts[a], ts[b])]), 4)

def times(kind, bs, k, n, repeats):
    runs = dict(plain=(bs,None), big=(bs*k,None), ours=(bs,lambda: GradientAccumulator(bs*k)), fastai=(bs,lambda: GradientAccumulation(bs*k)),
        ours_each_batch=(bs,lambda: GradientAccumulator(1))) # a window of one batch: what the callback itself costs
    learns = {nm: learner(kind, b, n, [Clock()]+([cb()] if cb else [])) for nm,(b,cb) in runs.items()}
    us,ratio = interleaved(learns, n, repeats)
    return dict(bs=bs, window=bs*k, rows=n, repeats=repeats, us_a_row=us,
        ours_over_plain=ratio('ours','plain'), ours_over_big=ratio('ours','big'), ours_over_fastai=ratio('ours','fastai'),
        window_of_one_over_plain=ratio('ours_each_batch','plain'))

def cf_times(bs=64, k=4, n=40_000, repeats=7):
    "A learner for ratings: without accumulation, with it, and with it in fastai's loop"
    df = synth_ratings(n_users=943, n_items=1682, n_ratings=n, seed=0)
    def made(fast=None, cbs=None):
        dls = CFDataLoaders.from_df(df, item_name='title', valid_pct=0.1, seed=42, bs=bs, device='cpu')
        learn = cf_learner(dls, y_range=(0,5.5), seed=1, fast=fast, cbs=[Clock(), *L(cbs)])
        learn.logger = noop
        return learn.remove_cb(ProgressCallback)
    learns = dict(plain=made(), ours=made(cbs=GradientAccumulator(bs*k)), ours_in_fastais_loop=made(False, GradientAccumulator(bs*k)),
                  plain_in_fastais_loop=made(False))
    rows = len(learns['plain'].dls.train_ds)
    us,ratio = interleaved(learns, rows, repeats)
    return dict(bs=bs, window=bs*k, rows=rows, repeats=repeats, us_a_row=us,
                ours_over_plain=ratio('ours','plain'), fastais_loop_over_ours=ratio('ours_in_fastais_loop','ours'))

def saved_bytes(kind, bs, cbs=None, n=512):
    "Most bytes that autograd held for backward passes at any one time"
    live,peak,seen = [0],[0],weakref.WeakValueDictionary()
    class Held:
        def __init__(self, t):
            self.t,self.n = t,t.numel()*t.element_size()
            live[0] += self.n
            peak[0] = max(peak[0], live[0])
        def __del__(self): live[0] -= self.n
    learn = learner(kind, bs, n, cbs)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.t): learn.fit(1, 1e-4)
    return peak[0]

def hwm():
    "Peak resident size of this process in MiB since `reset_hwm` (Linux)"
    return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))/1024
def reset_hwm(): Path('/proc/self/clear_refs').write_text('5')

def rss_growth(kind, bs, acc, n=512):
    "MiB by which the resident size of a fresh process grows, at its peak, over one fit"
    learn = learner(kind, bs, n, [GradientAccumulator(acc)] if acc else None)
    tiny = learner(kind, 2, 4)
    tiny.fit(1, 1e-4)
    reset_hwm()
    before = hwm()
    learn.fit(1, 1e-4)
    return hwm()-before

def memory(kind='cnn', bs=32, k=8, repeats=3):
    def sub(b, acc):
        out = [float(subprocess.run([sys.executable, __file__, '--rss', f'{kind},{b},{acc}'], capture_output=True, text=True, check=True).stdout.split()[-1]) for _ in range(repeats)]
        return round(statistics.median(out), 1)
    mb = lambda b: round(b/2**20, 2)
    return dict(model=kind, bs=bs, window=bs*k,
        saved_for_backward_mib=dict(small=mb(saved_bytes(kind, bs)), accumulated=mb(saved_bytes(kind, bs, GradientAccumulator(bs*k))), big=mb(saved_bytes(kind, bs*k))),
        peak_resident_growth_mib=dict(small=sub(bs, 0), accumulated=sub(bs, bs*k), big=sub(bs*k, 0)))

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--out'), ap.add_argument('--rss'), ap.add_argument('--repeats', type=int, default=21), ap.add_argument('--part', default='time,memory')
    a = ap.parse_args()
    if a.rss:
        kind,bs,acc = a.rss.split(',')
        print(rss_growth(kind, int(bs), int(acc)))
        sys.exit()
    import psutil,fastai,cfext
    cpu = first(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')) if Path('/proc/cpuinfo').exists() else platform.processor()
    here = dict(date=str(date.today()), machine=dict(cpus=os.cpu_count(), model=cpu, ram_gib=round(psutil.virtual_memory().total/2**30)),
        versions=dict(python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__, cfext=cfext.__version__),
        command=f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS','')} python benchmarks/accumulate.py {' '.join(sys.argv[1:])}")
    res = json.loads(Path(a.out).read_text()) if a.out and Path(a.out).exists() else {}
    if 'memory' in a.part: res['memory'] = dict(**here, **memory())
    if 'time' in a.part: res['time'] = dict(**here, mlp=times('mlp', 64, 4, 64*100, a.repeats), cnn=times('cnn', 16, 4, 16*20, a.repeats), dot=times('dot', 64, 4, 64*60, a.repeats), cf_learner=cf_times(repeats=max(1, a.repeats//3)))
    print(json.dumps(res, indent=1))
    if a.out: Path(a.out).write_text(json.dumps(res, indent=1)+'\n')
