"""Next-item recommendation on MovieLens 1M in SASRec's layout, or on any file of `user item` lines:

    python benchmarks/sasrec.py                        # on a GPU: 'sasrec', 'gsasrec' and 'gru4rec'; without one: 'cpu'
    python benchmarks/sasrec.py --configs cpu-gru      # one of the configurations below
    python benchmarks/sasrec.py --data other.txt       # another file; its results go to --out only
    python benchmarks/sasrec.py --throughput           # time of an epoch beside a plain padded loop

Every figure is on the test items (the last of each user), ranked against all items but those that the user already has.
The epoch is chosen by NDCG@10 on validation (on a CPU, on 1,500 of its rows); where `ema` is given, an exponential average of
the weights is what is validated and kept. `sampled_100` is SASRec's own protocol, against 100 random items.
Published on the same file: SASRec .239 / .126, gSASRec .300 / .173 (recall@10 / NDCG@10); sampled: SASRec .825 / .591."""
import argparse,datetime,json,os,signal,statistics,tempfile,time
from functools import partial
from pathlib import Path

import numpy as np,torch
from torch import nn
from torch.nn import functional as F
from fastai.callback.all import *
from fastai.optimizer import OptimWrapper
from common import data_dir,machine
from cfext.averaging import EMA
from cfext.core import whole_file
from cfext.seq_data import SeqDataLoaders,SeqDL
from cfext.seq_models import NextAt
from cfext.sequence import MostPopular,seq_learner

here = Path(__file__).resolve().parent
adamw = partial(OptimWrapper, opt=partial(torch.optim.AdamW, betas=(.9,.98), fused=True))
configs = {
    'cpu-small': dict(model='gru4rec', config=dict(n_factors=64, n_hidden=96), max_len=50, bs=32, lr=4e-3, epochs=8, loss='sampled', n_neg=256),
    'cpu-gru':   dict(model='gru4rec', config=dict(n_factors=64, n_hidden=128), max_len=100, bs=32, lr=4e-3, epochs=16, loss='sampled', n_neg=512),
    'cpu-wide':  dict(model='sasrec', config=dict(n_factors=128, drop=0.25), max_len=200, bs=32, lr=1e-3, epochs=60, loss='sampled', n_neg=512),
    'cpu':       dict(model='sasrec', config=dict(n_factors=64), max_len=200, bs=32, lr=2e-3, epochs=48, loss='full', crop='random', ema=.998),
    'sasrec':    dict(model='sasrec', config=dict(n_factors=128, drop=0.3), max_len=200, bs=64, lr=1.5e-3, epochs=100, loss='full', crop='random', ema=.998),
    'gsasrec':   dict(model='sasrec', config=dict(n_factors=128, drop=0.3), max_len=200, bs=64, lr=1.5e-3, epochs=100, loss='gbce', n_neg=256, shared=False, crop='random', ema=.998),
    'gru4rec':   dict(model='gru4rec', config=dict(n_factors=128, n_hidden=256, drop=0.3), max_len=200, bs=64, lr=2e-3, epochs=50, loss='full', crop='random', ema=.998)}

def report(learn):
    rnd = lambda d: {k:round(v, 4) if isinstance(v, float) else v for k,v in d.items()}
    try: sampled = rnd(learn.evaluate('test', n_sampled=100))
    except ValueError as e: sampled = str(e) # a catalogue of too few items
    return dict(valid=rnd(learn.evaluate('valid')), test=rnd(learn.evaluate('test')), test_with_seen=rnd(learn.evaluate('test', drop_seen=False)), sampled_100=sampled)

