"Metrics against naive loops, sklearn and published definitions; intervals and tests against what is known of them"
import math

import numpy as np,pandas as pd,pytest,torch
from fastai.callback.tracker import SaveModelCallback
from sklearn.metrics import average_precision_score,roc_auc_score
from cfext import *
from cfext.metrics import *
from cfext.metrics import list_measures

pytestmark = pytest.mark.usefixtures('quiet')

def made(n=40, k=7, n_items=25, seed=0):
    rng = np.random.default_rng(seed)
    recs = np.stack([rng.permutation(np.arange(1, n_items))[:k] for _ in range(n)])
    rel = [set(rng.choice(np.arange(1, n_items), rng.integers(0, 6), replace=False).tolist()) for _ in range(n)]
    pairs = torch.tensor([(r,i) for r,s in enumerate(rel) for i in s], dtype=torch.long)
    return recs,rel,hit_matrix(torch.tensor(recs), pairs)

def naive_ap(recs, rel): return sum(sum(r in rel for r in recs[:j+1])/(j+1) for j,r in enumerate(recs) if r in rel)/min(len(rel), len(recs))

def naive_auc(recs, rel, items):
    place = {r:j for j,r in enumerate(recs)}
    won = [1. if place.get(a, 999)<place.get(b, 999) else .5 if a not in place and b not in place else 0. for a in rel for b in items-rel]
    return sum(won)/len(won)

def test_average_precision_and_auc_against_naive_loops():
    recs,rel,(hits,n_rel) = made()
    ap,auc = average_precision_at_k(hits, n_rel),auc_at_k(hits, n_rel, 24)
    assert ap.shape==auc.shape==(40,) and ap.dtype==torch.float32
    for r,s in enumerate(rel):
        if not s: assert ap[r].isnan() and auc[r].isnan()
        else:
            assert abs(ap[r]-naive_ap(recs[r].tolist(), s))<1e-6
            assert abs(auc[r]-naive_auc(recs[r].tolist(), s, set(range(1,25))))<1e-6

def test_whole_rankings_agree_with_sklearn():
    rng = np.random.default_rng(1)
    rel,s = rng.random((15,30))<0.3,rng.random((15,30))
    hits,n_rel = hit_matrix(torch.tensor(np.argsort(-s, 1).copy()), torch.tensor(np.argwhere(rel)))
    np.testing.assert_allclose(average_precision_at_k(hits, n_rel), [average_precision_score(a, b) for a,b in zip(rel, s)], rtol=1e-5)
    np.testing.assert_allclose(auc_at_k(hits, n_rel, torch.full((15,), 30)), [roc_auc_score(a, b) for a,b in zip(rel, s)], rtol=1e-5)

def test_auc_of_a_user_for_whom_everything_is_relevant():
    hits,n_rel = hit_matrix(torch.tensor([[1,2]]), torch.tensor([[0,1],[0,2]]))
    assert auc_at_k(hits, n_rel, 2).isnan().all()

def test_catalogue_measures_against_naive_loops():
    recs,_,_ = made(n=12, k=5, n_items=15)
    recs[0,3:] = -1
    recs[1] = -1
    recs[2,1:] = -1
    t,n_items = torch.tensor(recs),15
    listed = [i for r in recs for i in r if i>0]
    assert coverage(t, n_items)==len(set(listed))/14
    c = np.bincount(listed, minlength=15)[1:]
    assert abs(gini(t, n_items)-np.abs(c[:,None]-c).sum()/(2*14*c.sum()))<1e-12
    assert math.isnan(gini(torch.full((2,3), -1), 5))
    rng = np.random.default_rng(0)
    count,vec,prof = rng.integers(0, 30, 15),rng.normal(size=(15,4)),rng.random(12)*20+1
    nov = novelty(t, torch.tensor(count), 30)
    lift = popularity_lift(t, torch.tensor(count), torch.tensor(prof))
    div = diversity(t, torch.tensor(vec))
    assert nov.shape==lift.shape==div.shape==(12,)
    unit = vec/np.linalg.norm(vec, axis=1, keepdims=True)
    for r,row in enumerate(recs):
        row = [i for i in row if i>0]
        if not row:
            assert nov[r].isnan() and lift[r].isnan() and div[r].isnan()
            continue
        assert abs(nov[r]-np.mean([-math.log2(max(count[i], 1)/30) for i in row]))<1e-5
        assert abs(lift[r]-(np.mean(count[row])/prof[r]-1))<1e-5
        if len(row)<2: assert div[r].isnan()
        else: assert abs(div[r]-np.mean([1-unit[a]@unit[b] for x,a in enumerate(row) for b in row[x+1:]]))<1e-6

