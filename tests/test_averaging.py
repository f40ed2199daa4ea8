"Averages of weights, snapshots, and draws from the posterior, against what they should be"
import pickle

import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.callback.core import Callback,CancelStepException
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from cfext import *
from cfext.averaging import *
from cfext.averaging import _draw_rows,_hyper,_state

pytestmark = pytest.mark.usefixtures('quiet')
df = synth_ratings(60, 40, 1000)

def make(model='dot', cbs=None, y_range=(0.5,5.5), bs=101, **kw):
    dls = CFDataLoaders.from_df(df, item_name='title', seed=3, bs=bs, device='cpu')
    return cf_learner(dls, model, n_factors=4, y_range=y_range, seed=0, unk_p=0, cbs=cbs, **kw)

def quietly(learn, f='fit', *args, **kwargs):
    with learn.no_bar(),learn.no_logging(): getattr(learn, f)(*args, **kwargs)
    return learn

def valid_loss(learn):
    with learn.no_bar(): return learn.validate()[0]

class Spy(Callback):
    order = 200
    def __init__(self): self.epochs,self.batches,self.valid = [],[],[]
    def after_epoch(self): self.epochs.append(_state(self.model))
    def after_batch(self):
        if self.training: self.batches.append(_state(self.model))
    def after_pred(self):
        if not self.training: self.valid.append(_state(self.model))

def same(a, b, **kw): return all(torch.allclose(a[k], b[k], **{'atol':1e-6, **kw}) for k in a)

def test_swa_is_the_mean_of_epochs():
    spy = Spy()
    learn = quietly(make(), 'fit', 5, 0.05, cbs=[SWA(0.4), spy])
    assert same(_state(learn.model), {k: torch.stack([s[k] for s in spy.epochs[2:]]).mean(0) for k in spy.epochs[0]})

def test_ema_is_the_recursion_and_validates_with_it():
    spy = Spy()
    learn = quietly(make(), 'fit', 3, 0.05, cbs=[EMA(0.9), spy])
    avg = dict(spy.batches[0])
    ends,n = [],len(learn.dls.train)
    for j,s in enumerate(spy.batches):
        if j: avg = {k: 0.9*avg[k]+0.1*s[k] for k in s}
        if (j+1)%n==0: ends.append(avg)
    assert all(same(a, b, atol=1e-5) for a,b in zip(spy.valid, ends)) and len(spy.valid)==3
    assert same(_state(learn.model), ends[-1], atol=1e-5)
    assert same(spy.epochs[0], ends[0], atol=1e-5), 'the average stays until training goes on'

def test_training_is_not_disturbed():
    a,b = Spy(),Spy()
    torch.manual_seed(1); quietly(make(), 'fit', 2, 0.05, cbs=a)
    torch.manual_seed(1); quietly(make(), 'fit', 2, 0.05, cbs=[EMA(0.9), SWA(), Snapshots(), b])
    assert all(same(x, y, atol=0) for x,y in zip(a.batches, b.batches))

def test_ema_interrupted_while_validating():
    class Stop(Callback):
        order = 90
        def after_pred(self):
            if not self.training and self.epoch==1: raise KeyboardInterrupt
    ema,spy = EMA(0.9),Spy()
    learn = make()
    with pytest.raises(KeyboardInterrupt): quietly(learn, 'fit', 3, 0.05, cbs=[ema, spy, Stop()])
    ema.learn = learn
    ema.before_fit()
    assert same(_state(learn.model), spy.batches[-1], atol=0)

def test_batch_norm_is_measured_anew():
    learn = quietly(make('nn', config=dict(layers=[6], use_bn=True)), 'fit', 3, 0.05, cbs=SWA(0.3))
    with torch.no_grad():
        m,x = learn.model,torch.cat([b[0] for b in learn.dls.train])
        h = m.layers[1](m.layers[0](torch.cat([m.user_factors[x[:,0]], m.item_factors[x[:,1]]], 1)))
    bn = next(o for o in m.modules() if isinstance(o, nn.BatchNorm1d))
    assert torch.allclose(bn.running_mean, h.mean(0), atol=0.05) and not m.layers[0].weight.isnan().any()

