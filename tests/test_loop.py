"The lean and the captured loop against fastai's: every loss, every learning rate, every parameter"
import gc
from functools import partial
from itertools import product

import pandas as pd,pytest,torch
from torch import nn
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import *
from fastai.losses import *
from fastai.metrics import mae
from fastai.optimizer import *
from fastcore.all import L,first
from cfext import *
from cfext.capture import StepGraph

del test_overflow # fastai's own, which pytest would take for a test

pytestmark = pytest.mark.usefixtures('quiet')
cuda = pytest.param('cuda', marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')])
paths = ['lean','steps',cuda]
df = synth_ratings(n_users=150, n_items=90, n_ratings=6000)

class Path(CFLearner):
    "A learner that takes the path it is told"
    path_ = 'lean'
    def _fast_epoch(self):
        if self.path_=='lean': return lean_epoch(self)
        if self.path_=='written':
            assert factor_hurdle(self) is None
            return factor_epoch(self)
        assert capture_hurdle(self) is None
        return captured_epoch(self, record=self.path_=='cuda')

def split(model): return [[model.user_factors,model.user_bias],[model.item_factors,model.item_bias]]

def make(path, opt_func=Adam, bs=64, cls=DotProductBias, drop_last=False, weights=False, cbs=None, unk_p=0., loss_func=None, y_range=(0.5,5.5), by_user=False, **kwargs):
    dev = 'cuda' if path=='cuda' else 'cpu'
    frame = df.assign(w=(df.index%7+1.)) if weights else df
    dls = CFDataLoaders.from_df(frame, item_name='title', seed=42, bs=bs, device=dev, **({'weight_name':'w'} if weights else {}))
    dls.train.drop_last,dls.train.by_user = drop_last,by_user
    torch.manual_seed(0)
    learn = cf_learner(dls, cls, n_factors=5, y_range=y_range, opt_func=opt_func, seed=1, unk_p=unk_p, loss_func=loss_func, cbs=cbs and cbs(), **kwargs)
    if path=='fastai': learn.fast = False
    else: learn.__class__,learn.path_ = Path,path
    return learn

def fit(path, how=lambda l: l.fit_one_cycle(2, 0.02, wd=0.1), **kwargs):
    learn = make(path, **kwargs)
    torch.manual_seed(3)
    with learn.no_bar(),learn.no_logging(): how(learn)
    return learn

def same(how=lambda l: l.fit_one_cycle(2, 0.02, wd=0.1), path='lean', rtol=1e-5, atol=None, **kwargs):
    "Fit on both paths and compare what is left"
    dev = 'cuda' if path=='cuda' else 'cpu'
    ref = fit('fastai' if dev=='cpu' else 'lean', how, **kwargs) if dev=='cpu' else _cuda_ref(how, **kwargs)
    new = fit(path, how, **kwargs)
    a,b = (torch.stack([o.as_subclass(torch.Tensor) for o in l.recorder.losses]).cpu() for l in (ref,new))
    assert a.shape==b.shape and len(a)
    torch.testing.assert_close(a[:200], b[:200], rtol=rtol, atol=1e-7)
    assert ref.recorder.lrs==pytest.approx(new.recorder.lrs, rel=1e-12)
    assert getattr(ref, 'train_iter', None)==getattr(new, 'train_iter', None)
    assert {k:[float(o) for o in v] for k,v in ref.recorder.hps.items()}=={k:[float(o) for o in v] for k,v in new.recorder.hps.items()} if hasattr(ref.recorder, 'hps') else True
    va,vb = ref.recorder.values[-1],new.recorder.values[-1]
    assert list(va)==pytest.approx(list(vb), rel=2e-3)
    for p,q in zip(ref.model.parameters(), new.model.parameters()): torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-3, atol=atol or max(1e-5, 10*rtol))
    return ref,new

def _cuda_ref(how, **kwargs):
    "fastai's loop on the GPU"
    learn = make('cuda', **kwargs)
    learn.__class__,learn.fast = CFLearner,False
    torch.manual_seed(3)
    with learn.no_bar(),learn.no_logging(): how(learn)
    return learn

opts = dict(adam=Adam, adam_l2=partial(Adam, decouple_wd=False), sgd=SGD, momentum=partial(SGD, mom=0.9), rms=RMSProp, rms_mom=partial(RMSProp, mom=0.9, decouple_wd=False))
scheds = dict(fit=lambda l: l.fit(2, 0.01, wd=0.1), one_cycle=lambda l: l.fit_one_cycle(2, 0.02, wd=0.1), flat_cos=lambda l: l.fit_flat_cos(2, 0.01),
              sgdr=lambda l: l.fit_sgdr(2, 1, lr_max=0.01, cycle_mult=2))

@pytest.mark.parametrize('path', paths)
@pytest.mark.parametrize('opt', opts)
def test_optimizers(opt, path): same(path=path, opt_func=opts[opt])

