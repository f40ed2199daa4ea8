"What a GPU would run. Steps as it would record them, on tensors without numbers: all lie on one device, and nothing is asked of it. The rest with a stand-in: the answers are those of the processor"
import threading
from contextlib import contextmanager,nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np,pandas as pd,pytest,torch
import torch._dynamo # before the stand-in, which it would look at
from torch._subclasses.fake_tensor import DataDependentOutputException,FakeTensorMode
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.fp16 import MixedPrecision,AMPMode
from fastai.callback.training import GradientClip
from fastai.losses import BaseLoss,MSELossFlat
from fastai.optimizer import *
from fastai.torch_core import get_random_states,no_random
from fastcore.basics import noop
import cfext.capture,cfext.data,cfext.ids,cfext.kernels,cfext.learner,cfext.many
from cfext import *
from cfext.capture import StepGraph,capture_hurdle
from cfext.many import _go_on,_Member,_Replay,_Together
from cfext.negatives import SeenItems
from stand_in import StandIn,gpu,move,move_learner,there

if torch.cuda.is_available(): pytest.skip('a GPU is here, where the tests marked `cuda` run', allow_module_level=True)
if not hasattr(torch._C, '_ensureCUDADeviceGuardSet'): pytest.skip(f'PyTorch {torch.__version__} cannot leave the driver out', allow_module_level=True)
pytestmark = pytest.mark.usefixtures('quiet')
def nowhere(t): return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=gpu)

class Elsewhere(Callback):
    "Before the first batch, move the learner and run two steps"
    order = 99
    def before_train(self):
        learn = self.learn
        learn.dl = learn.dls.train
        assert capture_hurdle(learn) is None
        with FakeTensorMode():
            new = move_learner(learn, nowhere)
            learn.opt.param_lists = type(learn.opt.param_lists)([[new[p] for p in ps] for ps in learn.opt.param_lists])
            state = {new[p]: move(dict(s), new, nowhere) for p,s in learn.opt.state.items() if p in new}
            learn.opt.state.clear()
            learn.opt.state.update(state)
            sg = StepGraph(learn)
            sg.nums = torch.empty(len(learn.dl), len(sg.stepper.groups), len(sg.stepper.columns), device=gpu)
            for _ in range(2): sg.step()
            assert sg.losses.device==gpu and all(p.device==gpu for p in learn.model.parameters())
        raise CancelFitException

def plain(loss): return lambda pred,y: loss(pred.view(-1), y.view(-1)) # fastai's classes of losses make tensors of a class of their own, which these can't be

def learner(loss=None, model='dot', ranks=False, weights=False, flat=False, **kwargs):
    df = synth_ratings(60, 40, 900)
    if weights: df['w'] = 1.+df.index%3
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None if ranks else 'rating', seed=1, bs=64, device='cpu', **({'weight_name':'w'} if weights else {}))
    if not (ranks or flat): loss = plain(loss or torch.nn.MSELoss())
    return cf_learner(dls, model, n_factors=5, loss_func=loss, y_range=None if ranks else (0,5.5), **kwargs)

cases = dict(adam={}, l2=dict(opt_func=partial(Adam, decouple_wd=False)), sgd=dict(opt_func=partial(SGD, mom=0.9)), rms=dict(opt_func=RMSProp), nn=dict(model='nn'),
             l1=dict(loss=torch.nn.L1Loss()), clip=dict(cbs=GradientClip(0.1)), bf16=dict(cbs=MixedPrecision(AMPMode.BF16)))
losses = dict(bpr=BPRLoss, hinge=HingeLoss, warp=WARPLoss, bce=BCELoss, sampled=SampledSoftmaxLoss, full=FullSoftmaxLoss)
for k,l in losses.items(): cases[k] = dict(ranks=True, loss=l())
for how in ('popularity','batch','hard'): cases[how] = dict(ranks=True, loss=BPRLoss(), cbs=Negatives(None if how=='batch' else 5, how))
cases.update(shared=dict(ranks=True, loss=SampledSoftmaxLoss(), cbs=Negatives(5, shared=True)), cosines=dict(ranks=True, loss=FullSoftmaxLoss(), model=CosineProduct),
             ccl=dict(ranks=True, loss=CCLLoss(), model=CosineProduct), weights=dict(ranks=True, loss=BPRLoss(), weights=True))

