"Steps as a GPU would record them, on tensors that have a device and no numbers: all lie on one device, and nothing is asked of it"
from functools import partial

import pytest,torch
from torch._subclasses.fake_tensor import DataDependentOutputException,FakeTensorMode
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.fp16 import MixedPrecision,AMPMode
from fastai.callback.training import GradientClip
from fastai.optimizer import *
from cfext import *
from cfext.capture import StepGraph,capture_hurdle

pytestmark = pytest.mark.usefixtures('quiet')
gpu = torch.device('cuda:0')

def there(t): return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=gpu)

def move(o, new):
    "Put the tensors that `o` holds onto the other device; `new` remembers parameters"
    if isinstance(o, torch.nn.Parameter): return new.setdefault(o, torch.nn.Parameter(there(o), o.requires_grad))
    if isinstance(o, torch.Tensor): return there(o)
    if isinstance(o, tuple): return tuple(move(v, new) for v in o)
    if isinstance(o, dict): o.update({k: move(v, new) for k,v in o.items()})
    elif isinstance(o, list): o[:] = [move(v, new) for v in o]
    elif type(o).__module__.startswith('cfext') and id(o) not in new:
        new[id(o)] = o
        held = {k: move(v, new) for k,v in vars(o).items() if k not in ('learn','gen','_seeds','classes')}
        o.__dict__.update(held)
    return o

class Elsewhere(Callback):
    "Before the first batch, move the learner and run two steps"
    order = 99
    def before_train(self):
        learn,new = self.learn,{}
        learn.dl = learn.dls.train
        assert capture_hurdle(learn) is None
        with FakeTensorMode():
            for m in learn.model.modules():
                for d in (m._parameters,m._buffers): d.update({k: move(v, new) for k,v in d.items()})
                vars(m).update({k: there(v) for k,v in vars(m).items() if isinstance(v, torch.Tensor)})
            learn.opt.param_lists = type(learn.opt.param_lists)([[new[p] for p in ps] for ps in learn.opt.param_lists])
            state = {new[p]: move(dict(s), new) for p,s in learn.opt.state.items() if p in new}
            learn.opt.state.clear()
            learn.opt.state.update(state)
            for cb in learn.cbs: move(cb, new)
            for dl in learn.dls.loaders: move(dl.dataset, new).x
            learn.dls.device = gpu
            sg = StepGraph(learn)
            sg.nums = torch.empty(len(learn.dl), len(sg.stepper.groups), len(sg.stepper.columns), device=gpu)
            for _ in range(2): sg.step()
            assert sg.losses.device==gpu and all(p.device==gpu for p in learn.model.parameters())
        raise CancelFitException

def plain(loss): return lambda pred,y: loss(pred.view(-1), y.view(-1)) # fastai's classes of losses make tensors of a class of their own, which these can't be

def learner(loss=None, model='dot', ranks=False, weights=False, **kwargs):
    df = synth_ratings(60, 40, 900)
    if weights: df['w'] = 1.+df.index%3
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None if ranks else 'rating', seed=1, bs=64, device='cpu', **({'weight_name':'w'} if weights else {}))
    loss = loss if ranks else plain(loss or torch.nn.MSELoss())
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