@pytest.mark.parametrize('path', paths)
@pytest.mark.parametrize('sched', scheds)
def test_schedules(sched, path): same(scheds[sched], path)

@pytest.mark.parametrize('path', paths)
@pytest.mark.parametrize('bs,drop_last', [(64,False),(64,True),(37,False),(4799,False),(4801,False),(10_000,False)])
def test_last_batch(path, bs, drop_last): same(path=path, bs=bs, drop_last=drop_last)

@pytest.mark.parametrize('path', paths)
def test_discriminative_lrs(path): same(lambda l: l.fit_one_cycle(2, slice(1e-3, 1e-2)), path, splitter=split)

@pytest.mark.parametrize('path', paths)
def test_wd_per_group(path):
    def how(l):
        l.create_opt()
        l.opt.set_hyper('wd', [0.,0.3])
        l.fit_one_cycle(2, 0.02)
    same(how, path, splitter=split)

@pytest.mark.parametrize('path', paths)
def test_frozen_group(path):
    def how(l):
        l.create_opt()
        l.opt.freeze_to(-1)
        l.fit_one_cycle(1, 0.02)
        l.opt.unfreeze() # `learn.unfreeze` would forget the averages too
        l.fit_one_cycle(2, slice(1e-3, 1e-2))
    ref,new = same(how, path, splitter=split)
    count = lambda l: [l.opt.state[p]['step'] for ps in l.opt.param_lists for p in ps]
    assert count(ref)==count(new) and len(set(count(ref)))==2

@pytest.mark.parametrize('path', paths)
def test_gradient_clip(path):
    plain = fit('lean')
    _,new = same(path=path, cbs=lambda: GradientClip(0.05))
    assert not torch.allclose(plain.model.item_bias.cpu(), new.model.item_bias.cpu())

@pytest.mark.parametrize('path', paths)
def test_row_weights(path): same(path=path, weights=True)

@pytest.mark.parametrize('path', paths)
def test_id_dropout(path): same(path=path, unk_p=0.05)

@pytest.mark.parametrize('path', paths)
@pytest.mark.parametrize('model', [DotProduct,CollabNN])
def test_models(path, model):
    "A network with batch normalisation amplifies rounding: weights whose gradient is near zero move by its sign, so only the losses are compared, to 1e-4"
    if model is DotProduct: same(path=path, cls=model)
    else: same(lambda l: l.fit_one_cycle(2, 1e-3), path, rtol=1e-4, atol=1e-2, cls='nn')

@pytest.mark.parametrize('path', paths)
def test_two_fits(path): same(lambda l: (l.fit_one_cycle(1, 0.02), l.fit_flat_cos(2, 0.01)), path)

@pytest.mark.parametrize('path', paths)
def test_fit_after_load(path, tmp_path):
    def how(l):
        l.path = tmp_path
        l.fit_one_cycle(1, 0.02)
        l.save('a')
        l.fit(1, 0.01)
        l.load('a')
        l.fit_one_cycle(1, 0.01)
    same(how, path)

@pytest.mark.parametrize('kw', [dict(unk_p=0.05), dict(weights=True), dict(bs=37), dict(bs=4801), dict(drop_last=True), dict(cls=DotProduct),
                                dict(opt_func=opts['adam_l2'], splitter=split)], ids=lambda kw: '-'.join(kw))
def test_written_out(kw): same(path='written', **kw)

@pytest.mark.parametrize('sched', scheds)
def test_written_out_schedules(sched): same(scheds[sched], 'written')

def test_written_out_frozen():
    def how(l):
        l.create_opt()
        l.opt.freeze_to(-1)
        l.fit_one_cycle(1, 0.02)
        l.opt.unfreeze()
        l.fit_one_cycle(1, slice(1e-3, 1e-2))
    same(how, 'written', splitter=split)

negs = dict(one={}, few=dict(n_neg=3), popular=dict(n_neg=2, how='popularity'), shared=dict(n_neg=9, shared=True), batch=dict(how='batch'), hard=dict(n_neg=2, how='hard'),
            any=dict(seen=False), unseeded=dict(seed=None))

@pytest.mark.parametrize('loss', [BPRLoss,HingeLoss,WARPLoss,BCELoss,SampledSoftmaxLoss])
@pytest.mark.parametrize('neg', negs)
def test_written_out_ranking(loss, neg):
    if loss is SampledSoftmaxLoss and neg=='hard': pytest.skip('it needs probabilities')
    how = lambda l: (l.fit_one_cycle(1, 0.02, wd=0.1), l.fit(1, 0.01))
    same(how, path='written', rtol=1e-4, loss_func=loss(), y_range=None, cbs=lambda: Negatives(**{'seed':4, **negs[neg]}))

