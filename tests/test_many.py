"Many learners fitted together: each against the same learner fitted alone"
import gc,re,threading
from functools import partial

import numpy as np,pandas as pd,pytest,torch
from fastai.callback.all import Callback,EarlyStoppingCallback,GradientClip,LRFinder,ParamScheduler,ProgressCallback,TerminateOnNaNCallback
from fastai.losses import L1LossFlat
from fastai.metrics import mae
from fastai.optimizer import Adam,RMSProp,SGD
from fastai.torch_core import get_random_states,no_random
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from cfext import *
from cfext.many import _Replay,_Rows,_pieces
from cfext.stacked import Stacked,StackedAdam

pytestmark = pytest.mark.usefixtures('quiet')
df = synth_ratings(60, 40, 1000)
df['weight'] = 1.+np.arange(len(df))%3
wide = dict(layers=(6,5), use_bn=False, init=(-0.3,0.3))

def make(seed, model='dot', bs=61, unk_p=0.02, device='cpu', loader_seed=True, rows=None, loss_func=None, cbs=None, weight_name=None, n_factors=4, y_range=(0.5,5.5), **kw):
    splitter = None if rows is None else lambda o: rows
    dls = CFDataLoaders.from_df(df, item_name='title', seed=seed if loader_seed else None, bs=bs, device=device, splitter=splitter, weight_name=weight_name)
    learn = cf_learner(dls, model, n_factors=n_factors, y_range=y_range, seed=seed, unk_p=unk_p, loss_func=loss_func, cbs=cbs, **kw)
    learn.remove_cbs([ProgressCallback])
    return learn

def alone(mk, seed, *args, fit='fit_one_cycle', **kwargs):
    with no_random(seed, reproducible=False):
        learn = mk(seed)
        with learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    return learn

def same(a, b, atol=1e-5):
    "Are weights, optimizer, recorder and validation those of the other?"
    for (n,p),q in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        assert p.shape==q.shape and p.dtype==q.dtype and torch.allclose(p, q, atol=atol), n
    for p,q in zip(a.model.parameters(), b.model.parameters()):
        s,t = a.opt.state[p],b.opt.state[q]
        assert s.keys()==t.keys() and s['step']==t['step'] and all(torch.allclose(s[k], t[k], atol=atol) for k in ('grad_avg','sqr_avg'))
    r,o = a.recorder,b.recorder
    assert r.lrs==o.lrs and r.iters==o.iters and len(r.losses)==len(o.losses)
    np.testing.assert_allclose(np.array(r.losses, float), np.array(o.losses, float), atol=atol)
    np.testing.assert_allclose(np.array(r.values, float), np.array(o.values, float), atol=atol)
    assert a.opt.hypers==b.opt.hypers and a.train_iter==b.train_iter and abs(a.pct_train-b.pct_train)<1e-9

def check(mk, *args, n=3, atol=1e-5, **kwargs):
    for s,l in enumerate(fit_many(mk, *args, n=n, **kwargs)): same(l, alone(mk, s, *args, **kwargs), atol)

def named(o): return re.sub(r' at 0x\w+', '', str(o)) # the same name in every process

@pytest.mark.parametrize('mk', [dict(), dict(loader_seed=False), dict(unk_p=0), dict(model=DotProduct), dict(y_range=None), dict(bs=1000), dict(bs=799), dict(loss_func=L1LossFlat()),
                                dict(weight_name='weight'), dict(weight_name='weight', loss_func=L1LossFlat()), dict(opt_func=partial(Adam, decouple_wd=False)), dict(metrics=[mae])], ids=named)
def test_dot_models_are_those_trained_alone(mk): check(partial(make, **mk), 3, 0.02, wd=0.1)

@pytest.mark.parametrize('mk', [dict(config=wide), dict(config={**wide, 'use_bn':True}), dict(config=wide, weight_name='weight'), dict(config=wide, loss_func=L1LossFlat())], ids=named)
def test_networks_are_those_trained_alone(mk): check(partial(make, model='nn', **mk), 2, 0.01, atol=1e-4 if 'weight_name' not in mk else 1e-4)

@pytest.mark.parametrize('fit,args', [('fit',(2,0.01)), ('fit_flat_cos',(2,0.01)), ('fit_sgdr',(2,1,0.01)), ('fine_tune',(2,0.01))])
def test_any_fit(fit, args): check(make, *args, fit=fit)