@pytest.fixture
def no_backward(monkeypatch):
    "The engine of gradients wants a real device: each parameter gets some"
    made = []
    def backward(loss):
        for p in made[0].model.parameters(): p.grad = torch.empty_like(p)
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    return made

@pytest.mark.parametrize('case', cases)
def test_a_step_asks_nothing_of_the_device(case, no_backward):
    learn = learner(**cases[case])
    no_backward.append(learn)
    learn.add_cb(Elsewhere())
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 1e-2)

def test_such_a_question_is_noticed(no_backward):
    class Asks(Callback):
        on_device = True
        def after_loss(self): self.loss.item()
    learn = learner()
    no_backward.append(learn)
    learn.add_cbs([Asks(), Elsewhere()])
    with pytest.raises(DataDependentOutputException), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)

def test_so_is_a_tensor_elsewhere(no_backward):
    class Far(Callback):
        on_device = True
        def before_step(self): self.learn.loss = self.loss+torch.ones(64) # on the processor
    learn = learner()
    no_backward.append(learn)
    learn.add_cbs([Far(), Elsewhere()])
    with pytest.raises(RuntimeError, match='device'), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)

@pytest.fixture
def stand_in(monkeypatch):
    "What makes tensors or asks the driver in C, and what fastai gives the class of its argument, is led around"
    Generator,tensor,as_tensor = torch.Generator,torch.tensor,torch.as_tensor
    def maker(make):
        def f(data, *args, device=None, **kwargs):
            t = data if isinstance(data, torch.Tensor) else make(data, *args, **kwargs)
            return t.to(device) if isinstance(data, torch.Tensor) and device is not None else there(t) if device is not None and torch.device(device).type=='cuda' else t
        return f
    for o,name,v in ((torch.cuda,'_lazy_init',lambda: None), (torch,'Generator',lambda device='cpu': Generator()), (torch,'tensor',maker(tensor)), (torch,'as_tensor',maker(as_tensor)),
                     (torch.nn.Module,'to',lambda self, *args, **kwargs: self), (BaseLoss,'__call__',lambda self, x, y, **kwargs: self.func(x.view(-1), y.view(-1))),
                     (cfext.ids,'to_cpu',lambda t: t.cpu()), (cfext.ids,'to_detach',lambda t: t.detach().cpu()),
                     (cfext.capture,'_aside',lambda device: nullcontext()), (cfext.kernels,'kernel_ready',lambda device: 'nothing runs kernels here'), (StepGraph,'record',lambda self: None)):
        monkeypatch.setattr(o, name, v)
    torch._C._ensureCUDADeviceGuardSet()

def same(a, b):
    if isinstance(a, pd.DataFrame): return pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)
    if isinstance(a, (tuple,list)):
        assert len(a)==len(b)
        return [same(x, y) for x,y in zip(a, b)]
    if isinstance(a, torch.Tensor): return torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a, b, rtol=1e-4)

def item(l, i): return l.dls.classes['title'][i]
def rows(l): return pd.DataFrame(dict(user=[900,900,901], title=[item(l, i) for i in (1,2,3)], rating=[4.,3.,5.]))
def trained(l):
    l.fit_one_cycle(2, 0.01)
    return list(l.recorder.losses),list(l.model.parameters()),l.recorder.values
answers = dict(fit=trained, recommend=lambda l: l.recommend(k=3), candidates=lambda l: l.recommend([1,2], k=3, candidates=[item(l, i) for i in range(1,9)]), diverse=lambda l: l.recommend([1,2], k=3, diversity=0.5),
               similar=lambda l: l.similar_items(k=2), evaluate=lambda l: pd.DataFrame(l.evaluate(k=5, bar=False)), predict=lambda l: l.predict((1,item(l, 1))), preds=lambda l: l.get_preds(),
               validate=lambda l: list(l.validate()), fold_in=lambda l: l.fold_in(rows(l)).recommend([900,901], k=2), partial_fit=lambda l: l.partial_fit(rows(l)).recommend([1,900], k=2),
               explain=lambda l: l.explain(1, item(l, 1)), biases=biases, ensemble=lambda l: Ensemble([l,l]).get_preds())