@pytest.mark.parametrize('kw', [dict(unk_p=0.05), dict(weights=True), dict(bs=37), dict(bs=4801), dict(drop_last=True), dict(cls=DotProduct), dict(y_range=(0,2))],
                         ids=lambda kw: '-'.join(kw))
def test_written_out_ranking_of(kw):
    same(path='written', rtol=1e-4, **{**dict(loss_func=BPRLoss(), y_range=None, cbs=lambda: Negatives(seed=4)), **kw})

@pytest.mark.parametrize('cls', [DotProduct,DotProductBias,CosineProduct])
@pytest.mark.parametrize('kw', [{}, dict(loss_func=FullSoftmaxLoss(0.5)), dict(unk_p=0.05), dict(weights=True), dict(bs=37), dict(by_user=True), dict(drop_last=True)],
                         ids=lambda kw: '-'.join(kw) or 'plain')
def test_written_out_softmax(cls, kw):
    if cls is DotProductBias and 'loss_func' in kw: pytest.skip("a user's bias gets rounding alone as gradient where the weight is 1")
    how = lambda l: (l.fit_one_cycle(1, 0.02, wd=0.1), l.fit(1, 0.01))
    same(how, path='written', rtol=1e-4, **{**dict(cls=cls, loss_func=FullSoftmaxLoss(0.3, 1.2), y_range=None, cbs=lambda: Negatives(seed=4)), **kw})

def test_users_who_have_seen_everything_have_no_negatives():
    full = pd.DataFrame([(u,i) for u in range(3) for i in range(8)]+[(u,i) for u in range(3,12) for i in range(u%5, 8, 2)], columns=['user','item'])
    ends = []
    for fast in (False,None):
        dls = CFDataLoaders.from_df(full, rating_name=None, valid_pct=0, seed=0, device='cpu', bs=8)
        learn = cf_learner(dls, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(2, seed=0), seed=0, unk_p=0)
        learn.fast = fast
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.05)
        ends.append(learn)
    assert torch.stack(ends[0].recorder.losses).isfinite().all()
    for p,q in zip(*(l.model.parameters() for l in ends)): torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-4) # a user's bias gets rounding alone

def test_only_what_is_known_is_written_out():
    class Mine(DotProductBias):
        def forward(self, x): return super().forward(x)*2
    for kw,why in ((dict(cls=Mine), 'the model is Mine'), (dict(opt_func=SGD), 'not fastai'), (dict(cbs=lambda: GradientClip(1.)), 'gradient_clip'),
                   (dict(loss_func=L1LossFlat()), 'not MSELossFlat'),
                   (dict(loss_func=FullSoftmaxLoss(), cbs=lambda: Negatives()), 'FullSoftmaxLoss')):
        learn = make('lean', **kw)
        learn.dl = learn.dls.train
        learn.create_opt()
        assert why in factor_hurdle(learn)
    learn = make('lean')
    learn.dl,_ = learn.dls.train,learn.create_opt()
    assert factor_hurdle(learn) is None
    learn.model.register_forward_hook(lambda *args: None)
    assert 'plain float32' in factor_hurdle(learn)

def test_bf16_where_there_is_no_gpu():
    same(path='steps', cbs=lambda: MixedPrecision('bf16'))
    same(path='lean', cbs=lambda: MixedPrecision('bf16'))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_bf16(): same(path='cuda', cbs=lambda: MixedPrecision('bf16'), rtol=2e-2)

@pytest.mark.parametrize('path', ['lean','steps'])
def test_an_optimizer_unknown_here(path):
    learn = make('lean', opt_func=RAdam)
    learn.dl = learn.dls.train
    learn.create_opt()
    assert 'radam_step' in capture_hurdle(learn)
    same(path='lean', opt_func=RAdam)

@pytest.mark.parametrize('path', ['lean','steps'])
def test_epoch_callbacks(path, tmp_path):
    "What acts on epochs sees what it sees in fastai's loop"
    def cbs(): return [CSVLogger(tmp_path/'h.csv'), SaveModelCallback(monitor='mae', fname='best'), EarlyStoppingCallback(patience=1, min_delta=1.), ReduceLROnPlateau(patience=1, min_delta=9.)]
    seen = {}
    for p in ('fastai',path):
        l = fit(p, lambda l: (setattr(l, "path", tmp_path), l.fit(4, 0.02)), cbs=cbs, metrics=mae)
        seen[p] = (len(l.recorder.values), [round(float(v), 4) for v in l.recorder.values[-1]], l.opt.hypers[-1]['lr'], (tmp_path/'h.csv').read_text().splitlines()[0])
    assert seen['fastai'][:1]==seen[path][:1] and seen['fastai'][2:]==seen[path][2:]
    assert seen['fastai'][1]==pytest.approx(seen[path][1], rel=2e-3)
    l.recorder.plot_loss(show_epochs=True)