def test_settings_of_their_own():
    each = [dict(lr_max=0.01, wd=0.1), dict(lr_max=0.03, wd=0.01), dict(lr_max=0.03, wd=0.2, moms=(0.9,0.8,0.9)), dict(lr_max=0.01, wd=0.1, n_epoch=2)]
    each = [{'n_epoch':3, **e} for e in each]
    for s,(l,e) in enumerate(zip(fit_many(make, n=4, each=each), each)): same(l, alone(make, s, **e))

@pytest.mark.parametrize('k', [3,7])
def test_folds_of_their_own_rows(k):
    folds = fold_rows(df, k, by='user') if k==3 else fold_rows(df, k)
    mk = lambda s: make(s, rows=folds[s])
    check(mk, 2, 0.02, n=k, wd=0.1)

def test_rows_of_any_number():
    sizes = [122,183,200,244,400,61,62]
    mk = lambda s: make(s, rows=(np.arange(sizes[s]), np.arange(900,1000)))
    check(mk, 2, 0.02, n=7)

def test_a_second_fit_goes_on():
    learns = fit_many(make, 2, 0.02, n=2)
    fit_many(learns, 1, 0.01, seed=5)
    for s,l in enumerate(learns):
        o = alone(make, s, 2, 0.02)
        with no_random(5+s, reproducible=False),o.no_logging(): o.fit_one_cycle(1, 0.01)
        same(l, o)

def test_fitted_alone_afterwards():
    l = fit_many(make, 2, 0.02, n=2)[1]
    o = alone(make, 1, 2, 0.02)
    for x in (l,o):
        with no_random(9, reproducible=False),x.no_logging(): x.fit_one_cycle(1, 0.01)
    same(l, o)

def test_frozen_tables():
    def mk(seed):
        l = make(seed)
        l.model.user_factors.requires_grad_(False)
        return l
    a = fit_many(mk, 1, 0.02, n=2)
    o = alone(mk, 1, 1, 0.02)
    for p,q in zip(a[1].model.parameters(), o.model.parameters()): assert torch.allclose(p, q, atol=1e-5)
    assert torch.equal(a[0].model.user_factors, mk(0).model.user_factors)

def test_averaging_callbacks():
    check(lambda s: make(s, cbs=SWA(0.3)), 3, 0.02)

def test_generators_are_left_alone():
    torch.manual_seed(3); np.random.seed(3)
    before = get_random_states()
    fit_many(make, 1, 0.02, n=2)
    after = get_random_states()
    assert torch.equal(before['torch_state'], after['torch_state']) and (before['numpy_state'][1]==after['numpy_state'][1]).all() and before['random_state']==after['random_state']

def test_nan_stays_where_it_is():
    learns = [make(s) for s in range(3)]
    with torch.no_grad(): learns[1].model.item_bias[4] = float('nan')
    with pytest.warns(UserWarning, match='learner 1 has become NaN'): fit_many(learns, 2, 0.02)
    for s in (0,2): same(learns[s], alone(make, s, 2, 0.02))
    nets = [make(s, 'nn', config={**wide, 'use_bn':True}) for s in range(3)]
    with torch.no_grad(): nets[2].model.layers[0].bias[0] = float('nan')
    with pytest.warns(UserWarning, match='learner 2 has become NaN'): fit_many(nets, 1, 0.01)
    assert all(not p.isnan().any() for l in nets[:2] for p in l.model.parameters())

def test_nan_ends_the_fit_of_a_learner_that_asks_for_it():
    mk = lambda s: make(s, cbs=TerminateOnNaNCallback())
    learns = [mk(s) for s in range(2)]
    with torch.no_grad(): learns[0].model.item_bias[4] = float('nan')
    fit_many(learns, 2, 0.02)
    assert len(learns[0].recorder.values)==0
    same(learns[1], alone(mk, 1, 2, 0.02))

class Breaks(Callback):
    order = 60
    def __init__(self, err): self.err = err
    def after_epoch(self):
        if self.epoch==1: raise self.err

@pytest.mark.parametrize('err', [RuntimeError('broken'), KeyboardInterrupt()])
def test_an_error_in_one_ends_all_and_leaves_them_whole(err):
    learns = [make(0), make(1, cbs=Breaks(err)), make(2)]
    with pytest.raises(type(err)): fit_many(learns, 4, 0.02)
    for l in learns:
        assert 'all_batches' not in l.__dict__ and not any(isinstance(cb, ParamScheduler) for cb in l.cbs)
        with l.no_logging(): l.fit(1, 0.01) if l is not learns[1] else None

    assert not [t for t in threading.enumerate() if '_run' in t.name]