models = dict(dot=({},set()), weights=(dict(weights=True),{'partial_fit'}), nn=(dict(model='nn'),{'fit','fold_in','partial_fit','explain','biases','similar'}),
              softmax=(dict(ranks=True, loss=FullSoftmaxLoss, model=CosineProduct),{'partial_fit','predict','preds','explain','biases','ensemble'}))

@pytest.mark.parametrize('model,answer', [(m,a) for m,(_,no) in models.items() for a in answers if a not in no])
def test_answers_are_the_processor_s(model, answer, stand_in):
    kwargs = models[model][0]
    def make():
        torch.manual_seed(0)
        loss = kwargs['loss']() if 'loss' in kwargs else MSELossFlat()
        learn = learner(**{**kwargs, 'loss':loss}, flat=True, seed=0, unk_p=0)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
        learn.opt = None
        return learn
    def ask(learn):
        torch.manual_seed(1)
        with learn.no_bar(),learn.no_logging(): return answers[answer](learn)
    near,far = make(),make()
    expected = ask(near)
    with StandIn():
        move_learner(far)
        assert all(p.is_cuda for p in far.model.parameters())
        same(expected, ask(far))

streamed = dict(plain={}, weights=dict(weights=True), nn=dict(model='nn'), bpr=dict(ranks=True, loss=BPRLoss), popularity=dict(ranks=True, loss=SampledSoftmaxLoss, cbs=lambda: Negatives(5, 'popularity', seed=0)),
                shared=dict(ranks=True, loss=BPRLoss, cbs=lambda: Negatives(5, shared=True, seed=0)), full=dict(ranks=True, loss=FullSoftmaxLoss))

@pytest.mark.parametrize('case', streamed)
def test_rows_that_stay_on_the_host(case, stand_in, monkeypatch, capsys):
    "They take the written-out step where there is one, without the processor's way of drawing negatives"
    took = []
    for f in (factor_epoch,lean_epoch): monkeypatch.setattr(cfext.learner, f.__name__, lambda learn, f=f: took.append(f) or f(learn))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: 'own')
    monkeypatch.setattr(cfext.data, '_ahead', lambda f, xs, stream: map(f, xs)) # whose thread the stand-in does not reach
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    monkeypatch.setattr(SeenItems, 'draw', lambda self, users, n, gen=None: self.around(users, torch.rand(len(users), n, generator=gen, dtype=torch.float64).to(users.device)))
    def ask(move=noop):
        kwargs = streamed[case]
        learn = learner(**{**kwargs, 'loss':kwargs.get('loss', MSELossFlat)(), 'cbs':kwargs.get('cbs', noop)()}, flat=True, seed=0, unk_p=0)
        for dl in learn.dls.loaders: dl.resident = False
        move(learn)
        torch.manual_seed(1)
        with learn.no_bar(),learn.no_logging(): return trained(learn)
    near = ask()
    with StandIn(): same(near, ask(move_learner))
    assert took==[lean_epoch if case=='nn' else factor_epoch]*4 and capsys.readouterr().out.count('not captured: its rows stay in host memory')==1