class Bad(nn.Module):
    "A loss that turns into NaN at its eleventh batch"
    def __init__(self):
        super().__init__()
        self.n = 0
    def forward(self, pred, y):
        self.n += 1
        return ((pred-y)**2).mean()*(float('nan') if self.n>10 else 1.)

@pytest.mark.parametrize('path', ['fastai','lean','steps'])
def test_nan(path):
    learn = fit(path, loss_func=Bad(), cbs=lambda: TerminateOnNaNCallback())
    assert len(learn.recorder.losses)==10 and not any(o.isnan() for o in learn.recorder.losses)
    assert len(learn.recorder.lrs)==10

class Stop(Exception): pass

@pytest.mark.parametrize('err', [KeyboardInterrupt, CancelFitException, CancelTrainException, Stop])
@pytest.mark.parametrize('path', ['lean','steps'])
def test_interrupted(path, err):
    "An interrupted fit leaves the learner as fastai leaves it, and it can go on"
    class Trip(nn.Module):
        n = 0
        def forward(self, pred, y):
            self.n += 1
            if self.n==8: raise err()
            return ((pred-y)**2).mean()
    got = {}
    for p in ('fastai',path):
        learn = make(p, loss_func=Trip())
        torch.manual_seed(3)
        with learn.no_bar(),learn.no_logging():
            try: learn.fit(1, 0.01)
            except (KeyboardInterrupt, Stop): pass
            got[p] = len(learn.recorder.losses),len(learn.recorder.lrs),learn.opt.state[learn.model.item_bias]['step'],learn.model.item_bias.detach().clone()
            learn.loss_func = MSELossFlat()
            learn.fit(1, 0.01)
    assert got['fastai'][0]==got[path][0]==7 and got['fastai'][2]==got[path][2]
    torch.testing.assert_close(got['fastai'][3], got[path][3])

class Counts(Callback):
    "How often fastai's own loop ran a batch of validation"
    n,run_train = 0,False
    def after_batch(self): self.n += 1

@pytest.mark.parametrize('kw', [{}, dict(weights=True), dict(cls=CollabNN), dict(cls=DotProduct, y_range=None, loss_func=BPRLoss(), unk_p=0.),
                                dict(cls=CosineProduct, y_range=None, loss_func=FullSoftmaxLoss(0.5))], ids=['dot','weights','nn','bpr','softmax'])
def test_validation(kw, monkeypatch):
    "Loss and metrics of a validation, its last batch and what is left on the learner, without events and with fastai's"
    def validated(fast):
        learn = make('lean', **kw)
        learn.fast,learn.dls.valid.bs,learn.metrics = fast,500,L(AvgMetric(mae)) if 'loss_func' not in kw else L()
        with learn.no_bar(),learn.no_logging():
            learn.fit(1, 0.01)
            torch.manual_seed(5)
            return learn,learn.validate()
    ran = []
    monkeypatch.setattr('cfext.learner.lean_validate', lambda l: (ran.append(l.n_epoch), lean_validate(l)))
    (ref,want),(new,got) = validated(False),validated(None)
    assert len(ran)==2 and len(want)==len(got)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-7)
    assert (ref.iter,ref.n_iter)==(new.iter,new.n_iter) and new.iter>0
    torch.testing.assert_close(new.loss.as_subclass(torch.Tensor), ref.loss.as_subclass(torch.Tensor))
    for a,b in ((ref.pred,new.pred), (ref.xb[0],new.xb[0]), (ref.yb[0],new.yb[0])): torch.testing.assert_close(a, b)

def test_validation_asks_those_who_act_on_its_batches():
    learn = make('lean', cbs=lambda: Counts())
    learn.dls.valid.bs = 500
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.01)
    assert learn.counts.n==2*len(learn.dls.valid)==6
    assert batch_needs(learn)=={} and batch_needs(learn, training=False)=={'counts':['after_batch']}

def test_a_callback_that_needs_each_batch(capsys):
    class Each(Callback):
        def after_batch(self): pass
    learn = make('lean', cbs=lambda: Each())
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.01)
    out = capsys.readouterr().out
    assert out.count("fastai's loop runs")==1 and 'each (after_batch)' in out
    learn.fast = True
    with learn.no_bar(),learn.no_logging(),pytest.raises(ValueError, match='each \\(after_batch\\)'): learn.fit(1, 0.01)

def test_out_of_memory():
    class Big(nn.Module):
        full = True
        def forward(self, pred, y):
            if self.full: raise torch.OutOfMemoryError('CUDA out of memory')
            return ((pred-y)**2).mean()
    learn = make('lean', loss_func=Big())
    with learn.no_bar(),learn.no_logging():
        with pytest.raises(torch.OutOfMemoryError, match='MiB.*smaller `bs`'): learn.fit(1, 0.01)
        learn.loss_func.full = False
        learn.fit(1, 0.01)

