"The search: rows stay apart, results repeat, a search goes on where it stood, bad input is told"
import sys
from functools import partial

import numpy as np,pandas as pd,pytest,torch
from cfext import *

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def dls(): return CFDataLoaders.from_df(synth_ratings(60, 50, 1500), item_name='title', seed=3, device='cpu', bs=64)

space = dict(n_factors=[2,5], lr=(0.003,0.1,'log'), wd=(0.01,0.5), epochs=(1,3))

def test_inner_rows_come_from_training_rows_only_and_each_once(dls):
    a = inner_loaders(dls, 0.3, 1)
    n = torch.cat([a.train_ds.x, a.valid_ds.x])
    key = lambda x: sorted(map(tuple, x.tolist()))
    assert key(n)==key(dls.train_ds.x) and a.classes is not None and a.n_users==dls.n_users
    assert key(a.train_ds.x)!=key(inner_loaders(dls, 0.3, 2).train_ds.x) and key(a.train_ds.x)==key(inner_loaders(dls, 0.3, 1).train_ds.x)
    with pytest.raises(ValueError, match='leaves'): inner_loaders(dls, 0.001)
    with pytest.raises(ValueError, match='`valid_pct`=0'): inner_loaders(dls, 0)

def test_the_test_rows_are_not_looked_at(dls):
    pytest.importorskip('optuna')
    found = []
    for y in (dls.valid_ds.y, 6-dls.valid_ds.y):
        ds = Ratings(dls.valid_ds.x, y, dls.train_ds.classes)
        other = CFDataLoaders(dls.train, dls.valid.new(ds), device='cpu')
        before = [t.clone() for t in (ds.x, ds.y, dls.train_ds.x)]
        found.append(tune(other, space, n_trials=4, measure='RMSE', bar=False))
        assert all(torch.equal(a, b) for a,b in zip(before, (ds.x, ds.y, dls.train_ds.x)))
    assert found[0].params==found[1].params and found[0].frame['RMSE'].equals(found[1].frame['RMSE'])