def test_early_stopping_of_one():
    mk = lambda s: make(s, cbs=EarlyStoppingCallback(min_delta=9., patience=0) if s==1 else None)
    learns = fit_many(mk, 3, 0.02, n=3)
    assert [len(l.recorder.values) for l in learns]==[3,2,3]
    for s in range(3): same(learns[s], alone(mk, s, 3, 0.02))

class Moves(TorchDispatchMode):
    "Counts the calls that move numbers"
    names,n = 'copy_ clone zero_ fill_ _foreach_copy_ _foreach_zero_ _to_copy'.split(),0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func._schema.name.split('::')[1] in self.names
        return func(*args, **(kwargs or {}))

def test_as_few_copies_for_many_as_for_few():
    def moves(n):
        learns = fit_many(make, 1, 0.02, n=n)
        stack = Stacked([l.model for l in learns])
        adam = StackedAdam(stack, [l.opt for l in learns])
        with Moves() as count:
            for o in (stack,adam): o.take()
            for o in (stack,adam): o.give()
        for s,l in enumerate(learns): same(l, alone(make, s, 1, 0.02))
        return count.n
    assert moves(2)==moves(5)<8

class LastLoss(Callback):
    def after_train(self): self.seen = [*getattr(self, 'seen', []), self.loss.item()]

def test_last_loss_and_the_search_for_cycles():
    mk = lambda s: make(s, cbs=LastLoss())
    for on in (False,True):
        (gc.enable if on else gc.disable)()
        try:
            learns = fit_many(mk, 2, 0.02, n=3)
            assert gc.isenabled()==on
        finally: gc.enable()
    for s,l in enumerate(learns): np.testing.assert_allclose(l.last_loss.seen, alone(mk, s, 2, 0.02).last_loss.seen, atol=1e-5)

def test_members_own_their_memory():
    a,b = fit_many(make, 1, 0.02, n=2)
    assert a.model.user_factors.untyped_storage().nbytes()==a.model.user_factors.numel()*4
    with torch.no_grad(): a.model.item_bias.zero_()
    assert b.model.item_bias.abs().sum()>0

def test_together_in_an_ensemble(tmp_path):
    tr,va = fold_rows(df, 4)[0]
    ens = Ensemble(fit_many(lambda s: make(s, rows=(tr,va)), 3, 0.02, n=4, wd=0.1))
    assert ens.validate()[0] < np.mean([m.validate()[0] for m in ens.members.values()])
    ens.save_bundle(tmp_path)
    assert torch.equal(load_ensemble(tmp_path, device='cpu').predict(df[:5])[1], ens.predict(df[:5])[1])

@pytest.mark.parametrize('learns,msg', [
    (lambda: [], 'no learners'), (lambda: [make(0), make(1, n_factors=5)], 'another shape'), (lambda: [make(0), make(1, DotProduct)], 'another class'),
    (lambda: [make(0), make(1, y_range=(0,6))], 'another configuration'), (lambda: [make(0), make(1, bs=60)], 'batches of 60 rows, learner 0 of 61'),
    (lambda: [make(0), make(1, loss_func=L1LossFlat())], 'another loss'), (lambda: [make(0), make(1, opt_func=SGD)], 'another optimizer'),
    (lambda: [make(0, cbs=LRFinder())], 'act on each batch .lr_finder'), (lambda: [make(0, cbs=GradientAccumulator(128))], 'has gradient_accumulator, which cannot act on many'), (lambda: [make(0, cbs=GradientAccumulator(128, sched='step'))], 'act on each batch'), (lambda: [make(0, opt_func=RMSProp)], 'another optimizer'), (lambda: [make(0), make(1, opt_func=partial(Adam, decouple_wd=False))], 'another kind of weight decay'),
    (lambda: [make(0), make(1, weight_name='weight')], 'do not both have weights'), (lambda: [make(0), make(1, cbs=GradientClip())], 'has gradient_clip, which cannot act on many'),
    (lambda: [make(0), make(1, loss_func=BPRLoss())], 'negatives'), (lambda: [make(0, 'nn', config=wide), make(1, 'nn', config={**wide, 'embed_p':0.1})], 'another configuration'),
    (lambda: [make(0)]*2, 'more than once'), (lambda: [make(0), cf_learner(make(0).dls, m := make(1).model), cf_learner(make(0).dls, m)], 'share a model')])
