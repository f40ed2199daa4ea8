"The kernels against fastai's loop: compiled where there is a GPU, else by Triton's interpreter, in a process of its own"
import os,subprocess,sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pytest,torch
from fastai.callback.all import Callback,CancelFitException,EarlyStoppingCallback,ProgressCallback
from fastai.losses import L1LossFlat
from fastai.optimizer import *
from fastai.torch_core import no_random
from cfext import *
from cfext.many import _Together

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
    assert res.returncode==0 and '32 passed' in res.stdout, res.stdout[-3000:]+res.stderr[-1000:]
    page = f"from nbdev.test import test_nb; import triton.language as tl; assert type(tl.sum).__name__=='InterpretedFunction'; raise SystemExit(not test_nb({str(here.parent.parent/'nbs'/'05d_kernels.ipynb')!r})[0])"
    res = subprocess.run([sys.executable, '-c', page], env=env, cwd=here.parent.parent, capture_output=True, text=True)
    assert res.returncode==0, res.stdout[-3000:]+res.stderr[-1000:]

df = synth_ratings(n_users=40, n_items=50, n_ratings=500)
def split(model): return [[o for n,o in model.named_parameters() if n.startswith(r)] for r in ('user','item')]

def fit(kernels, cls=DotProductBias, y_range=(0.5,5.5), opt_func=Adam, weights=False, bs=64, per=32, how=lambda l: l.fit_one_cycle(2, 0.02, wd=0.1), config={}, **kwargs):
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
    ref,new = fit(False, **cases[case]),fit(True, per=4, **cases[case])
    a,b = (torch.stack([o.as_subclass(torch.Tensor).cpu() for o in l.recorder.losses]) for l in (ref,new))
    assert a.shape==b.shape
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ref.recorder.lrs==pytest.approx(new.recorder.lrs, rel=1e-12)
    for p,q in zip(ref.model.parameters(), new.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        assert ref.opt.state[p]['step']==new.opt.state[q]['step']

@runs
def test_epochs_go_in_pieces_that_are_recorded_once(monkeypatch):
    "A recording stood in for: it launches what it was made of"
    from cfext.kernels import KernelSteps,_kept
    made,replayed = [],[]
    class Graph:
        def __init__(self, ks, sizes): self.ks,self.sizes = ks,sizes
        def replay(self):
            replayed.append(self.sizes)
            self.ks.several(self.sizes)
    monkeypatch.setattr(KernelSteps, 'record', lambda self, sizes: made.append(sizes) or Graph(self, sizes))
    how = lambda l: (l.fit_one_cycle(2, 0.02, wd=0.1), l.fit(1, 0.01))
    ref,new = fit(False, how=how),fit(True, how=how, per=3)
    whole,rest = (64,)*3,(16,)
    assert made==[whole,rest] and replayed==[whole]+[whole,whole,rest]*2
    for p,q in zip(ref.model.parameters(), new.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    weighted = fit(True, weights=True, how=how, per=3)
    assert len(_kept[weighted.model].graphs)==2, 'steps without weights are not kept beside those with'

@runs
def test_pieces_under_way_count_when_a_fit_is_interrupted(monkeypatch):
    "Events stood in for: the second piece's is interrupted while four have been launched"
    from cfext.kernels import KernelSteps
    heard = []
    class Event:
        def __init__(self, b): self.b = b
        def synchronize(self):
            heard.append(self.b)
            if self.b==4 and len(heard)==2: raise KeyboardInterrupt
    def listen(self, a, b):
        self.ahead = 2
        if self.losses.is_cuda: self.heard[a:b] = self.losses[a:b].cpu()
        self.waiting.append((b, Event(b)))
    monkeypatch.setattr(KernelSteps, 'listen', listen)
    how = lambda l: l.fit(1, 0.01)
    def broken(l):
        with pytest.raises(KeyboardInterrupt): how(l)
    class Stop(Callback):
        order = 60 # after the recorder
        def after_batch(self):
            if self.training and self.iter==7: raise CancelFitException
    new,ref = fit(True, how=broken, per=2, bs=32),fit(False, how=how, bs=32, cbs=Stop())
    assert heard==[2,4,6,8] and len(new.recorder.losses)==8 and new.train_iter==8
    torch.testing.assert_close(*(torch.stack([o.as_subclass(torch.Tensor).cpu() for o in l.recorder.losses]) for l in (new,ref)), rtol=1e-5, atol=1e-6)
    for p,q in zip(ref.model.parameters(), new.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        assert ref.opt.state[p]['step']==new.opt.state[q]['step']==8

@pytest.mark.skipif(inside, reason='is not interpreted')
@pytest.mark.parametrize('F,rows,flags,clear', [(50,4,(True,True,False),True), (50,16,(True,True,True),True), (400,1,(False,True,False),False), (1,256,(False,False,True),False)])
def test_compiles_for_a_gpu_that_is_not_here(F, rows, flags, clear):
    "By Triton's own compiler and assembler, for compute capability 9.0"
    import triton
    if not hasattr(triton, 'knobs'): pytest.skip(f'Triton {triton.__version__} is asked in another way')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from cfext.kernels import _adam_kernel,_grad_kernel
    def build(fn, const, **kinds):
        at = {n:j for j,n in enumerate(fn.arg_names)}
        sig = {n: 'constexpr' if n in const else kinds.get(n, '*fp32') for n in at}
        attrs = {(at[n],):[['tt.divisibility',16]] for n,s in sig.items() if s[0]=='*' or n=='stride'}
        return triton.compile(ASTSource(fn, sig, {(at[n],):v for n,v in const.items()}, attrs), target=GPUTarget('cuda', 90, 32)).asm
    ints = dict.fromkeys('j m bs n_rows n_steps stride width n0 n1 n2 n3 e0 e1 e2'.split(), 'i32')
    grad = build(_grad_kernel, dict(F=F, WIDE=1<<(F-1).bit_length(), ROWS=rows, **dict(zip(('BIAS','RANGE','WEIGHTS'), flags))), at='*i64', x='*i32', lo='fp32', span='fp32', **ints)
    adam = build(_adam_kernel, dict(K0=0, K1=0, K2=10, K3=10, M0=1, M1=2, M2=0, M3=1, B=1024, CLEAR=clear), at='*i64', **ints)
    assert len(grad['cubin'])>1000 and len(adam['cubin'])>1000
    assert 'st.global.v4' in adam['ptx'], 'whole blocks go in 16 bytes at a time'

@pytest.mark.skipif(inside, reason='is not interpreted')
def test_compiles_once_for_tables_of_all_sizes(monkeypatch):
    "By what Triton looks a compiled kernel up with"
    import triton,cfext.kernels as K
    if not hasattr(triton, 'knobs'): pytest.skip(f'Triton {triton.__version__} is asked in another way')
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    keys = {n: [] for n in ('_grad_kernel','_adam_kernel')}
    class Launch:
        def __init__(self, name, fn): self.name,self.bind = name,create_function_from_signature(fn.signature, fn.params, make_backend(GPUTarget('cuda', 90, 32)))
        def __getitem__(self, grid): return lambda *args, **kwargs: keys[self.name].append(self.bind(*args, **kwargs)[1])
    for n in keys: monkeypatch.setattr(K, n, Launch(n, getattr(K, n)))
    for n_users,n_items,bs,n in ((943,1682,64,1250), (1,16,1,1), (4096,5001,1024,79)):
        ts = lambda: [torch.zeros(*s) for s in ((n_users,50),(n_items,50),(n_users,1),(n_items,1))]
        K.KernelSteps(ts(), ts(), ts(), [0]*4, [1]*4, bs, n*bs, n).launch(0, bs)
    for ks in keys.values(): assert len(ks)==3 and ks[0]==ks[1]==ks[2]
    assert 'wrong here' in K.kernel_ready.__wrapped__('cpu') and keys['_adam_kernel'][3]==keys['_adam_kernel'][0], 'what was tried is what a learner takes'

@runs
@pytest.mark.parametrize('opt_func,by_kernel', [(Adam,2), (partial(Adam, decouple_wd=False),2), (partial(SGD, mom=0.9),0), (RMSProp,0)])
def test_steps_of_any_model(opt_func, by_kernel, monkeypatch):
    "`captured_epoch` with the kernel of Adam and with PyTorch's functions: tables of odd sizes, tensors without decay, more than four of them"
    import cfext.kernels as K
    launched = []
    class Launch:
        def __getitem__(self, grid): return lambda *args, **kwargs: launched.append(grid) or kernel[grid](*args, **kwargs)
    kernel = K._adam_kernel
    monkeypatch.setattr(K, '_adam_kernel', Launch())
    def fitted(**kwargs):
        class Steps(CFLearner):
            def _fast_epoch(self): captured_epoch(self, record=False, **kwargs)
        dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=64, device='cuda' if cuda else 'cpu')
        learn = cf_learner(dls, 'nn', emb_szs=dict(user=7, title=11), config=dict(layers=[13], use_bn=False), y_range=(0.5,5.5), opt_func=opt_func, seed=1, unk_p=0)
        learn.__class__ = Steps
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.02, wd=0.1)
        return learn
    ref,new = fitted(),fitted(apply=K.apply_adam)
    assert len(launched)==by_kernel*2*len(new.dls.train)
    torch.testing.assert_close(*(torch.stack([o.as_subclass(torch.Tensor).cpu() for o in l.recorder.losses]) for l in (new,ref)), rtol=1e-5, atol=1e-6)
    tol = dict(rtol=1e-3, atol=1e-5) if cuda else dict(rtol=1e-5, atol=1e-6)
    for p,q in zip(new.model.parameters(), ref.model.parameters()): torch.testing.assert_close(p, q, **tol)

@runs
def test_gradients_that_an_interrupted_step_has_left_are_not_the_next_one_s(monkeypatch):
    import cfext.kernels as K
    class Broken:
        def __getitem__(self, grid): raise KeyboardInterrupt
    def how(l):
        l.create_opt()
        assert K.kernel_ready(str(l.dls.device)) is None # tried before they break
        with monkeypatch.context() as m:
            m.setattr(K, '_adam_kernel', Broken())
            with pytest.raises(KeyboardInterrupt): l.fit(1, 0.01, reset_opt=False)
        assert any(g.any() for g in K._kept[l.model].grads)
        torch.manual_seed(3)
        l.dls.train._seeds.manual_seed(5)
        l.fit(1, 0.01, reset_opt=False)
    def ref(l):
        l.create_opt()
        torch.manual_seed(3)
        l.dls.train._seeds.manual_seed(5)
        l.fit(1, 0.01, reset_opt=False)
    for p,q in zip(fit(True, how=how).model.parameters(), fit(False, how=ref).model.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

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

def member(seed, cls=DotProductBias, y_range=(0.5,5.5), rows=None, weights=False, split=None, cbs=None, freeze=None, **kwargs):
    frame = df.assign(w=df.index%7+1.) if weights else df
    n = (200,317,262,183)[seed] if rows is None else rows
    dls = CFDataLoaders.from_df(frame, item_name='title', seed=seed, bs=61, device='cuda' if cuda else 'cpu', splitter=lambda o: (np.arange(n),np.arange(400,500)), **({'weight_name':'w'} if weights else {}))
    learn = cf_learner(dls, cls, n_factors=5, y_range=y_range, seed=seed, unk_p=0, config=dict(mean=3+seed/4) if cls is DotProductBias else {}, cbs=cbs(seed) if cbs else None, **({'splitter':split} if split else {}), **kwargs)
    learn.remove_cbs([ProgressCallback])
    if freeze or split: learn.create_opt()
    if freeze: getattr(learn.model, freeze).requires_grad_(False)
    if split: learn.opt.set_hyper('wd', [0.,0.1+seed])
    return learn

own = [dict(lr_max=0.02, wd=0.1), dict(lr_max=0.01, wd=0.4), dict(lr_max=0.03, wd=0.)]

@pytest.fixture
def ways(monkeypatch):
    "How full batches were run, as `fit_many` picks it on a GPU"
    pick,res = _Together.pick,[]
    def picked(self):
        dev,self.device = self.device,SimpleNamespace(type='cuda')
        try: res.append(pick(self))
        finally: self.device = dev
        return res[-1]
    monkeypatch.setattr(_Together, 'pick', picked)
    return res

def fitted_alone(mk, s, fits):
    with no_random(s, reproducible=False):
        learn = mk(s)
        learn.fast = False
        with learn.no_bar(),learn.no_logging():
            for f in fits: f(learn)
    return learn

def close(new, ref):
    a,b = (torch.stack([o.as_subclass(torch.Tensor).cpu() for o in l.recorder.losses]) for l in (new,ref))
    assert a.shape==b.shape
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(new.recorder.values), torch.tensor(ref.recorder.values), rtol=1e-5, atol=1e-6)
    for p,q in zip(new.model.parameters(), ref.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        s,t = new.opt.state[p],ref.opt.state[q]
        assert s['step']==t['step']
        for k in ('grad_avg','sqr_avg'): torch.testing.assert_close(s[k], t[k], rtol=1e-3, atol=1e-5)

many = dict(usual={}, weights=dict(weights=True), no_range=dict(y_range=None), no_bias=dict(cls=DotProduct), neither=dict(cls=DotProduct, y_range=None),
            l2=dict(opt_func=partial(Adam, decouple_wd=False)), whole_batches=dict(rows=183), one_step=dict(rows=62))

@runs
@pytest.mark.parametrize('case', many)
def test_many_equal_each_alone(case, ways):
    "Rows of different number, initial weights, offsets, learning rates and decays of their own"
    mk = partial(member, **many[case])
    for s,l in enumerate(fit_many(mk, 2, n=3, each=own)): close(l, fitted_alone(mk, s, [lambda o: o.fit_one_cycle(2, **own[s])]))
    assert ways==['kernels']

@runs
def test_many_of_two_groups_and_two_fits(ways):
    mk = partial(member, split=split, weights=True)
    learns = fit_many(mk, 2, slice(1e-3, 2e-2), n=3)
    fit_many(learns, 1, 0.01, fit='fit_flat_cos')
    for s,l in enumerate(learns): close(l, fitted_alone(mk, s, [lambda o: o.fit_one_cycle(2, slice(1e-3, 2e-2)), lambda o: o.fit_flat_cos(1, 0.01)]))
    assert ways==['kernels']*2

@runs
def test_many_of_which_one_leaves(ways):
    mk = partial(member, cbs=lambda s: EarlyStoppingCallback(min_delta=9., patience=0) if s==1 else None)
    learns = fit_many(mk, 3, n=3, each=own)
    assert [len(l.recorder.values) for l in learns]==[3,2,3]
    for s,l in enumerate(learns): close(l, fitted_alone(mk, s, [lambda o: o.fit_one_cycle(3, **own[s])]))
    assert ways==['kernels']*2

@runs
def test_many_grown_and_frozen_between_fits(ways, capsys):
    "Tables that have not made the same number of steps"
    mk = partial(member, freeze='user_factors')
    def thaw(o): o.model.user_factors.requires_grad_(True)
    learns = fit_many(mk, 1, 0.02, n=2)
    assert 'some of its tables are frozen' in capsys.readouterr().out
    for l in learns: thaw(l)
    fit_many(learns, 1, 0.02)
    for s,l in enumerate(learns): close(l, fitted_alone(mk, s, [lambda o: o.fit_one_cycle(1, 0.02), thaw, lambda o: o.fit_one_cycle(1, 0.02)]))
    assert ways==['recorded','kernels']

@runs
@pytest.mark.parametrize('mk,why', [(dict(loss_func=L1LossFlat()), 'not MSELossFlat'), (dict(cls='nn', y_range=(0,6)), 'the model is CollabNN')])
def test_many_that_kernels_cannot_train(mk, why, ways, capsys):
    fit_many(partial(member, **mk), 1, 0.01, n=2)
    out = capsys.readouterr().out
    assert ways==['recorded'] and out.count('not run by kernels')==1 and why in out

@runs
def test_a_mistake_in_one_model_is_seen(ways, monkeypatch):
    "The comparison fails where a member gets its neighbour's offset"
    from cfext.stacked import StackedAdam
    made = StackedAdam.kernel_steps
    def wrong(self, *args):
        ks = made(self, *args)
        ks.offset = ks.offset.roll(1)
        return ks
    monkeypatch.setattr(StackedAdam, 'kernel_steps', wrong)
    learns = fit_many(member, 1, n=3, each=own)
    with pytest.raises(AssertionError, match='not close'): close(learns[1], fitted_alone(member, 1, [lambda o: o.fit_one_cycle(1, **own[1])]))

@pytest.mark.cuda
@pytest.mark.skipif(not cuda, reason='needs a GPU')
def test_is_recorded():
    from cfext.kernels import _kept
    learn = fit(True, per=3)
    assert len(_kept[learn.model].graphs)==2 and all(_kept[learn.model].graphs.values())

others = dict(nn=lambda: dict(model='nn', config=dict(layers=[13], use_bn=False), y_range=(0.5,5.5)), bn=lambda: dict(model='nn', y_range=(0.5,5.5)), bpr=lambda: dict(loss_func=BPRLoss(), cbs=Negatives(seed=4)))

@pytest.mark.cuda
@pytest.mark.skipif(not cuda, reason='needs a GPU')
@pytest.mark.parametrize('case', others)
def test_other_models_are_recorded_with_the_kernel_of_adam(case, monkeypatch):
    "As a learner on a GPU runs them, against steps called one by one; after fastai's loop, and after a recording that failed, too"
    import cfext.kernels as K
    from cfext.capture import _recording
    applied,recorded,apply = [],[],K.apply_adam
    monkeypatch.setattr(K, 'apply_adam', lambda *args: applied.append(1) or apply(*args))
    class Look(Callback):
        def after_train(self): recorded.append(getattr(getattr(self.learn, '_step_graph', None), 'graph', None) is not None)
    class Called(CFLearner):
        def _fast_epoch(self): lean_epoch(self)
    def made():
        dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=32, device='cuda' if cuda else 'cpu')
        return cf_learner(dls, **{'n_factors':5, **others[case]()}, seed=1, unk_p=0)
    def fitted(learn):
        torch.manual_seed(3)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.02, wd=0.1, cbs=Look())
        return torch.stack([o.as_subclass(torch.Tensor).cpu() for o in learn.recorder.losses])
    new,ref = made(),made()
    ref.__class__ = Called
    torch.testing.assert_close(fitted(new), fitted(ref), rtol=2e-2 if case=='bn' else 1e-3, atol=1e-4) # a bias before a batch normalisation has rounding errors for a gradient
    assert recorded==[True,True,False,False] and applied
    new.fast = False
    fitted(new)
    new.fast,p = None,next(new.model.parameters())
    with pytest.raises(RuntimeError, match='captur'):
        with _recording(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()): p.sum().item()
    torch.cuda.empty_cache()
    recorded.clear()
    assert fitted(new).isfinite().all() and recorded==[True,True]

@pytest.mark.cuda
@pytest.mark.skipif(not cuda, reason='needs a GPU')
def test_many_are_recorded(monkeypatch):
    ends,epoch = [],_Together.epoch
    def seen(self, tick):
        epoch(self, tick)
        ends.append((self.way, all(self.device_steps.graphs.values())))
    monkeypatch.setattr(_Together, 'epoch', seen)
    mk = partial(member, rows=400)
    for s,l in enumerate(fit_many(mk, 2, n=3, each=own)): close(l, fitted_alone(mk, s, [lambda o: o.fit_one_cycle(2, **own[s])]))
    assert ends==[('kernels',False),('kernels',True)]
