"Metrics, lists, neighbours and the report, against naive loops"
import math,warnings

import numpy as np,pandas as pd,pytest,torch
from cfext import *

pytestmark = pytest.mark.usefixtures('quiet')

def naive(recs, rel):
    "Recall, precision, hit rate, NDCG, reciprocal rank of one list, from their definitions"
    hit = [r in rel for r in recs if r>=0]
    dcg = sum(h/math.log2(j+2) for j,h in enumerate(hit))
    ideal = sum(1/math.log2(j+2) for j in range(min(len(rel), len(recs))))
    return (sum(hit)/len(rel), sum(hit)/len(recs), float(any(hit)), dcg/ideal, next((1/(j+1) for j,h in enumerate(hit) if h), 0.))

def test_metrics_against_a_naive_loop():
    rng = np.random.default_rng(0)
    for n,k,n_items in ((40,7,25),(5,1,3),(30,20,15)):
        recs = np.stack([np.pad(rng.permutation(n_items)[:k], (0, max(0, k-n_items)), constant_values=-1) for _ in range(n)])
        recs[0,k//2:] = -1
        rel = [set(rng.choice(n_items, rng.integers(0, 5 if n_items>5 else 3), replace=False).tolist()) for _ in range(n)]
        pairs = torch.tensor([(r,i) for r,s in enumerate(rel) for i in s] or np.zeros((0,2)), dtype=torch.long)
        hits,n_rel = hit_matrix(torch.tensor(recs), pairs)
        assert n_rel.tolist()==[len(s) for s in rel]
        for f,j in zip((recall_at_k,precision_at_k,hit_rate_at_k,ndcg_at_k,mrr), range(5)):
            got = f(hits, n_rel)
            assert got.shape==(n,) and got.dtype==torch.float32
            for r,s in enumerate(rel):
                if not s: assert got[r].isnan()
                else: assert abs(got[r].item()-naive(recs[r].tolist(), s)[j])<1e-6, (f.__name__, r)

def test_no_targets_at_all():
    hits,n_rel = hit_matrix(torch.tensor([[1,2]]), torch.zeros(0,2).long())
    assert not hits.any() and recall_at_k(hits, n_rel).isnan().all()

@pytest.fixture(scope='module')
def learn():
    df = synth_ratings(60, 40, 1000)
    dls = CFDataLoaders.from_df(df, item_name='title', seed=3, device='cpu', bs=32)
    l = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), seed=0)
    with l.no_bar(),l.no_logging(): l.fit_one_cycle(2, 0.03)
    l.df = df
    return l

def test_recommend_is_the_sorted_list_of_unseen_items(learn):
    m = learn.dls.classes['title']
    for tile in (1<<24, 50):
        recs,scores = top_items(learn, learn.dls.encode_ids([5,9,1,60], 'user'), 6, tile=tile)
        for r,u in enumerate([5,9,1,60]):
            seen = set(learn.df.title[learn.df.user==u])
            items = [t for t in m.ids if t not in seen]
            p = learn.predict(pd.DataFrame(dict(user=u, title=items)))[2][:,0]
            best = [items[i] for i in p.argsort(descending=True)[:6]]
            assert list(m.decode(recs[r]))==best
            assert torch.allclose(scores[r], p.sort(descending=True).values[:6], atol=1e-5)

def test_batch_of_users_is_one_at_a_time(learn):
    many = learn.recommend([9,5,9], k=5)
    one = pd.concat([learn.recommend(u, k=5) for u in (9,5,9)], ignore_index=True)
    pd.testing.assert_frame_equal(many, one, check_exact=False, rtol=1e-5)
    assert many.columns.tolist()==['user','rank','title','score'] and many['rank'].tolist()==[1,2,3,4,5]*3

def test_candidates_and_seen(learn):
    seen = learn.df.title[learn.df.user==5].unique()
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        assert len(learn.recommend(5, k=3, candidates=seen))==0
    assert '1 of 1 lists hold fewer than `k`=3' in str(ws[0].message)
    full = learn.recommend(5, k=3, candidates=seen, exclude_seen=False)
    assert set(full.title)<=set(seen) and len(full)==3
    big = learn.recommend(5, k=10**6)
    assert len(big)==learn.dls.n_items-1-len(set(seen)&set(learn.dls.classes['title'].ids)) and big.score.is_monotonic_decreasing
    assert '#na#' not in set(big.title)

def test_unknown_user(learn):
    with pytest.raises(UnknownIdError, match='999'): learn.recommend([5,999])
    r = learn.recommend([999], k=4, unk='na')
    assert len(r)==4 and (r.user==999).all()
    assert len(learn.recommend([999], k=4, unk='mean'))==4
    with pytest.raises(ValueError, match='`k`=0'): learn.recommend([5], k=0)

def test_nan_scores_are_an_error(learn):
    p = learn.model.item_bias
    old = p[3].clone()
    with torch.no_grad(): p[3] = float('nan')
    try:
        with pytest.raises(ValueError, match='NaN: has training diverged'): learn.recommend([5])
    finally:
        with torch.no_grad(): p[3] = old

def test_similar_items_is_the_cosine(learn):
    Q = learn.model.item_factors.detach().numpy()
    m = learn.dls.classes['title']
    near = learn.similar_items([m[4],m[7]], k=5)
    for c in (4,7):
        cos = Q@Q[c]/np.linalg.norm(Q,axis=1)/np.linalg.norm(Q[c])
        order = [i for i in np.argsort(-cos) if i not in (0,c)][:5]
        sub = near[near.title==m[c]]
        assert sub.similar.tolist()==[m[i] for i in order] and np.allclose(sub.cosine, cos[order], atol=1e-5)
    with pytest.raises(UnknownIdError): learn.similar_items('Nowhere')

def test_report_against_pandas(learn):
    rep,dls = learn.evaluate(k=5),learn.dls
    tr,va = (pd.DataFrame(dict(u=d.x[:,0], i=d.x[:,1], r=d.y[:,0])) for d in (dls.train_ds, dls.valid_ds))
    mu = tr.r.mean()
    want = {'mean rating': mu, 'user mean': va.u.map(tr.groupby('u').r.mean()).fillna(mu), 'item mean': va.i.map(tr.groupby('i').r.mean()).fillna(mu)}
    for n,p in want.items(): assert abs(rep.RMSE[n]-((va.r-p)**2).mean()**0.5)<1e-4
    p,t = learn.get_preds()
    assert abs(rep.RMSE['DotProductBias']-((p-t)**2).mean().sqrt())<1e-5 and abs(rep.MAE['DotProductBias']-(p-t).abs().mean())<1e-5
    rec = []
    for u,g in va[va.u>0].groupby('u'):
        pop = tr.i.value_counts().reindex(range(dls.n_items), fill_value=0)
        pop[list(tr.i[tr.u==u])+[0]] = -1
        top = pop.sort_values(ascending=False, kind='stable').index[:5]
        rec.append(len(set(top)&set(g.i))/g.i.nunique())
    assert abs(rep['recall@5']['popularity']-np.mean(rec))<0.03   # ties in popularity fall either way

def test_training_lists_leave_out_training_rows_only(learn):
    u = learn.dls.encode_ids([5], 'user')
    held = set(learn.dls.valid_ds.x[learn.dls.valid_ds.x[:,0]==u.item(),1].tolist())-{0}
    recs,_ = top_items(learn, u, learn.dls.n_items, seen='train')
    assert held and held<=set(recs[0].tolist())
    recs,_ = top_items(learn, u, learn.dls.n_items, seen='all')
    assert not held&set(recs[0].tolist())