def test_errors_by_group_against_pandas():
    rng = np.random.default_rng(0)
    p,t,g = rng.random(50),rng.random(50),rng.choice(['a','b','c'], 50)
    got = errors_by_group(torch.tensor(p)[:,None], t, g)
    for k in 'abc':
        e = (p-t)[g==k]
        np.testing.assert_allclose(got.loc[k], [len(e), np.sqrt((e**2).mean()), np.abs(e).mean(), e.mean()])

def test_rows_without_a_group_are_a_group_and_targets_below_zero_an_error():
    by = errors_by_group([1.,2.,4.], [1.,1.,1.], ['a',None,None])
    assert by.n.tolist()==[1,2] and by.index.isna().tolist()==[False,True] and by.MAE.tolist()==[0,2]
    with pytest.raises(ValueError, match='numbers below 0'): hit_matrix(torch.tensor([[1,2]]), torch.tensor([[-1,2]]))

def test_interval_covers_and_paired_test_is_calibrated():
    rng = np.random.default_rng(0)
    inside,ps = 0,[]
    for r in range(60):
        v,w = rng.exponential(size=80),rng.exponential(size=80)
        b = bootstrap_interval(torch.tensor(v), n_boot=300, seed=r)
        inside += b['low']<1<b['high']
        ps.append(paired_test(v, w, n_boot=200, seed=r)['p'])
    assert 49<=inside<=60 and 0<=np.mean(np.array(ps)<0.1)<=0.25
    b = bootstrap_interval(torch.tensor([1.,float('nan'),3.]))
    assert b['n']==2 and b['mean']==2
    t = paired_test(torch.tensor([1.,float('nan'),3.]), torch.tensor([float('nan'),1.,2.]))
    assert t['n']==1 and t['mean']==1
    assert bootstrap_interval(v, seed=1)==bootstrap_interval(v, seed=1)!=bootstrap_interval(v, seed=2)
    with pytest.raises(ValueError, match='`level`=95'): bootstrap_interval(v, 95)

@pytest.fixture(scope='module')
def dls(): return CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', seed=3, device='cpu', bs=32, val_bs=50)

def test_list_metrics_are_those_of_evaluate(dls, tmp_path):
    learn = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), seed=0, metrics=list_metrics(*list_measures, k=5), path=tmp_path)
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.05, cbs=SaveModelCallback(monitor='NDCG@5'))
    assert list(learn.recorder.metric_names)[3:-1]==[f'{m}@5' for m in list_measures]
    x = dls.valid_ds.x.long()
    us,row = x[x[:,0]>0,0].unique(return_inverse=True)
    last = learn.validate()[1:]
    hits = hit_matrix(top_items(learn, us, 5, seen='train')[0], torch.stack([row, x[x[:,0]>0,1]], 1))
    np.testing.assert_allclose(last, [f(*hits).nanmean().item() for f in list_measures.values()], rtol=1e-5)
    rep = learn.evaluate(k=5).loc['DotProductBias']
    np.testing.assert_allclose(last[0], rep['recall@5'], rtol=1e-5)

def test_some_users_only_and_models_without_score_items(dls):
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.u,self.i = nn.Embedding(dls.n_users, 3),nn.Embedding(dls.n_items, 3)
        def forward(self, x): return (self.u(x[:,0])*self.i(x[:,1])).sum(1, keepdim=True)
    learn = cf_learner(dls, Net(), metrics=list_metrics('hit rate', k=3, n_users=11), unk_p=0)
    m, = learn.metrics
    a,b = learn.validate()[1],learn.validate()[1]
    assert a==b and len(m.lists.get()[0])==11 and m.name=='hit rate@3'