def test_losses_of_another_shape():
    "A loss per row is an error on each path, and says so"
    for path in ('fastai','lean','steps'):
        with pytest.raises(RuntimeError, match='scalar|one element|shape'): fit(path, loss_func=lambda p,y: (p-y)**2)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
class TestGpu:
    def test_is_recorded(self):
        learn = make('cuda')
        seen = []
        class Look(Callback):
            def after_train(self): seen.append(self.learn._step_graph.graph is not None)
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.01, cbs=Look())
        assert seen==[True,True] and not hasattr(learn, '_step_graph')
    def test_falls_back(self, capsys):
        class Looks(DotProductBias):
            def forward(self, x): return super().forward(x)*(1. if x.sum().item()>=0 else 2.)
        learn = make('cuda', cls=Looks)
        learn.__class__ = CFLearner
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.01)
        assert capsys.readouterr().out.count('could not be captured')==1 and len(learn.recorder.losses)==2*len(learn.dls.train)
    @pytest.mark.parametrize('aside', [False,True])
    @pytest.mark.parametrize('ranks', [False,True])
    def test_rows_that_are_sent_train_as_those_that_are_there(self, ranks, aside, capsys):
        "By the generator of another device their order is another; on a stream of the caller's too"
        ends = []
        for resident in (True,False):
            dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=64, device='cuda', resident=resident)
            dls.train.block = 640
            learn = cf_learner(dls, n_factors=5, seed=1, **(dict(loss_func=BPRLoss(), cbs=Negatives(seed=4)) if ranks else dict(y_range=(0.5,5.5))))
            own = torch.cuda.Stream() if aside else torch.cuda.current_stream()
            own.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own),learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(3, 0.05, wd=0.1)
            own.synchronize()
            ends.append(learn.recorder.values[-1][1])
        assert ends[0]==pytest.approx(ends[1], rel=0.1) and capsys.readouterr().out.count('not captured: its rows stay in host memory')==1

def test_row_adam(tmp_path):
    "Learns, turns sparse gradients off again, and goes on from a file and after an interruption"
    learn = make('lean', opt_func=RowAdam)
    learn.path = tmp_path
    grads = []
    class Look(Callback):
        on_device = True
        def before_step(self): grads.append(self.model.item_factors.grad.is_sparse)
    with learn.no_bar(),learn.no_logging():
        learn.fit_one_cycle(3, 0.05, wd=0.05, cbs=Look())
        assert all(grads) and len(grads)==3*len(learn.dls.train) and not learn.model.sparse
        assert learn.recorder.values[-1][1]<float(learn.dls.valid_ds.y.var())
        learn.save('a')
        ends = []
        for again in (False,True):
            if again: learn.load('a')
            for gen in (torch.default_generator, learn.dls.train._seeds):
                if gen is not None: gen.manual_seed(5)
            learn.fit(1, 0.01, reset_opt=False)
            ends.append(learn.model.item_factors.detach().clone())
        torch.testing.assert_close(*ends)
        def stop(*args): raise KeyboardInterrupt
        learn.loss_func = stop
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 0.01)
        assert not learn.model.sparse and '_do_epoch_train' not in vars(learn)
        learn.loss_func = MSELossFlat()
        learn.fit(1, 0.01) # goes on after an interruption
        assert not learn.model.sparse
        class Stop(Callback):
            def __init__(self, when): setattr(self, when, lambda: stop())
        for when,fast in product(('before_epoch','before_train','after_train','before_validate','after_epoch','before_step'), (None,False)):
            learn.fast = fast
            with pytest.raises(KeyboardInterrupt): learn.fit(1, 0.01, cbs=Stop(when))
            assert not learn.model.sparse
            Learner(learn.dls, learn.model, loss_func=MSELossFlat(), opt_func=Adam).fit(1, 0.01) # dense gradients
            learn.fit(1, 0.01)
            assert '_do_epoch_train' not in vars(learn)
    with pytest.raises(TypeError, match='has no attribute `sparse`'): cf_learner(learn.dls, 'nn', y_range=(0,5), opt_func=RowAdam).fit(1)

def test_rows_that_stay_in_host_memory():
    "Streamed a block ahead, they train as resident ones do"
    ends = []
    for resident in (True,False):
        dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=64, device='cpu', resident=resident)
        dls.train.block = 640
        learn = cf_learner(dls, n_factors=5, y_range=(0.5,5.5), seed=1, unk_p=0)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.02, wd=0.1)
        ends.append((learn.model.item_factors.detach(), learn.get_preds()[0]))
    for a,b in zip(*ends): torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert 'host memory' in capture_hurdle_of(learn)

def capture_hurdle_of(learn):
    learn.dl = learn.dls.train
    return capture_hurdle(learn)