def test_rmse_is_small_and_what_the_learner_says(dls):
    pytest.importorskip('optuna')
    state = torch.get_rng_state()
    t = tune(dls, dict(n_factors=[4]), lambda d,n_factors,seed: cf_learner(d, n_factors=n_factors, y_range=(0.5,5.5), seed=seed), n_trials=1, epochs=2, measure='RMSE', seed=5, bar=False)
    assert torch.equal(state, torch.get_rng_state())
    inner = inner_loaders(dls, 0.2, 5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        l = cf_learner(inner, n_factors=4, y_range=(0.5,5.5), seed=5)
        with l.no_bar(),l.no_logging(): l.fit_one_cycle(2, l.lr)
    assert t.value==pytest.approx(float(l.evaluate(k=3).RMSE.iloc[0]), rel=1e-4)
    final = t.refit()
    assert len(final.dls.train_ds)==len(dls.train_ds) and final.evaluate(k=3).RMSE.iloc[0]<2

def test_a_search_goes_on_where_it_stood(dls, tmp_path):
    pytest.importorskip('optuna')
    a = tune(dls, space, n_trials=2, k=5, storage=tmp_path/'x'/'t.db', bar=False)
    b = tune(dls, space, n_trials=3, k=5, storage=tmp_path/'x'/'t.db', bar=False)
    c = tune(dls, space, n_trials=3, k=5, storage=tmp_path/'x'/'t.db', bar=False)
    assert (len(a.frame), len(b.frame), len(c.frame))==(2,3,3) and b.frame['NDCG@5'][:2].equals(a.frame['NDCG@5'])
    with pytest.raises(ValueError, match='was made for another search'): tune(dls, space, n_trials=3, k=6, storage=tmp_path/'x'/'t.db', bar=False)
    assert len(tune(dls, space, n_trials=1, k=6, storage=tmp_path/'x'/'t.db', name='other', bar=False).frame)==1

def test_lists_may_hold_what_was_seen(dls, tmp_path):
    pytest.importorskip('optuna')
    make = lambda d, n_factors, seed: cf_learner(d, n_factors=n_factors, seed=seed, cbs=[])
    go = lambda **kw: tune(dls, dict(n_factors=[3]), make, n_trials=1, epochs=2, measure='MAP', k=12, seed=5, bar=False, **kw)
    inner,vals = inner_loaders(dls, 0.2, 5),[go(exclude_seen=o).value for o in (True,False)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        l = make(inner, 3, 5)
        with l.no_bar(),l.no_logging(): l.fit_one_cycle(2, l.lr)
    assert vals==pytest.approx([l.evaluate(k=12, measures=('MAP',), exclude_seen=o)['MAP@12'].iloc[0] for o in (True,False)], rel=1e-4) and vals[0]!=vals[1]
    go(storage=tmp_path/'t.db')
    with pytest.raises(ValueError, match='was made for another search'): go(storage=tmp_path/'t.db', exclude_seen=False)

def test_diverged_trials_are_pruned_and_a_search_of_them_only_is_an_error(dls):
    pytest.importorskip('optuna')
    def make(dls, bad, seed=0):
        l = cf_learner(dls, n_factors=3, seed=seed)
        if bad:
            with torch.no_grad(): l.model.item_bias[3] = float('nan')
        return l
    t = tune(dls, dict(bad=[True,False]), make, n_trials=5, epochs=1, k=5, bar=False)
    assert set(t.frame.state)=={'PRUNED','COMPLETE'} and t.params=={'bad':False}
    with pytest.raises(ValueError, match='no trial of 2'): tune(dls, dict(bad=[True]), make, n_trials=2, epochs=1, bar=False)

def test_bad_spaces_and_a_missing_extra(dls, monkeypatch):
    pytest.importorskip('optuna')
    for s in ((1,), (2,1), (1,2,'exp'), 'lr', [], ('a','b')):
        with pytest.raises(ValueError, match=r"`space`\['lr'\]"): tune(dls, dict(lr=s), n_trials=1, bar=False)
    with pytest.raises(ValueError, match='`space` is empty'): tune(dls, {}, n_trials=1, bar=False)
    with pytest.raises(ValueError, match='low above 0'): tune(dls, dict(lr=(0.,0.1,'log')), n_trials=1, bar=False)
    with pytest.raises(ValueError, match='`n_trials`=0'): tune(dls, space, n_trials=0, bar=False)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r"cfext\[tune\]"): tune(dls, space)

def test_a_search_is_resumed_by_itself_alone(dls, tmp_path):
    "Another learner or other rows in the same file are refused; what goes on draws anew; a pruned trial's RMSE is a root"
    pytest.importorskip('optuna')
    own,f = partial(cf_learner, loss_func=BPRLoss()),tmp_path/'s.db'
    go = lambda d,make,n,**kw: tune(d, dict(lr=(0.003,0.1,'log')), make, n_trials=n, epochs=1, storage=f, bar=False, **kw)
    imp = CFDataLoaders.from_df(synth_ratings(60, 50, 1200), item_name='title', rating_name=None, seed=3, device='cpu', bs=64)
    first = go(imp, own, 2)
    lrs = go(imp, partial(cf_learner, loss_func=BPRLoss()), 5).frame['lr']
    assert lrs[:2].tolist()==first.frame['lr'].tolist() and lrs.nunique()==5
    with pytest.raises(ValueError, match='made for another search'): go(imp, partial(cf_learner, loss_func=HingeLoss()), 5)
    other = CFDataLoaders.from_df(synth_ratings(60, 50, 1200), item_name='title', rating_name=None, seed=4, device='cpu', bs=64)
    with pytest.raises(ValueError, match='made for another search'): go(other, own, 5)

def test_the_rmse_of_every_trial_is_a_root(dls):
    optuna = pytest.importorskip('optuna')
    t = tune(dls, dict(lr=[1e-5,0.05], wd=[0.1]), partial(cf_learner, n_factors=3), n_trials=8, epochs=3, measure='RMSE', bar=False)
    for o in t.study.trials:
        assert o.value==pytest.approx(o.intermediate_values[max(o.intermediate_values)])
        assert o.value<4, 'the squared error of such a fit is above 5'

def test_trials_of_one_setting_are_the_same():
    "Loaders with a seed go on in their order from fit to fit; trials do not"
    from cfext.tuning import _fit
    dls = CFDataLoaders.from_df(synth_ratings(40, 30, 500, seed=3), seed=5, device='cpu')
    a,b = (_fit(lambda dls,seed: cf_learner(dls, n_factors=3, seed=seed), dls, {}, 1, 0) for _ in range(2))
    assert torch.equal(a.model.item_factors, b.model.item_factors)
