"""The lesson's character networks on nietzsche.txt: python benchmarks/char_rnn.py [--only 'CharRnn;CharLoop']

Set-up of lesson 6 of the fast.ai course of 2018, as its published notebook has it: 42 factors, 256 hidden units,
batches of 512, Adam, windows of eight characters of which a random fifth is held out. `printed` is the validation
loss that the notebook shows. Two of its figures need a word, which `note` gives. For some of the
networks, `unseen_nll` is the loss on the last fifth of the text after training on the first four alone.

A row 'one cycle' takes as many epochs as the lesson, with the learning rate rising and falling; how high is chosen
among `peaks` on training rows: trained on a quarter of them, judged on another twentieth."""
import argparse,datetime,json,time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from fastai.callback.all import *
from fastai.optimizer import OptimWrapper
from common import data_dir,machine
from cfext.core import whole_file
from cfext.seq_data import SeqDataLoaders,SeqDL
from cfext.sequence import seq_learner

here = Path(__file__).resolve().parent
adam = partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
peaks = 2e-3,4e-3,8e-3

def over_time(learn):
    "Loss with the softmax over the eight places of a row instead of over the characters"
    def loss(h, y): return -learn.model.score(h).log_softmax(1).gather(2, y[...,None]).mean()
    return loss

lesson = dict(layout='windows', seq_len=8, valid='random')
rows = [ # name, network, loaders, [(epochs, lr)], printed loss, note
    ('CharNet3', 'char3', dict(layout='stretches3', seq_len=3, valid='random'), [(1,1e-2),(1,1e-3)], 4.385,
     'the notebook validates on a single row (`val_idxs=[-1]`); here a random fifth of the rows'),
    ('CharLoop', 'loop', lesson, [(1,1e-2),(1,1e-3)], 1.791, ''),
    ('CharLoop, one cycle', 'loop', lesson, [(2,'one cycle')], 1.791, ''),
    ('CharLoopConcat', 'concat', lesson, [(1,1e-3),(1,1e-4)], 1.693, ''),
    ('CharLoopConcat, one cycle', 'concat', lesson, [(2,'one cycle')], 1.693, ''),
    ('CharRnn', 'rnn', lesson, [(4,1e-3)], 1.545, ''),
    ('CharRnn, one cycle', 'rnn', lesson, [(4,'one cycle')], 1.545, ''),
    ('CharRnn, a GRU', 'gru', lesson, [(4,1e-3)], None, ''),
    ('CharSeqRnn, softmax over time', 'rnn', dict(layout='stretches', seq_len=8, valid='random'), [(4,1e-3),(1,1e-4)], .613,
     'the notebook calls log_softmax without `dim` on a 3-d tensor, which was taken as dim 0, the time steps: '
     'not a likelihood of characters, its value before training is log 8'),
    ('CharSeqRnn, softmax over time, one cycle', 'rnn', dict(layout='stretches', seq_len=8, valid='random'), [(5,'one cycle')], .613, ''),
    ('CharSeqRnn', 'rnn', dict(layout='stretches', seq_len=8, valid='random'), [(4,1e-3),(1,1e-4)], None,
     'the same network with the softmax over the characters'),
    ('GRU, stretches of 64', 'gru', dict(layout='stretches', seq_len=64, valid='random', bs=64), [(4,2e-3),(1,2e-4)], None, ''),
    ('GRU, state carried, 64', 'gru', dict(layout='carry', seq_len=64, bs=64), [(8,3e-3),(2,3e-4)], None, ''),
    ('LSTM of 2 layers of 512, carried, 64', 'lstm', dict(layout='carry', seq_len=64, bs=64), [(10,2e-3),(2,2e-4)], None, 'run with --all'),
]
unseen_too = 'CharRnn','CharSeqRnn','GRU, stretches of 64' # also trained on the first four fifths alone: windows are slow
three_seeds = 'CharSeqRnn, softmax over time', # `seeds` has the losses of two more
big = {'LSTM of 2 layers of 512, carried, 64': dict(n_hidden=512, n_layers=2, drop=0.3)}

def loaders(text, kw, valid, seed):
    kw = {'bs':512, 'by':'char', 'seed':seed, **kw}
    three = kw['layout']=='stretches3'
    if valid is not None and kw['layout']!='carry': kw['valid'] = valid
    dls = SeqDataLoaders.from_text(text, **{**kw, 'layout':'stretches' if three else kw['layout']})
    if three:
        for dl in dls.loaders: dl.dataset.last_only = True
    return dls