def test_callbacks_are_asked_as_by_fastai():
    "Each event of a fit reaches those who act on it, in order; those who hear all of them, all; `run` is put back after a fit"
    def made(cls):
        class Own(Callback):
            order = 70
            def before_epoch(self): heard.append(('Own','before_epoch'))
            def after_step(self): heard.append(('Own','after_step'))
            def before_validate(self): self.run = False
            def after_epoch(self): heard.append(('Own','after_epoch'))
        class All(Callback):
            order = 60
            def __call__(self, name): heard.append(('All',name))
        late = Callback()
        late.after_batch = lambda: heard.append(('late','after_batch'))
        dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=200, device='cpu')
        heard,own = [],Own()
        learn = cls(dls, DotProduct(dls.n_users, dls.n_items, 3), loss_func=MSELossFlat(), cbs=[own,All(),late])
        learn.fast = False
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.01)
        return heard,own.run
    (ref,run),(new,run2) = made(Learner),made(CFLearner)
    assert ref==new and run and run2 and {n for n,_ in ref}=={'Own','All','late'} and len(ref)>50
    with pytest.raises(Exception, match='missing nonsense'): make('lean')('nonsense')

@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_of_torch_get_the_schedule(opt):
    "`OptimWrapper` hands out copies of its hyper-parameters"
    learns = []
    for fast in (None,False):
        torch.manual_seed(0)
        learn = make('lean', opt_func=partial(OptimWrapper, opt=opt))
        learn.fast = fast
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 0.1)
        learns.append(learn)
    a,b = learns
    assert a.opt.hypers[0]['lr']==pytest.approx(b.opt.hypers[0]['lr']) and a.opt.hypers[0]['lr']==pytest.approx(a.recorder.lrs[-1])
    for p,q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

def test_a_step_of_ones_own_is_run(capsys):
    class Own(CFLearner):
        def _step(self): pass
    learn = make('lean')
    learn.__class__ = Own
    before = learn.model.item_bias.clone()
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.05)
    assert torch.equal(before, learn.model.item_bias) and 'Own (_step)' in capsys.readouterr().out

def test_a_recording_is_good_for_what_it_was_made_of():
    "Its signature knows parameters and rows by identity, those that the optimizer has and those that it has not"
    learn,seen = make('steps'),[]
    class Look(Callback):
        order = 99 # the optimizer is there
        def before_train(self):
            sg,model,state,ds = StepGraph(learn),learn.model,learn.opt.state,learn.dls.train_ds
            learn.dl = learn.dls.train
            was = sg.signature()
            def moves(what, change, back):
                assert sg.signature()==was
                change()
                seen.append((what, sg.signature()!=was))
                back()
            old,y,dl = model.item_bias,ds.y,learn.dl
            def freeze(a, b):
                a.requires_grad_(False)
                b.requires_grad_(True)
            moves('parameter', lambda: setattr(model, 'item_bias', nn.Parameter(old.detach().clone())), lambda: setattr(model, 'item_bias', old))
            moves('targets', lambda: setattr(ds, 'y', y.clone()), lambda: setattr(ds, 'y', y))
            moves('dataset', lambda: setattr(dl, 'dataset', ds.subset(torch.arange(len(ds)))), lambda: setattr(dl, 'dataset', ds))
            moves('decay', lambda: state[old].update(do_wd=False), lambda: state[old].update(do_wd=True))
            moves('steps', lambda: state[old].update(step=3), lambda: state[old].update(step=0))
            moves('frozen', lambda: old.requires_grad_(False), lambda: old.requires_grad_(True))
            old.requires_grad_(False)
            was = sg.signature()
            moves('another frozen', lambda: freeze(model.user_bias, old), lambda: freeze(old, model.user_bias))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01, cbs=Look())
    assert len(seen)==7 and all(o for _,o in seen), seen

@pytest.mark.parametrize('way', ['stopped','lr_find'])
def test_nothing_of_fastai_s_loop_lives_on_in_a_recording(way):
    "What holds the graph of an earlier step holds its accumulators too, which belong to the stream of that step: none may be recorded"
    def graphs(): return {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.grad_fn is not None}
    gc.collect()
    there,found = graphs(),[]
    class Look(Callback):
        order,on_device = -99,True
        def before_batch(self):
            if self.training: found.append(len(graphs()-there))
    class Stop(Callback):
        def after_step(self): raise CancelFitException
    learn = make('steps', loss_func=BPRLoss(), y_range=None, cbs=lambda: Negatives(seed=4))
    with learn.no_bar(),learn.no_logging():
        learn.fast = False
        learn.fit(1, 0.01, cbs=Stop()) if way=='stopped' else learn.lr_find(show_plot=False, num_it=5)
        gc.collect()
        assert graphs()-there
        learn.fast = None
        learn.fit(1, 0.01, cbs=Look())
    assert len(found)==len(learn.dls.train) and found[0]==0 and found[1]>0, found[:3]