def test_closed_forms_are_solved_in_larger_blocks(stand_in, monkeypatch):
    "Each block is waited for, and a GPU has the room: 80 MiB or 1.3 GiB of systems, 64 MiB or 1 GiB of histories"
    sizes,solve,f = [],torch.linalg.cholesky,64
    monkeypatch.setattr(torch.linalg, 'cholesky', lambda A: sizes.append(A.shape[0]) or solve(A))
    gen = torch.Generator().manual_seed(0)
    starts,others,Q = torch.arange(0, 12_001, 10),torch.randint(0, 90, (12_000,), generator=gen),torch.randn(90, f, generator=gen)
    def ask(put): return solve_rows(put(starts), put(others), put(Q), 0.1, 0.02)
    near = ask(noop)
    with StandIn(): same(near, ask(there))
    assert sizes==[885,315,1200]
    users = []
    def rows(us):
        users.append(len(us))
        return torch.zeros(1, 500, device=us.device)
    for at in ('cpu',gpu):
        with StandIn(): EASE.gram(SimpleNamespace(n_users=80_000, n_items=500, items=torch.zeros(1, device=at), _rows=rows))
    assert users==[33_554,33_554,12_892,80_000]

def test_threads_work_on_the_caller_s_stream(monkeypatch):
    "One begins on the default stream, where it would not wait for what the caller has under way"
    seen = []
    for n,f in dict(is_initialized=lambda: True, current_stream=lambda device=None: 'own', set_stream=lambda s: seen.append((s, threading.get_ident()))).items(): monkeypatch.setattr(torch.cuda, n, f)
    assert list(cfext.data._ahead(lambda x: (x, threading.get_ident()), [1,2], 'own'))==[(1,seen[0][1]),(2,seen[0][1])]
    fits = []
    with no_random(0): rng = get_random_states()
    m = _Member(learner(), lambda: fits.append(threading.get_ident()), rng)
    _go_on([m])
    assert m.err is None and seen[0][0]==seen[1][0]=='own' and fits==[seen[1][1]] and all(t!=threading.get_ident() for _,t in seen)

def test_rows_are_stepped_by_numbers(monkeypatch):
    "A tensor of numbers of the host has to be copied to the device, which waits for it"
    ps = [torch.nn.Parameter(torch.randn(9, k)) for k in (3,1)]
    opt = RowAdam(ps, lr=0.1)
    def made(*args, **kwargs): raise AssertionError("a tensor was made of numbers")
    monkeypatch.setattr(torch, 'tensor', made)
    for x in (torch.arange(4),torch.arange(2, 9)):
        for p in ps: p.grad = torch.sparse_coo_tensor(x[None], torch.ones(len(x), p.shape[1]), p.shape, check_invariants=False)
        opt.step()
    opt.flush()
    assert all(p.isfinite().all() for p in ps)

@pytest.mark.parametrize('weights', [False,True])
def test_many_at_once(weights, stand_in, monkeypatch):
    "Steps as they would be recorded"
    aside = []
    @contextmanager
    def other(device):
        aside.append(1)
        try: yield
        finally: aside.pop()
    grads = _Together.grads
    def watched(self, *args):
        assert aside or self.device.type=='cpu', 'autograd would remember the stream of the caller, which cannot be recorded'
        return grads(self, *args)
    monkeypatch.setattr(_Together, 'grads', watched)
    monkeypatch.setattr(cfext.many, '_aside', other)
    monkeypatch.setattr(_Replay, 'record', lambda self: None)
    make = lambda: [learner(MSELossFlat(), weights=weights, flat=True, seed=s, unk_p=0) for s in (1,2)]
    near,far = make(),make()
    fit_many(near, 2, 0.01)
    with StandIn():
        for l in far: move_learner(l)
        fit_many(far, 2, 0.01)
        for a,b in zip(near, far): same(list(a.recorder.losses), list(b.recorder.losses))

def test_the_stand_in_behaves_as_a_gpu(stand_in):
    with StandIn():
        x = torch.arange(6., device=gpu).view(2, 3)
        assert x.is_cuda and x.cpu().device.type=='cpu' and not x.cpu().is_cuda and x.sum().item()==15
        for f in (lambda: x+torch.ones(3), lambda: x@torch.ones(3), lambda: torch.cat([x, torch.ones(1,3)])):
            with pytest.raises(RuntimeError, match='same device'): f()
        with pytest.raises(TypeError, match='Tensor.cpu'): x.numpy()
        x[:,1] = 7.
        assert x.tolist()==[[0.,7.,2.],[3.,7.,5.]]
