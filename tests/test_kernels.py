"The kernels against fastai's loop: compiled where there is a GPU, else by Triton's interpreter, in a process of its own"
import os,subprocess,sys
from functools import partial
from pathlib import Path

import pytest,torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import *
from cfext import *

pytest.importorskip('triton')
cuda,inside = torch.cuda.is_available(),os.environ.get('TRITON_INTERPRET')=='1'
here = Path(__file__)
runs = pytest.mark.skipif(not (cuda or inside), reason='runs in the process that test_in_an_interpreter starts')
pytestmark = pytest.mark.usefixtures('quiet')

@pytest.mark.skipif(cuda or inside, reason='the kernels run in this process')
def test_in_an_interpreter():
    "This file again, and the page of the kernels, where Triton interprets its programs from the beginning"
    env = {**os.environ, 'TRITON_INTERPRET':'1'}
    res = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', str(here)], env=env, cwd=here.parent.parent, capture_output=True, text=True)
    assert res.returncode==0 and '11 passed' in res.stdout, res.stdout[-3000:]+res.stderr[-1000:]
    page = f"from nbdev.test import test_nb; import triton.language as tl; assert type(tl.sum).__name__=='InterpretedFunction'; raise SystemExit(not test_nb({str(here.parent.parent/'nbs'/'05d_kernels.ipynb')!r})[0])"
    res = subprocess.run([sys.executable, '-c', page], env=env, cwd=here.parent.parent, capture_output=True, text=True)
    assert res.returncode==0, res.stdout[-3000:]+res.stderr[-1000:]

df = synth_ratings(n_users=40, n_items=50, n_ratings=500)
def split(model): return [[o for n,o in model.named_parameters() if n.startswith(r)] for r in ('user','item')]

def fit(kernels, cls=DotProductBias, y_range=(0.5,5.5), opt_func=Adam, weights=False, bs=64, per=0, how=lambda l: l.fit_one_cycle(2, 0.02, wd=0.1), config={}, **kwargs):
    from cfext.kernels import kernel_epoch,kernel_hurdle
    class Kernels(CFLearner):
        def _fast_epoch(self):
            assert kernel_hurdle(self) is None
            kernel_epoch(self, per=per)
    frame = df.assign(w=df.index%7+1.) if weights else df
    dls = CFDataLoaders.from_df(frame, item_name='title', seed=42, bs=bs, device='cuda' if cuda else 'cpu', **({'weight_name':'w'} if weights else {}))
    learn = cf_learner(dls, cls, n_factors=5, y_range=y_range, opt_func=opt_func, seed=1, unk_p=0, config=config, **kwargs)
    if kernels: learn.__class__ = Kernels
    else: learn.fast = False
    torch.manual_seed(3)
    with learn.no_bar(),learn.no_logging(): how(learn)
    return learn

def groups(l):
    l.create_opt()
    l.opt.set_hyper('wd', [0.,0.3])
    l.fit_one_cycle(2, slice(1e-3, 2e-2))

cases = dict(usual={}, weights=dict(weights=True), no_range=dict(y_range=None), no_bias=dict(cls=DotProduct), neither=dict(cls=DotProduct, y_range=None),
             mean=dict(config=dict(mean=3.)), l2=dict(opt_func=partial(Adam, decouple_wd=False)), groups=dict(splitter=split, how=groups),
             one_left_over=dict(bs=399), two_fits=dict(how=lambda l: (l.fit_one_cycle(1, 0.02), l.fit_flat_cos(1, 0.01))))

@runs
@pytest.mark.parametrize('case', cases)
def test_equals_fastai(case):
    ref,new = fit(False, **cases[case]),fit(True, per=4 if cuda else 0, **cases[case])
    a,b = (torch.stack([o.as_subclass(torch.Tensor).cpu() for o in l.recorder.losses]) for l in (ref,new))
    assert a.shape==b.shape
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ref.recorder.lrs==pytest.approx(new.recorder.lrs, rel=1e-12)
    for p,q in zip(ref.model.parameters(), new.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        assert ref.opt.state[p]['step']==new.opt.state[q]['step']

@runs
def test_steps_are_kept_while_nothing_moves():
    from cfext.kernels import _kept
    learn = fit(True)
    first = _kept[learn.model]
    with learn.no_bar(),learn.no_logging():
        learn.fit(1, 0.01)
        assert _kept[learn.model] is first
        learn.create_opt()
        learn.fit(1, 0.01)
    assert _kept[learn.model] is not first

@pytest.mark.cuda
@pytest.mark.skipif(not cuda, reason='needs a GPU')
def test_is_recorded():
    from cfext.kernels import _kept
    learn = fit(True, per=3)
    assert _kept[learn.model].graph is not None