def test_a_recording_that_fails_is_put_back(monkeypatch):
    from contextlib import contextmanager
    from cfext.capture import _recording
    class Gen:
        def clone_state(self): return self,'fresh'
        def graphsafe_set_state(self, o): put.append(o)
    @contextmanager
    def graph(g, **kwargs):
        try: yield
        except BaseException as e: raise RuntimeError("operation failed due to a previous error during capture") from e
    def told(dev, pool): put.append('ended')
    def knows(dev, pool): raise RuntimeError("not currently recording to mempool_id")
    put,gens,p = [],(Gen(),Gen()),torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(torch._C, '_cuda_releasePool', lambda dev, pool: put.append('released'))
    p.grad = torch.ones(2)
    for n,f in dict(graph=graph, current_stream=lambda: 'outer', set_stream=put.append, current_device=lambda: 0, default_generators=gens[:1]).items(): monkeypatch.setattr(torch.cuda, n, f)
    with _recording(None, [p], gens[1:]): pass
    assert put==[] and p.grad is not None
    for err,end in product((RuntimeError("operation not permitted when stream is capturing"), KeyboardInterrupt()), (told,knows)):
        monkeypatch.setattr(torch._C, '_cuda_endAllocateToPool', end)
        p.grad,put[:] = torch.ones(2),[]
        with pytest.raises(type(err)) as raised:
            with _recording(None, [p], gens[1:]): raise err
        assert raised.value is err, 'not what ending the capture makes of it'
        assert put==['outer', *(['ended','released'] if end is told else []), *((g,'fresh') for g in gens)] and p.grad is None

@pytest.mark.parametrize('cb', [lambda: GradientAccumulator(200), lambda: GradientAccumulator(3, by='batches', log='window'), lambda: [GradientAccumulator(150), GradientClip(0.01)],
                                lambda: EMA(), lambda: [GradientAccumulator(200), MixedPrecision(amp_mode=AMPMode.BF16)]])
def test_callbacks_that_decide_in_python(cb, capsys):
    "Windows and averages are those of fastai's loop, whose place the lean one takes; a recording is told of them"
    learns = same(cbs=cb, opt_func=Adam, rtol=2e-2 if isinstance(cb(), list) and len(cb())>1 and isinstance(cb()[1], MixedPrecision) else 1e-5)
    assert "fastai's loop runs" not in capsys.readouterr().out
    assert 'decide in Python' in capture_hurdle_of(learns[1])
    if hasattr(learns[0], 'gradient_accumulator'):
        a,b = (l.gradient_accumulator for l in learns)
        assert a.rows==b.rows and len(a.rows)<len(learns[0].dls.train)
        assert [float(o) for o in a.losses]==pytest.approx([float(o) for o in b.losses], rel=2e-2)

def test_windows_that_follow_progress_take_fastais_loop(capsys):
    for kw in (dict(sched='step'), dict(n_acc=lambda p: 100)):
        with (learn := make('lean', cbs=lambda: GradientAccumulator(**{'n_acc':100, **kw}))).no_bar(),learn.no_logging(): learn.fit(1, 0.01)
        assert "fastai's loop runs" in capsys.readouterr().out

def test_each_event_reaches_a_callback_that_joins():
    "A cancelled batch or step is told to whoever joined, in fastai's order"
    class Joins(Callback):
        order,lean = 70,True
        def __init__(self): self.seen = []
        def before_batch(self): self.note('before_batch', CancelBatchException, 1)
        def after_cancel_batch(self): self.note('after_cancel_batch')
        def before_backward(self): self.note('before_backward')
        def after_backward(self): self.note('after_backward')
        def before_step(self): self.note('before_step', CancelStepException, 3)
        def after_cancel_step(self): self.note('after_cancel_step')
        def after_step(self): self.note('after_step')
        def after_batch(self): self.note('after_batch')
        def note(self, what, err=None, at=None):
            self.seen.append((self.iter,what))
            if self.iter==at and err: raise err
    ref,new = (fit(path, lambda l: l.fit(1, 0.01), cbs=Joins) for path in ('fastai','lean'))
    assert ref.joins.seen==new.joins.seen and len({o for _,o in new.joins.seen})==8
    assert len(ref.recorder.losses)==len(new.recorder.losses)==len(new.dls.train)

def test_a_loss_may_give_up_a_batch():
    class Picky(nn.Module):
        n = 0
        def forward(self, pred, y):
            self.n += 1
            if self.n==3: raise CancelBatchException
            return ((pred-y)**2).mean()
    learns = [fit(path, lambda l: l.fit(1, 0.01), loss_func=Picky()) for path in ('fastai','lean')]
    a,b = (torch.stack([o.as_subclass(torch.Tensor) for o in l.recorder.losses]) for l in learns)
    torch.testing.assert_close(a, b)
    for p,q in zip(*(l.model.parameters() for l in learns)): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