@pytest.mark.parametrize('f,args,n', [('fit_sgdr',(3,1,0.03),3), ('fit_one_cycle',(3,0.03),1), ('fit',(2,0.03),1)])
def test_snapshots_are_at_the_ends_of_cycles(f, args, n):
    snaps,spy = Snapshots(),Spy()
    learn = quietly(make(), f, *args, cbs=[snaps, spy])
    assert len(snaps.states)==n
    if f=='fit_sgdr':
        assert all(same(s, spy.epochs[e], atol=0) for s,e in zip(snaps.states, (0,2,6)))
    a,b = snaps.members()[-1],learn
    with a.no_bar(),b.no_bar(): assert torch.equal(a.get_preds()[0], b.get_preds()[0])
    a.model.item_factors.data.zero_()
    assert learn.model.item_factors.abs().sum()>0 and a.dls is learn.dls

def test_lr_find_and_prediction_do_not_count():
    snaps,ema = Snapshots(),EMA()
    learn = quietly(make(cbs=[snaps, ema]), 'fit', 1, 0.03)
    before = _state(learn.model)
    with learn.no_bar(),learn.no_logging():
        learn.lr_find(show_plot=False, num_it=5)
        learn.get_preds()
    assert same(_state(learn.model), before, atol=0)

# the posterior

def dense_draw(starts, cols, resid, V, prior, L, tau):
    "Means and covariances, a row at a time"
    for j in range(len(prior)):
        v,r = V[cols[starts[j]:starts[j+1]]],resid[starts[j]:starts[j+1]]
        cov = torch.linalg.inv(L+tau*v.T@v)
        yield cov@(L@prior[j]+tau*v.T@r),cov

def test_rows_are_drawn_from_their_conditional():
    g = torch.Generator().manual_seed(0)
    starts,cols = torch.tensor([0,0,2,7]),torch.tensor([0,3,1,4,2,2,0])
    V,resid,prior = torch.randn(5,3, generator=g),torch.randn(7, generator=g),torch.randn(3,3, generator=g)
    L = torch.eye(3)*2+0.3
    Z = torch.stack([_draw_rows(starts, cols, resid, V, prior, L, 1.7, g) for _ in range(1200)])
    for j,(mean,cov) in enumerate(dense_draw(starts, cols, resid, V, prior, L, 1.7)):
        assert torch.allclose(Z[:,j].mean(0), mean, atol=0.08) and torch.allclose(Z[:,j].T.cov(), cov, atol=0.08)

def test_hyper_parameters_find_the_rows_they_came_from():
    g = torch.Generator().manual_seed(1)
    A = torch.tensor([[1.,0,0],[0.5,1,0],[0,-0.3,0.7]])
    Z = torch.randn(4000,3, generator=g)@A.T+torch.tensor([1.,-1,0])
    draws = [_hyper(Z, g) for _ in range(40)]
    assert torch.allclose(torch.stack([m for m,_ in draws]).mean(0), torch.tensor([1.,-1,0]), atol=0.06)
    assert torch.allclose(torch.linalg.inv(torch.stack([L for _,L in draws]).mean(0)), A@A.T, atol=0.1)

def test_gibbs_repeats_and_beats_a_point_estimate():
    runs = []
    for _ in range(2):
        cb = GibbsMF(5, 1, seed=4)
        runs.append(quietly(make(y_range=None), 'fit', 25, cbs=cb))
    assert same(_state(runs[0].model), _state(runs[1].model), atol=0)
    members,y = cb.members(),runs[0].dls.valid_ds.y
    assert len(members)==20
    P = []
    for m in members:
        with m.no_bar(): P.append(m.get_preds()[0])
    point = quietly(make(), 'fit_one_cycle', 5, 0.05, wd=0.1)
    with point.no_bar(): p = point.get_preds()[0]
    assert ((torch.stack(P).mean(0)-y)**2).mean() < min(((p-y)**2).mean(), ((P[-1]-y)**2).mean())
    assert runs[0].model.user_factors[0].abs().max()<2 and 0.5<cb.tau<10