def test_what_does_not_go_together(learns, msg):
    learns = learns()
    before = [{k: v.clone() for k,v in l.model.state_dict().items()} for l in learns]
    with pytest.raises(ValueError, match=msg): fit_many(learns, 1, 0.01)
    assert all(torch.equal(l.model.state_dict()[k], v) for l,b in zip(learns, before) for k,v in b.items()), 'nothing was trained'

def test_arguments():
    with pytest.raises(TypeError, match='learner 0 should be a Learner, got int'): fit_many([3], 1)
    with pytest.raises(ValueError, match='`n`=0'): fit_many(make, 1, n=0)
    with pytest.raises(ValueError, match='here are learners already'): fit_many([make(0)], 1, n=2)
    with pytest.raises(ValueError, match='`each` has 1 dicts for 2 learners'): fit_many(make, 1, n=2, each=[{}])
    with pytest.raises(ValueError, match="`fit`='fit_all' is not a method"): fit_many(make, 1, n=2, fit='fit_all')
    with pytest.raises(TypeError): fit_many(make, 1, n=2, no_such=3)

def test_every_row_is_visited_once():
    class Part(_Rows):
        def __init__(self, k, n): self.k,self.idx,self.cuts = k,torch.arange(n),ResidentDL.bounds(type('', (), dict(dataset=range(n), bs=7, drop_last=False, shuffle=True))())
        def cut(self, a, b): return torch.stack([torch.full((self.cuts[b]-self.cuts[a],), self.k), self.idx[self.cuts[a]:self.cuts[b]]], 1),None
    sizes = [50,49,36,70,71,7,6]
    seen,steps = set(),[]
    for a,ks,x,_ in _pieces([Part(k, n) for k,n in enumerate(sizes)], 7, block=100):
        steps += [(a+j,k) for j in range(len(x)) for k in ks]
        assert [int(x[0,j,0,0]) for j in range(len(ks))]==list(ks)
        seen |= {tuple(o) for o in x.reshape(-1, 2).tolist()}
    assert seen=={(k,j) for k,n in enumerate(sizes) for j in range(n)} and len(steps)==len(set(steps))

@pytest.mark.parametrize('mk', [dict(), dict(model='nn', config=wide, emb_szs=dict(user=4, title=3)), dict(weight_name='weight'), dict(opt_func=partial(Adam, decouple_wd=False))], ids=named)
def test_steps_that_lie_on_the_device(mk, monkeypatch):
    "What a GPU replays, run a step at a time"
    monkeypatch.setattr('cfext.many._Together.way', 'recorded')
    check(partial(make, **mk), 3, 0.02, wd=0.1, atol=1e-4 if 'model' in mk else 1e-5)
    sizes = [122,183,200,244]
    check(lambda s: make(s, rows=(np.arange(sizes[s]), np.arange(900,1000)), **mk), 2, 0.02, n=4, atol=1e-4 if 'model' in mk else 1e-5)

def record_by_tracing(self):
    "Stands in for the recording of a graph: the operations of one step, with the tensors that they work on, and nothing of the host"
    S,A = self.together.stack,self.together.adam
    kept = [S.P.flat, S.G.flat, A.m.flat, A.v.flat, self.i, self.losses]
    before = [t.clone() for t in kept]
    ops = make_fx(lambda _: self.step())(torch.zeros(1))
    class Graph: replay = staticmethod(lambda: ops(torch.zeros(1)))
    for t,b in zip(kept, before): t.copy_(b)
    self.graph = Graph

@pytest.mark.parametrize('mk', [dict(), dict(model=DotProduct), dict(weight_name='weight'), dict(opt_func=partial(Adam, decouple_wd=False))], ids=named)
def test_a_step_that_is_recorded_once_and_replayed(mk, monkeypatch):
    monkeypatch.setattr('cfext.many._Together.way', 'recorded')
    monkeypatch.setattr('cfext.many._Replay.record', record_by_tracing)
    init,made = _Replay.__init__,[]
    def recording(self, *args):
        init(self, *args)
        self.records = True
        made.append(self)
    monkeypatch.setattr('cfext.many._Replay.__init__', recording)
    each = [dict(lr_max=0.02, wd=0.1), dict(lr_max=0.01, wd=0.2), dict(lr_max=0.03, wd=0.01)]
    for s,(l,e) in enumerate(zip(fit_many(partial(make, **mk), 3, n=3, each=each), each)): same(l, alone(partial(make, **mk), s, 3, **e))
    assert len(made)==1 and made[0].graph is not None, 'one recording serves all epochs'