def test_whoever_hears_everything_or_changes_the_learner_gets_fastais_loop(capsys):
    class All(Callback):
        def __init__(self): self.n = 0
        def __call__(self, name): self.n += name=='after_batch'
    learn = fit('lean', lambda l: l.fit(1, 0.01), cbs=All)
    assert first(cb for cb in learn.cbs if type(cb) is All).n>=len(learn.dls.train) and "each event" in capsys.readouterr().out
    learn,stepped = make('lean'),[]
    learn._step = lambda: stepped.append(1)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    assert len(stepped)==len(learn.dls.train) and '_step' in capsys.readouterr().out
    learn,stepped = make('lean'),[]
    learn.create_opt()
    step = learn.opt.step
    learn.opt.step = lambda: (stepped.append(1), step())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    assert len(stepped)==len(learn.dls.train)

def test_a_subclass_with_events_of_its_own_is_asked():
    "It gets fastai's loop, unless it says of itself that it can do without; then the step is not written out"
    class Counted(IdDropout):
        n = 0
        def after_pred(self): self.n += 1
    class Joins(Counted):
        lean = True
        def after_pred(self): super().after_pred()
    class Looks(EMA):
        def after_batch(self):
            if self.training: self.seen = [*getattr(self, 'seen', []), self.train_iter]
    for cb in (Counted,Joins):
        learn = make('lean', cbs=lambda: cb(0.1, 1))
        learn.__class__ = CFLearner
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
        assert getattr(learn, cb.__name__.lower()).n==len(learn.dls.train)+len(learn.dls.valid)
        learn.dl = learn.dls.train
        assert batch_needs(learn)==({'counted':['before_batch','after_pred']} if cb is Counted else {})
        assert cb is Counted or 'joins' in factor_hurdle(learn)
    learn.remove_cb(Joins).add_cb(IdDropout(0.1, 1))
    assert factor_hurdle(learn) is None
    learn = fit('lean', lambda l: l.fit(1, 0.01), cbs=Looks)
    assert learn.looks.seen==list(range(1, len(learn.dls.train)+1))

def search(fast, num_it=60, made={}, **kwargs):
    "A search for a learning rate, and a fit after it"
    learn,cb = make('fastai', **made),LRFinder(num_it=num_it, **{'end_lr':1., **kwargs})
    learn.fast = fast
    torch.manual_seed(3)
    with learn.no_bar():
        with learn.no_logging(): learn.fit(num_it//len(learn.dls.train)+1, cbs=cb) # as `lr_find` does
        rec = learn.recorder
        res = [*map(float, rec.losses)],list(rec.lrs),list(cb.hps['lr']),learn.train_iter,learn.iter,learn.pct_train,learn.epoch,[dict(h) for h in learn.opt.hypers]
        with learn.no_logging(): learn.fit(1, 0.01)
    return *res,[*map(float, rec.losses)]

searches = {'plain':{}, 'epochs':dict(made=dict(bs=512)), 'stopped':dict(num_it=75, end_lr=50., made=dict(y_range=None)), 'not stopped':dict(end_lr=1e4, stop_div=False), 'short':dict(num_it=3),
    'ids':dict(made=dict(unk_p=0.1)), 'sgd':dict(made=dict(opt_func=SGD)), 'groups':dict(made=dict(splitter=split)), 'clipped':dict(made=dict(cbs=lambda: GradientClip(0.1))), 'weights':dict(made=dict(weights=True)),
    'bpr':dict(made=dict(loss_func=BPRLoss(), y_range=None), end_lr=1e5), 'averaged':dict(made=dict(cbs=lambda: [EMA(0.9), GradientAccumulator(128)])), 'nan':dict(made=dict(cbs=lambda: TerminateOnNaNCallback()), end_lr=1e30)}

@pytest.mark.parametrize('how', searches)
def test_a_search_for_a_learning_rate_is_that_of_fastai_s_loop(how):
    "Losses, rates, where it stops, and what a fit gets afterwards"
    kwargs = searches[how]
    slow,fast = search(False, **kwargs),search(True, **kwargs)
    for a,b in zip(slow, fast): assert a==b if isinstance(a, int) or isinstance(a, list) and isinstance(a[0], dict) else pytest.approx(a, rel=1e-4, nan_ok=True)==b
    if how in ('stopped','bpr','nan'): assert len(slow[0])<kwargs.get('num_it', 60) # it ran away

def test_a_search_for_a_learning_rate_of_one_s_own_is_asked_at_each_batch(capsys):
    class Own(LRFinder): pass
    learn = make('fastai')
    learn.fast = None
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=Own(num_it=10))
    assert len(learn.recorder.losses)==10 and 'these callbacks act on each batch: own (before_batch after_batch)' in capsys.readouterr().out
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert not capsys.readouterr().out