def test_gibbs_weighs_rows():
    "A row of weight 2 is the row twice; one weight for all changes nothing"
    g = lambda: torch.Generator().manual_seed(1)
    V,resid = torch.randn(7, 3, generator=g()),torch.randn(7, generator=g())
    args = torch.full((1,3), 0.5),torch.eye(3),1.7
    twice = _draw_rows(torch.tensor([0,14]), torch.arange(7).repeat(2), resid.repeat(2), V, *args, g())
    once = _draw_rows(torch.tensor([0,7]), torch.arange(7), resid, V, *args, g(), torch.full((7,), 2.))
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-4)
    def state(w):
        dls = CFDataLoaders.from_df(df.assign(w=w), item_name='title', weight_name=None if w is None else 'w', seed=0, device='cpu')
        return _state(quietly(cf_learner(dls, n_factors=3, seed=0), 'fit', 3, cbs=GibbsMF(1, 1)).model)
    assert same(state(None), state(3.), atol=1e-4) and not same(state(None), state(df.timestamp.rank()), atol=1e-2)

def test_gibbs_leaves_the_generators_alone():
    torch.manual_seed(3)
    learn = make(y_range=None)
    before = torch.get_rng_state()
    cb = GibbsMF(1, 1)
    cb.learn,learn.epoch,learn.n_epoch = learn,0,1
    cb.before_fit(); cb.begin(); cb.sweep()
    assert torch.equal(before, torch.get_rng_state())

def test_features():
    dls = make().dls
    u,i = rated_features(dls)
    x = dls.train_ds.x.long()
    assert u.shape==(dls.n_users,dls.n_items) and i.shape==(dls.n_items,dls.n_users)
    k = int(x[0,0])
    assert (u[k]>0).nonzero()[:,0].tolist()==sorted(x[x[:,0]==k,1].tolist()) and u[0].sum()==0
    table = df.drop_duplicates('title').set_index('title')
    f = cat_features(dls, 'item', table[3:], ['genre','timestamp'])
    known = dls.classes['title'].ids
    j = next(j for j,t in enumerate(known) if t in table.index[3:])
    assert f.shape==(dls.n_items,1+table.genre[3:].nunique()) and f[0].sum()==0 and f[j+1,0]==table.timestamp[known[j]]
    lost = [j for j,t in enumerate(known) if t in table.index[:3]]
    assert all(f[j+1].sum()==0 for j in lost)
    with pytest.raises(ValueError, match='is not a column'): cat_features(dls, 'item', table, ['colour'])

def test_langevin_in_a_known_posterior():
    class Mean(nn.Module):
        def __init__(self): super().__init__(); self.m = nn.Parameter(torch.zeros(1))
        def forward(self, x): return self.m.expand(len(x), 1)
    learn,l = make(Mean(), bs=800),Langevin(0.3, tau=2., lam=5., cycles=1, explore=0.)
    l.learn,l.phase,learn.n_epoch,seen = learn,lambda: 0.,1,[]
    l.before_fit(); l.before_train()
    x,y = learn.dls.train_ds.x.long(),learn.dls.train_ds.y
    for _ in range(4000):
        learn.model.zero_grad()
        ((learn.model(x)-y)**2).mean().backward()
        with pytest.raises(CancelStepException): l.before_step()
        seen.append(learn.model.m.item())
    seen = np.array(seen[100:])
    assert abs(seen.mean()-2*y.sum().item()/(5+2*len(y)))<0.01, 'mean of the posterior'
    assert abs(seen.std()/(5+2*len(y))**-0.5-1)<0.2, 'its standard deviation'

def test_langevin_keeps_only_what_it_drew():
    l = Langevin(cycles=2, explore=0.5)
    quietly(make(), 'fit', 8, cbs=l)
    assert len(l.states)==4 and len(l.members())==4