class NoHost(TorchDispatchMode):
    "Refuses what makes the host wait for a GPU"
    waits = 'aten::_local_scalar_dense','aten::nonzero','aten::masked_select','aten::equal','aten::is_nonzero','aten::_unique2','aten::item'
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in self.waits, f'{func} waits for the device'
        if func._schema.name in ('aten::index','aten::index_put_'):
            assert all(i is None or (i.ndim and i.dtype is not torch.bool) for i in args[1]), 'this index waits for the device'
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('mk', [dict(), dict(weight_name='weight', loss_func=L1LossFlat()), dict(model='nn', config={**wide, 'use_bn':True, 'ps':0.1}), dict(opt_func=partial(Adam, decouple_wd=False))], ids=named)
def test_the_step_does_not_ask_the_host(mk, monkeypatch):
    step,seen = _Replay.step,[]
    def watched(self):
        with NoHost(): step(self)
        seen.append(1)
    monkeypatch.setattr('cfext.many._Together.way', 'recorded')
    monkeypatch.setattr('cfext.many._Replay.step', watched)
    fit_many(partial(make, **mk), 1, 0.01, n=2)
    assert len(seen)==800//61
    with pytest.raises(AssertionError, match='waits'),NoHost(): torch.ones(3)[torch.tensor([True,False,True])]

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('mk', [dict(unk_p=0), dict(unk_p=0, model='nn', config=wide)])
def test_on_a_gpu(mk): check(partial(make, device='cuda', **mk), 2, 0.02, wd=0.1, atol=1e-4)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_on_another_stream_of_a_gpu():
    with torch.cuda.stream(torch.cuda.Stream()): check(partial(make, device='cuda', unk_p=0), 2, 0.02, wd=0.1, atol=1e-4)

def unfitted(df, splitter, seed):
    dls = CFDataLoaders.from_df(df, item_name='title', splitter=splitter, seed=seed, bs=61, device='cpu')
    learn = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), seed=seed)
    learn.remove_cbs([ProgressCallback])
    return learn

def fitted(df, splitter, seed):
    learn = unfitted(df, splitter, seed)
    with learn.no_logging(): learn.fit_one_cycle(2, 0.02, wd=0.1)
    return learn

@pytest.mark.parametrize('by', ['random','user','bag'])
def test_folds_at_once_are_those_one_by_one(by, tmp_path):
    args = dict(df=df, k=3, by=by, n_seeds=2)
    a = fit_folds(unfitted, together=partial(fit_many, n_epoch=2, lr_max=0.02, wd=0.1), path=tmp_path, **args)
    b = fit_folds(fitted, **args)
    np.testing.assert_allclose(a.oof, b.oof, atol=1e-5)
    for f in ('fold1-seed0.npy','fold2-seed1.npy'): (tmp_path/f).unlink()
    sizes = []
    def counted(learns, seed):
        sizes.append((len(learns), seed))
        return fit_many(learns, 2, 0.02, wd=0.1, seed=seed)
    c = fit_folds(unfitted, together=counted, path=tmp_path, **args)
    assert sizes==[(2, [2,5])]
    pd.testing.assert_series_equal(a.oof, c.oof)
    assert fit_folds(unfitted, together=lambda *a, **k: 1/0, path=tmp_path, **args).oof.equals(c.oof)

def test_seeds_of_a_list():
    a = fit_many(make, 1, 0.02, n=2, seed=[7,3])
    for l,s in zip(a, (7,3)): same(l, alone(make, s, 1, 0.02))
    with pytest.raises(ValueError, match='3 seeds for 2 learners'): fit_many(make, 1, n=2, seed=[1,2,3])

def test_files_of_members_are_told_apart(tmp_path, capsys):
    "Each member ends as the best of its own epochs"
    from fastai.callback.tracker import SaveModelCallback
    def mk(seed):
        learn = make(seed, cbs=SaveModelCallback())
        learn.path = tmp_path
        return learn
    learns = fit_many(mk, 6, 0.3, n=3, fit='fit')
    assert 'now each has its own, such as model-0 (SaveModelCallback)' in capsys.readouterr().out
    assert {o.name for o in (tmp_path/'models').iterdir()}=={f'model-{j}.pth' for j in range(3)}
    last = [l.recorder.values[-1][1] for l in learns]
    best = [min(v[1] for v in l.recorder.values) for l in learns]
    assert any(b<l for b,l in zip(best, last)), 'the last epoch is not the best one'
    for l,b in zip(learns, best):
        l.remove_cbs([SaveModelCallback])
        with l.no_bar(): assert l.validate()[0]==pytest.approx(b, rel=1e-5)