def train(dls, name, arch, plan, seed, peak=None):
    "Train a network as `plan` says; return the learner and its losses after each epoch"
    torch.manual_seed(seed)
    learn,losses = seq_learner(dls, arch, opt_func=adam, seed=seed, config=big.get(name)),[]
    if 'over time' in name: learn.loss_func = over_time(learn)
    with learn.no_bar(), learn.no_logging():
        for n,lr in plan:
            if lr=='one cycle': learn.fit_one_cycle(n, peak)
            else: learn.fit(n, lr, reset_opt=False)
            losses += [round(o[1], 4) for o in learn.recorder.values]
    return learn,losses

def choose_peak(text, name, arch, kw, plan, seed):
    "Losses of each of `peaks` on a twentieth of the training rows, after training on a quarter of them"
    dls = loaders(text, kw, None, seed)
    ds = dls.train.dataset
    order = torch.randperm(len(ds), generator=torch.Generator().manual_seed(seed))
    dls.loaders = [SeqDL(ds.subset(order[:len(ds)//4]), bs=dls.train.bs, shuffle=True, seed=seed), SeqDL(ds.subset(order[-(len(ds)//20):]), bs=1024)]
    return {p: train(dls, name, arch, plan, seed, p)[1][-1] for p in peaks}

def run(text, name, arch, kw, plan, valid, seed, peak=None):
    dls,t = loaders(text, kw, valid, seed),time.perf_counter()
    learn,losses = train(dls, name, arch, plan, seed, peak)
    return learn,dict(valid_nll=losses[-1], by_epoch=losses, epochs=len(losses), s_per_epoch=round((time.perf_counter()-t)/len(losses), 1))

def keep(out, res):
    order = [o[0] for o in rows]
    res['rows'] = {k:res['rows'][k] for k in order if k in res['rows']}
    with whole_file(out) as f: f.write_text(json.dumps(res, indent=1)+'\n')

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--only', default='', help='names of rows, separated by ;')
    ap.add_argument('--all', action='store_true', help='also the rows for a GPU')
    ap.add_argument('--no-unseen', action='store_true', help='only the lesson\'s own validation')
    ap.add_argument('--seed', type=int, default=42)
    ap.add_argument('--out', default=str(here/'char_rnn.json'))
    a = ap.parse_args()
    text = (data_dir('nietzsche')/'nietzsche.txt').read_text()
    out = Path(a.out)
    res = json.loads(out.read_text()) if out.exists() else {'rows':{}}
    was = {k:res.get(k) for k in ('date','machine')}
    for r in res['rows'].values(): r.update({k:v for k,v in was.items() if k not in r}) # of rows that are not run now
    res.update(date=str(datetime.date.today()), machine=machine(), command='python benchmarks/char_rnn.py', seed=a.seed)
    for name,arch,kw,plan,printed,note in rows:
        if a.only and name not in a.only.split(';') or (note=='run with --all' and not a.all): continue
        chosen = choose_peak(text, name, arch, kw, plan, a.seed) if plan[0][1]=='one cycle' else {}
        learn,r = run(text, name, arch, kw, plan, None, a.seed, min(chosen, key=chosen.get, default=None))
        if chosen: r.update(peak=min(chosen, key=chosen.get), peaks=chosen)
        r.update(network=arch, layout=kw, plan=plan, printed=printed, note=note, writes=learn.generate('for those ', 300, temperature=0.6, seed=a.seed))
        if kw['layout']=='carry': r['unseen_nll'] = r['valid_nll']
        r.update(date=res['date'], machine=res['machine'])
        res['rows'][name] = r
        keep(out, res)
        if name in three_seeds:
            r['seeds'] = {s: run(text, name, arch, kw, plan, None, s)[1]['valid_nll'] for s in (a.seed+1, a.seed+2)}
            keep(out, res)
        if name in unseen_too and not a.no_unseen:
            r['unseen_nll'] = run(text, name, arch, kw, plan, 'end', a.seed)[1]['valid_nll']
            keep(out, res)
        print(name, {k:r.get(k) for k in ('valid_nll','printed','unseen_nll','s_per_epoch','peaks','seeds') if r.get(k) is not None}, flush=True)