@pytest.mark.parametrize('f,err,msg', [
    (lambda: SWA(1.), ValueError, '`start`=1.0'), (lambda: EMA(0), ValueError, '`decay`=0'), (lambda: GibbsMF(lam=0), ValueError, '`lam`=0'),
    (lambda: GibbsMF(every=0), ValueError, '`every`=0'), (lambda: Langevin(eps=0), ValueError, '`eps`=0'), (lambda: Langevin(cycles=0), ValueError, '`cycles`=0'),
    (lambda: quietly(make(), 'fit', 1, cbs=GibbsMF()), TypeError, 'without `y_range`'), (lambda: quietly(make('nn'), 'fit', 1, cbs=GibbsMF()), TypeError, 'DotProductBias'),
    (lambda: quietly(make(y_range=None), 'fit', 1, cbs=GibbsMF(user_x=torch.zeros(3,2))), ValueError, '`user_x` is of shape'),
    (lambda: GibbsMF().members(), ValueError, 'has kept no weights'), (lambda: dropout_members(make()), ValueError, 'has no dropout'),
    (lambda: dropout_members(make('nn', config=dict(layers=[5], ps=0.3)), 0), ValueError, '`n`=0')])
def test_bad_input(f, err, msg):
    with pytest.raises(err, match=msg): f()

def test_dropout_members():
    learn = quietly(make('nn', config=dict(layers=[9], ps=0.4)), 'fit', 1, 0.02)
    members = dropout_members(learn, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    x = learn.dls.valid_ds.x.long()[:7]
    p,q,p2 = members[0].model(x),members[1].model(x),members[0].model(x)
    assert torch.equal(p, p2) and not torch.equal(p, q) and p.shape==(7,1)
    assert torch.equal(before, torch.get_rng_state()) and not any(m.training for m in members[0].model.eval().modules())
    assert members[0].model.score_items(x[:2,0]).shape==(2,learn.dls.n_items)

@pytest.mark.parametrize('mk', [lambda: EMA(0.9), lambda: SWA(0.3), lambda: Snapshots(), lambda: Langevin(cycles=2, explore=0.5, tau=1.)])
def test_lean_loop_and_fastais_give_the_same(mk):
    "On a CPU these callbacks need not ask for fastai's loop"
    res = []
    for fast in (True,False):
        torch.manual_seed(1)
        cb = mk()
        learn = make()
        learn.fast = fast
        quietly(learn, 'fit_sgdr', 2, 1, 0.05, cbs=cb)
        res.append((_state(learn.model), getattr(cb, 'states', []), learn.recorder.values))
    (a,s,v),(b,t,w) = res
    assert same(a, b) and len(s)==len(t) and all(same(x, y) for x,y in zip(s, t))
    np.testing.assert_allclose(v, w, atol=1e-5)

def test_langevin_with_a_trained_unknown_row():
    "Dropped ids add up in row 0, whose steps are as small as those of other rows that are met as often"
    dls = CFDataLoaders.from_df(df, item_name='title', seed=3, bs=101, device='cpu')
    learn,l = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), seed=0, unk_p=0.1),Langevin(tau=2., lam=5.)
    quietly(learn, 'fit', 4, cbs=l)
    M = l.M[id(learn.model.item_bias)]
    assert abs(M[0].item()-1/(5+2*0.1*800))<1e-6 and all(s['user_factors'].isfinite().all() for s in l.states)

def test_langevin_that_runs_away_is_warned_of():
    with pytest.warns(UserWarning, match='`eps`=2.0 times 8 batches an epoch is more than 15'): quietly(make(), 'fit', 1, cbs=Langevin(2.))