class Timer(Callback):
    "Seconds in training, without validation"
    order = 70
    def before_fit(self): self.s = 0.
    def before_train(self): self.t = time.perf_counter()
    def after_train(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.s += time.perf_counter()-self.t

class Best(Callback):
    "Keep the weights that validate best, in memory and in a file, and end with them; SIGTERM ends the fit after the epoch"
    order = 60 # before an average of the weights makes way for the weights themselves
    def __init__(self, path): self.path = Path(path)
    def before_fit(self):
        self.value,self.at,self.stop,self.state = -1.,None,False,None
        self.old = signal.signal(signal.SIGTERM, lambda *_: setattr(self, 'stop', True))
    def after_validate(self):
        if self.recorder.log[-1]<=self.value: return
        self.value,self.at = float(self.recorder.log[-1]),self.epoch
        self.state = {k:v.detach().clone() for k,v in self.learn.model.state_dict().items()}
        torch.save(self.state, self.path)
    def after_epoch(self):
        if self.stop: raise CancelFitException()

class Reload(Callback):
    "Put back what `Best` kept, when everything else has ended"
    order = 90
    def after_fit(self):
        signal.signal(signal.SIGTERM, self.best.old)
        if self.best.state is not None: self.learn.model.load_state_dict(self.best.state)

class Log(Timer):
    "Print and keep each epoch's figures and times"
    def before_fit(self):
        super().before_fit()
        self.curve = []
    def after_epoch(self):
        self.curve.append([self.epoch, *(round(float(o), 4) for o in self.recorder.log[1:4]), round(self.s)])
        print(self.curve[-1], flush=True)

def fit(path, model, config, max_len, bs, lr, epochs, loss, n_neg=256, shared=True, crop='latest', ema=None, seed=42, n_valid=None, folder='.'):
    dls = SeqDataLoaders.from_pairs(path, max_len=max_len, bs=bs, crop=crop, seed=seed)
    whole = dls.loaders[1]
    if n_valid and n_valid<len(whole.dataset):
        rows = np.sort(np.random.default_rng(seed).permutation(len(whole.dataset))[:n_valid])
        dls.loaders[1] = SeqDL(whole.dataset.subset(torch.as_tensor(rows)), bs=whole.bs)
    torch.manual_seed(seed)
    log,best = Log(),Best(Path(folder)/f'best-{model}-{os.getpid()}.pth')
    log.best = best
    learn = seq_learner(dls, model, loss, n_neg, shared=shared, config=config, seed=seed, opt_func=adamw, metrics=[NextAt('ndcg')],
                        cbs=[GradientClip(5.), best, Reload(), log, *([EMA(ema)] if ema else [])])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, pct_start=.05, moms=(.9,.9,.9), div=25, div_final=2500)
    dls.loaders[1] = whole
    return learn,log

class Plain(nn.Module):
    "SASRec as its PyTorch ports have it: padded on the left to the full length, `nn.MultiheadAttention` under a mask, one negative a step"
    def __init__(self, n, d, max_len, n_layers, drop):
        super().__init__()
        self.emb,self.pos = nn.Embedding(n, d, padding_idx=0),nn.Embedding(max_len, d)
        self.att = nn.ModuleList(nn.MultiheadAttention(d, 1, dropout=drop, batch_first=True) for _ in range(n_layers))
        self.ff = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.Dropout(drop), nn.ReLU(), nn.Linear(d, d), nn.Dropout(drop)) for _ in range(n_layers))
        self.n1,self.n2 = (nn.ModuleList(nn.LayerNorm(d) for _ in range(n_layers)) for _ in range(2))
        self.drop,self.last = nn.Dropout(drop),nn.LayerNorm(d)
        self.register_buffer('mask', torch.ones(max_len, max_len, dtype=torch.bool).triu(1))
    def forward(self, x):
        h = self.drop(self.emb(x)*self.emb.embedding_dim**.5+self.pos(torch.arange(x.shape[1], device=x.device)))*(x>0)[...,None]
        for n1,att,n2,ff in zip(self.n1, self.att, self.n2, self.ff):
            q = n1(h)
            h = n2(q+att(q, h, h, attn_mask=self.mask, need_weights=False)[0])
            h = (h+ff(h))*(x>0)[...,None]
        return self.last(h)

def plain_step(hist, model, opt, users, max_len, n_items, rng, dev):
    "A training step in the manner of the ports: rows and negatives are made in Python"
    x,y,neg = (np.zeros((len(users),max_len), np.int64) for _ in range(3))
    for r,u in enumerate(users):
        seq,own = hist[u][-max_len-1:],set(hist[u])
        x[r,max_len-len(seq)+1:],y[r,max_len-len(seq)+1:] = seq[:-1],seq[1:]
        for j in range(max_len-len(seq)+1, max_len):
            t = rng.integers(1, n_items+1)
            while t in own: t = rng.integers(1, n_items+1)
            neg[r,j] = t
    x,y,neg = (torch.from_numpy(o).to(dev) for o in (x,y,neg))
    h,there = model(x),y>0
    pos,neg = ((h*model.emb(o)).sum(-1)[there] for o in (y,neg))
    loss = F.softplus(-pos).mean()+F.softplus(neg).mean()
    opt.zero_grad(); loss.backward(); opt.step()
    return loss.item()

