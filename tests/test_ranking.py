"Closed-form models under the contract of every model, in a learner, and above popularity on real data"
import numpy as np,pandas as pd,pytest,torch
from cfext import *
from cfext.closed import *
from cfext.metrics import *

pytestmark = pytest.mark.usefixtures('quiet')
makers = dict(EASE=lambda d: EASE(d, 20.), ItemKNN=lambda d: ItemKNN(d, k=5, shrink=2), IALS=lambda d: IALS(d, 4, n_iter=3))

@pytest.fixture(scope='module')
def dls(): return CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', rating_name=None, seed=3, device='cpu', bs=32)

@pytest.fixture(params=makers)
def model(request, dls): return makers[request.param](dls).eval()

def test_contract(model, dls):
    x = torch.tensor([[1,2],[3,0],[6,4],[1,7]])
    out = model(x)
    assert out.shape==(4,1) and out.dtype==torch.float32 and out.isfinite().all()
    torch.testing.assert_close(out, torch.cat([model(r[None]) for r in x]), atol=1e-6, rtol=1e-5)
    us = torch.tensor([6,1,1])
    s = model.score_items(us)
    assert s.shape==(3, dls.n_items)
    torch.testing.assert_close(s, score_by_forward(model, us, dls.n_items), atol=1e-6, rtol=1e-5)
    assert model(x[:0]).shape==(0,1) and model.score_items(us[:0]).shape==(0, dls.n_items)
    assert (model.score_items(torch.tensor([0]))==0).all() and (s[:,0]==0).all()

def test_in_a_learner(model, dls):
    learn = cf_learner(dls, model, metrics=list_metrics('NDCG', k=5))
    recs = learn.recommend([5,9], k=4)
    assert len(recs)==8 and 'NDCG@5' in learn.evaluate(k=5)
    assert learn.validate()[1]==pytest.approx(learn.evaluate(k=5)['NDCG@5'].iloc[0], rel=1e-5)

def test_repeated_rows_count_once_and_data_is_untouched():
    df = synth_ratings(60, 40, 1000)
    a,b = (CFDataLoaders.from_df(d, item_name='title', rating_name=None, valid_pct=0, device='cpu') for d in (df, pd.concat([df,df[:200]])))
    for make in makers.values():
        torch.testing.assert_close(make(a).score_items(torch.arange(9)), make(b).score_items(torch.arange(9)), atol=1e-5, rtol=1e-4)

def test_ials_against_a_loop_in_float64(dls):
    f,a0,lam,nu = 3,0.2,0.05,0.5
    starts,items = user_histories(dls.train_ds.x, dls.n_users, dls.n_items)
    R = history_rows(torch.arange(dls.n_users), starts, items, dls.n_items, torch.float64).numpy()
    Q = np.random.default_rng(0).normal(size=(dls.n_items, f))
    Q[0] = 0
    for tile in (1<<22, 100):
        P = solve_rows(starts, items, torch.tensor(Q), a0, lam, nu, tile).numpy()
        for u in range(1, dls.n_users):
            n = R[u].sum()
            A = sum((np.outer(q, q)*(r+a0) for q,r in zip(Q, R[u])), lam*(n+a0*(dls.n_items-1))**nu*np.eye(f))
            np.testing.assert_allclose(P[u], np.linalg.solve(A, R[u]@Q), rtol=1e-8, atol=1e-10)

def test_ials_weighs_rows(dls):
    "Weights of 1 change nothing, weights of k are what the objective says, and the largest of repeated rows counts"
    x,n = dls.train_ds.x,len(dls.train_ds)
    w = torch.rand(n, generator=torch.Generator().manual_seed(0))*3
    starts,items = user_histories(x, dls.n_users, dls.n_items)
    pw = pair_weights(torch.cat([x,x]), torch.cat([w,w/2]), dls.n_users, dls.n_items)
    W = np.zeros((dls.n_users, dls.n_items))
    for (u,i),v in zip(x.tolist(), w.tolist()): W[u,i] = max(W[u,i], v)
    Q = np.random.default_rng(0).normal(size=(dls.n_items, 3))
    Q[0] = 0
    P = solve_rows(starts, items, torch.tensor(Q), 0.2, 0.05, 0.5, 100, pw.double()).numpy()
    for u in range(1, dls.n_users):
        c = (W[u]>0).sum()
        A = (Q.T*(W[u]+0.2))@Q + 0.05*(c+0.2*(dls.n_items-1))**0.5*np.eye(3)
        np.testing.assert_allclose(P[u], np.linalg.solve(A, W[u]@Q), rtol=1e-6, atol=1e-8)
    assert pair_weights(x, None, dls.n_users, dls.n_items) is None
    df = synth_ratings(60, 40, 1000).assign(w=lambda d: 1+9*(d.timestamp>d.timestamp.median()))
    a,b,c = (IALS(CFDataLoaders.from_df(df.assign(one=1.), item_name='title', rating_name=None, weight_name=k, seed=3, device='cpu'), 4, n_iter=2) for k in (None,'one','w'))
    torch.testing.assert_close(a.user_factors, b.user_factors)
    assert not torch.allclose(a.user_factors, c.user_factors, atol=1e-2)

def test_errors(dls):
    with pytest.raises(ValueError, match='`reg`=-1'): EASE(dls, -1)
    with pytest.raises(ValueError, match='`k`=0'): ItemKNN(dls, 0)
    with pytest.raises(ValueError, match='`shrink`=-1'): ItemKNN(dls, shrink=-1)
    with pytest.raises(ValueError, match='`lam`=0'): IALS(dls, lam=0)

def test_ml100k_ease_and_knn_are_above_popularity(data_dir):
    dls = CFDataLoaders.from_path(data_dir('ml-100k'), rating_name=None, item_name='item', seed=0, device='cpu')
    for m,factor in ((EASE(dls), 1.5), (ItemKNN(dls), 1.4)):
        ndcg = cf_learner(dls, m).evaluate(k=10)['NDCG@10']
        assert ndcg[type(m).__name__]>factor*ndcg['popularity'], ndcg