def test_what_was_validated_is_what_is_saved_and_kept(tmp_path):
    "EMA beside SaveModelCallback: the file holds the average of the best epoch, and so does the model in the end"
    learn = make()
    learn.path = tmp_path
    quietly(learn, 'fit', 8, 0.05, wd=0., cbs=[EMA(0.9), SaveModelCallback(fname='best')])
    best = min(v[1] for v in learn.recorder.values)
    assert learn.recorder.values[-1][1]>best, 'the last epoch is not the best one'
    assert valid_loss(learn)==pytest.approx(best, rel=1e-5)
    learn.load('best')
    assert valid_loss(learn)==pytest.approx(best, rel=1e-5)

def test_ema_trains_on_from_where_it_was():
    "The average is judged between epochs; training goes on from its own weights"
    class Seen(Callback):
        order = 80
        def before_fit(self): self.ends,self.begins = [],[]
        def before_train(self): self.begins.append(self.model.item_factors.detach().clone())
        def after_train(self): self.ends.append(self.model.item_factors.detach().clone())
    seen,learn = Seen(),make()
    quietly(learn, 'fit', 3, 0.02, cbs=[EMA(0.9), seen])
    for a,b in zip(seen.ends, seen.begins[1:]): assert torch.equal(a, b)
    assert not torch.equal(seen.ends[-1], learn.model.item_factors)

@pytest.mark.parametrize('mk', [lambda: Snapshots(), lambda: Langevin(cycles=2, explore=0.5, tau=1.), lambda: GibbsMF(1, 1)])
def test_a_validation_leaves_the_members_alone(mk):
    cb = mk()
    learn = make(y_range=None, cbs=cb)
    quietly(learn, 'fit_sgdr', 2, 1, 0.01)
    had = cb.states
    quietly(learn, 'validate')
    quietly(learn, 'get_preds')
    assert cb.states is had and len(cb.members())==len(had)>=2
    quietly(learn, 'fit_sgdr', 2, 1, 0.01)
    assert cb.states is not had and len(cb.states)==len(had)

def test_members_validate_as_their_learner_does():
    dls = CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', rating_name=None, seed=1, device='cpu')
    learn = cf_learner(dls, n_factors=4, loss_func=BPRLoss(), cbs=[snap := Snapshots(), Negatives(3, seed=5)], seed=1)
    quietly(learn, 'fit_sgdr', 2, 1, 0.02)
    assert valid_loss(snap.members()[-1])==pytest.approx(valid_loss(learn))

def test_a_dropout_member_is_one_model():
    "A row's prediction does not hang on the rows beside it"
    learn = quietly(make('nn', config=dict(layers=[9], ps=0.4)), 'fit', 1, 0.02)
    x = learn.dls.valid_ds.x.long()[:7]
    for m in dropout_members(learn, 3):
        m.model.eval()
        torch.testing.assert_close(m.model(x).flip(0), m.model(x.flip(0)))
        torch.testing.assert_close(m.model(x)[2:3], m.model(x[2:3]))

def test_an_averaging_learner_is_pickled():
    learn = quietly(make(cbs=EMA()), 'fit', 1, 0.02)
    new = pickle.loads(pickle.dumps(learn))
    assert torch.equal(new.model.item_factors, learn.model.item_factors)
    quietly(new, 'fit', 1, 0.02)

@pytest.mark.parametrize('kw,how', [(dict(weight_name='w'),{}), (dict(rating_name=None),dict(loss_func=BPRLoss()))])
def test_dropout_members_are_validated_as_the_learner_is(kw, how):
    df = synth_ratings(40, 30, 500, seed=3).assign(w=lambda o: o.user%3+1.)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=5, device='cpu', **kw), 'nn', config=dict(layers=[8], ps=[.3]), seed=0, **how)
    with learn.no_bar(),learn.no_logging():
        m = dropout_members(learn, 1)[0]
        loss = m.validate()[0]
        if how: return
        p,y = m.get_preds()
        w = learn.dls.valid_ds.w/learn.dls.train_ds.w.mean()
        assert loss==pytest.approx((((p-y)**2)[:,0]*w).mean().item(), rel=1e-4) and abs(loss-((p-y)**2).mean().item())>1e-3