def throughput(path, repeats=3):
    """Seconds an epoch, at the sizes of the paper for ML-1M: interleaved repeats. On a CPU they are worked out from a quarter of the users,
    and for the plain loop from three batches, which all cost the same"""
    d,max_len,bs,drop = 50,200,128,.2
    dls = SeqDataLoaders.from_pairs(path, max_len=max_len, bs=bs, seed=42)
    dev,rng = dls.device,np.random.default_rng(42)
    hist = {int(u): dls.hist[int(u)].tolist()[:-2] for u in dls.train.dataset.users}
    plain = Plain(dls.n_vocab, d, max_len, 2, drop).to(dev)
    opt,n_batches = torch.optim.Adam(plain.parameters(), 1e-3),len(dls.train)
    part,n_steps = (1,n_batches) if dev.type=='cuda' else (4,3)
    if part>1:
        rows = torch.randperm(len(dls.train.dataset), generator=torch.Generator().manual_seed(42))
        dls.loaders[0] = SeqDL(dls.train.dataset.subset(rows[:len(rows)//part]), bs=bs, shuffle=True, seed=42)
    sync = torch.cuda.synchronize if dev.type=='cuda' else lambda: None
    kinds = {'cfext, one negative':dict(loss='gbce', n_neg=1, t=0., shared=False), 'cfext, sampled softmax, 512':dict(loss='sampled', n_neg=512), 'cfext, full softmax':dict(loss='full')}
    dls.loaders[1] = SeqDL(dls.loaders[1].dataset.subset(slice(64)), bs=64)
    ours = {k: seq_learner(dls, 'sasrec', config=dict(n_factors=d, n_heads=1, mult=1, drop=drop), opt_func=adamw, **kw) for k,kw in kinds.items()}
    times = {k:[] for k in ('plain, one negative',*ours)}
    for _ in range(repeats):
        plain_step(hist, plain, opt, rng.choice(list(hist), bs, False), max_len, dls.n_vocab-1, rng, dev)
        sync(); t = time.perf_counter()
        for _ in range(n_steps): plain_step(hist, plain, opt, rng.choice(list(hist), bs, False), max_len, dls.n_vocab-1, rng, dev)
        sync(); times['plain, one negative'].append((time.perf_counter()-t)/n_steps*n_batches)
        for name,learn in ours.items():
            timer = Timer()
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=timer)
            times[name].append(timer.s*part)
    med = {k:round(statistics.median(v), 2) for k,v in times.items()}
    return dict(s_per_epoch=med, ratio={k:round(med['plain, one negative']/v, 2) for k,v in med.items()}, all={k:[round(o, 2) for o in v] for k,v in times.items()},
                sizes=dict(n_factors=d, max_len=max_len, bs=bs, n_layers=2, n_heads=1, mult=1, drop=drop))

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', help='a file of `user item` lines in order of time; default: sasrec/ml-1m.txt.gz in the data folder')
    ap.add_argument('--configs', help='names, separated by commas')
    ap.add_argument('--epochs', type=int, help='instead of the configuration\'s')
    ap.add_argument('--seed', type=int, default=42)
    ap.add_argument('--throughput', action='store_true')
    ap.add_argument('--out', help='default: sasrec.json here; no file for other data')
    a = ap.parse_args()
    path = Path(a.data) if a.data else data_dir('sasrec')/'ml-1m.txt.gz'
    out = Path(a.out) if a.out else None if a.data else here/'sasrec.json'
    res = json.loads(out.read_text()) if out and out.exists() else {'runs':{}}
    def keep(where, name, r):
        r.update(date=str(datetime.date.today()), machine=machine(), file=path.name)
        res.setdefault(where, {})[name] = r
        if out:
            with whole_file(out) as f: f.write_text(json.dumps(res, indent=1)+'\n')
    if a.throughput:
        r = throughput(path)
        keep('throughput', 'gpu' if torch.cuda.is_available() else 'cpu', {**r, 'command':'python benchmarks/sasrec.py --throughput'})
        print(r)
    else:
        dls = SeqDataLoaders.from_pairs(path, bs=64)
        keep('runs', 'most popular', report(seq_learner(dls, MostPopular(dls))))
        print('most popular', res['runs']['most popular']['test'], flush=True)
        cuda = torch.cuda.is_available()
        for name in (a.configs or ('sasrec,gsasrec,gru4rec' if cuda else 'cpu')).split(','):
            c = {**configs[name], **({'epochs':a.epochs} if a.epochs else {})}
            learn,log = fit(path, **c, seed=a.seed, n_valid=None if cuda else 1500, folder=tempfile.gettempdir())
            keep('runs', name if a.seed==42 else f'{name}, seed {a.seed}', dict(config=c, seed=a.seed, best_epoch=log.best.at, s_per_epoch=round(log.s/len(log.curve), 2), train_s=round(log.s),
                 **report(learn), curve=log.curve, command=f'python benchmarks/sasrec.py --configs {name}'))
            print(name, {k:res['runs'][name][k] for k in ('valid','test','sampled_100')} if a.seed==42 else '', flush=True)
