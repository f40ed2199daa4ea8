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

def naive_top(s, k):
    "Places of the best `k` finite scores of each row, equal ones by place"
    return [[i for i in sorted(range(len(r)), key=lambda i: (-r[i], i)) if r[i]>-math.inf][:k] for r in s.tolist()]

@pytest.mark.parametrize('n,m,k', [(7,30,3), (5,1000,10), (4,2571,1), (3,900,899), (6,640,640), (2,5,9)])
@pytest.mark.parametrize('ties', [False, True])
def test_top_places_against_a_sort(n, m, k, ties):
    s = torch.randn(n, m, generator=torch.Generator().manual_seed(n*m))
    if ties: s = (s*2).round()
    s[0,1:] = -torch.inf
    s[1] = 0.5
    vals,at = top_places(s, k)
    assert vals.shape==at.shape==(n,min(k, m)) and at.dtype==torch.int64
    for r,want in enumerate(naive_top(s, k)):
        assert at[r][vals[r]>-torch.inf].tolist()==want
    assert torch.equal(vals, s.gather(1, at))

@pytest.mark.parametrize('kind', ['dot','bias','squashed','cosine','nn','bare'])
@pytest.mark.parametrize('tile', [None, 90])
def test_lists_of_every_model_with_every_kind_of_set(learn, kind, tile):
    from torch import nn
    dls,g = learn.dls,torch.Generator().manual_seed(0)
    n_u,n_i = dls.n_users,dls.n_items
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.u,self.i = nn.Embedding(n_u, 3),nn.Embedding(n_i, 3)
        def forward(self, x): return (self.u(x[:,0])*self.i(x[:,1])).sum(1, keepdim=True)
    torch.manual_seed(1)
    model = dict(dot=lambda: DotProduct(n_u, n_i, 4), bias=lambda: DotProductBias(n_u, n_i, 4, mean=1.), squashed=lambda: DotProductBias(n_u, n_i, 4, (0,5)),
                 cosine=lambda: CosineProduct(n_u, n_i, 4), nn=lambda: CollabNN((n_u,3), (n_i,4), layers=(5,)), bare=Bare)[kind]()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(generator=g)
    from types import SimpleNamespace
    l = SimpleNamespace(model=model.eval(), dls=dls)
    users = torch.tensor([5,9,0,1,5])
    x = torch.stack([users.repeat_interleave(n_i), torch.arange(n_i).repeat(5)], 1)
    s = model(x).detach().reshape(5, n_i).clone()
    cands = torch.tensor([3,1,7,20,30,31,32,7])
    bar = (torch.tensor([0,0,4,1]), torch.tensor([3,30,31,1]))
    only = (torch.tensor([0,0,0,1,1,3,4]), torch.tensor([1,7,30,20,3,31,32]))
    for seen,c,e,o in ((None,None,None,None), ('train',None,bar,None), ('all',cands,bar,None), (None,cands,None,only), ('train',None,bar,only)):
        want = s.clone()
        want[:,0] = -torch.inf
        if seen:
            for r,u in enumerate(users.tolist()):
                if u:
                    rows = torch.cat([dls.train_ds.x]+([dls.valid_ds.x] if seen=='all' else [])).long()
                    want[r,rows[rows[:,0]==u,1]] = -torch.inf
        if c is not None: want[:,[i for i in range(n_i) if i not in c.tolist()]] = -torch.inf
        if e is not None: want[e] = -torch.inf
        if o is not None:
            ok = torch.zeros_like(want, dtype=torch.bool)
            ok[o] = True
            want[~ok] = -torch.inf
        recs,vals = top_items(l, users, 6, seen=seen, candidates=c, exclude=e, only=o, tile=tile)
        for r in range(5):
            filled = recs[r]>=0
            assert recs[r][filled].tolist()==naive_top(want, 6)[r]
            torch.testing.assert_close(vals[r][filled], want[r,recs[r][filled]], atol=1e-5, rtol=1e-5)
            assert (vals[r][~filled]==-torch.inf).all()

def test_threads_give_the_same_lists_and_leave_their_number_alone(learn):
    users,had = torch.arange(1, learn.dls.n_users),torch.get_num_threads()
    one = top_items(learn, users, 5, tile=80)
    try:
        torch.set_num_threads(3)
        three = top_items(learn, users, 5, tile=80)
        assert torch.get_num_threads()==3
    finally: torch.set_num_threads(had)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])

def test_sets_of_each_user_and_rules(learn):
    m = learn.dls.classes['title']
    base = learn.recommend([5,9], k=6)
    t5,t9 = (base.title[base.user==u].tolist() for u in (5,9))
    assert learn.recommend([5,9], k=3, exclude={5:t5[:2], 77:['x']}).title.tolist()==t5[2:5]+t9[:3]
    assert learn.recommend([5,9], k=2, exclude=['Nowhere',t5[0]], candidates=pd.DataFrame(dict(user=[5,5,9], title=[t5[0],t5[3],t9[1]]))).title.tolist()==[t5[3]]+[o for o in [t9[1]] if o!=t5[0]]
    old = m.ids.str[-5:-1].to_numpy()<'1990'
    rule = lambda us: np.stack([old if u==5 else ~old for u in us])
    got = learn.recommend([5,9], k=4, candidates=rule)
    assert (got.title[got.user==5].str[-5:-1]<'1990').all() and (got.title[got.user==9].str[-5:-1]>='1990').all()
    with pytest.raises(UnknownIdError, match="'Nowhere'"): learn.recommend(5, candidates={5:['Nowhere']})
    with pytest.raises(ValueError, match='is not a column'): learn.recommend(5, candidates=pd.DataFrame(dict(u=[5], title=['a'])))
    with pytest.raises(ValueError, match=r'`candidates` gave \(3,\)'): learn.recommend(5, candidates=lambda us: [True]*3)
    assert len(learn.recommend(5, candidates={9:t9}))==0 and len(learn.recommend(5, candidates={}))==0

def test_unknown_items_are_to_be_left_out(learn):
    for f in (lambda: learn.recommend(5, candidates=['Nowhere']), lambda: learn.similar_items('Nowhere'), lambda: learn.evaluate(candidates=['Nowhere'])):
        with pytest.raises(UnknownIdError, match="'Nowhere'; leave them out"): f()
    with pytest.raises(UnknownIdError, match='the known ids are int64, these are str'): learn.similar_users('5')

@pytest.mark.parametrize('known', [int, str])
def test_ids_of_another_type_are_told_apart_from_unknown_ones(known):
    other = str if known is int else int
    df = synth_ratings(60, 40, 1000).assign(item=lambda d: d.groupby('title').ngroup().map(known), user=lambda d: d.user.map(known))
    dls = CFDataLoaders.from_df(df, seed=3, device='cpu', bs=32)
    l = cf_learner(dls, n_factors=4, seed=0)
    us,its = (dls.classes[n].ids for n in ('user','item'))
    odd,later = [other(o) for o in its[:20]],df[:200].assign(item=lambda d: d.item.map(other))
    feats = pd.DataFrame(dict(item=[other(o) for o in its], x=np.arange(len(its))))
    sides = cf_learner(dls, SideProduct, n_factors=4, config=dict(items=feats.assign(item=its)))
    for f in (lambda: l.recommend(us[:2], exclude=odd), lambda: l.recommend(us[:2], exclude={us[0]: odd}), lambda: l.recommend(us[:2], candidates={us[0]: odd}),
              lambda: l.recommend(us[:2], exclude=pd.DataFrame(dict(user=[other(us[0])], item=its[:1])).astype({'user':object})),
              lambda: l.recommend(us[:2], candidates=pd.DataFrame(dict(user=[other(us[0])], item=its[:1])).astype({'user':'category'})),
              lambda: l.evaluate(split=later), lambda: l.evaluate(split=df[:200].assign(user=lambda d: d.user.map(other))), lambda: l.evaluate(candidates={us[0]: odd}),
              lambda: l.compare(l, split=later), lambda: l.fold_in(later), lambda: SideProduct.from_dls(dls, items=feats), lambda: cat_features(dls, 'item', feats.set_index('item'), ['x'])):
        with pytest.raises(TypeError, match=r'the known ids are \w+, these are \w+: convert them with .astype'): f()
    with pytest.raises(UnknownIdError, match='convert them with .astype'): l.recommend(us[0], candidates=odd)
    for f in (lambda: l.partial_fit(later), lambda: sides.add_ids(feats)):
        with pytest.raises(TypeError, match='give them the same type'): f()
    assert len(l.recommend(us[0], k=3, exclude=[known(10**6),known(10**7)]))==3

def test_a_few_ids_of_another_type_and_ids_that_are_unknown_in_both():
    known = pd.Index([7,8,9])
    for ids in ([10,11], ['a','7b'], [np.nan,2.5], [None], [], ['7','x','y','z'], pd.Series([10], dtype='category'), [pd.Timestamp(0)]): check_kinds(ids, known, 'ids')
    for ids in (['7'], ['7','8','x'], np.array(['7']), pd.Series(['9'], dtype='category'), pd.Index(['7'], dtype=object)):
        with pytest.raises(TypeError, match="ids such as '[79]': the known ids are int64, these are str: convert them with .astype.'int64'"): check_kinds(ids, known, 'ids')
    for ids in ([7], [7.], np.array([7]), pd.Series([7], dtype='Int64'), [np.nan,7], [None,7]):
        with pytest.raises(TypeError, match=r"ids such as 7.*: the known ids are \w+, these are \w+: convert them with .astype.'str'"): check_kinds(ids, known.astype(str), 'ids')

def naive_mmr(recs, scores, V, k, div):
    recs = [i for i in recs if i>=0]
    if not recs: return []
    s = np.array(scores[:len(recs)])
    rel = (s-s.min())/max(s.max()-s.min(), 1e-12)
    U = V/np.linalg.norm(V, axis=1, keepdims=True)
    out = []
    while recs and len(out)<k:
        val = [(1-div)*rel[j]-div*max((U[i]@U[o] for o in out), default=0.) if i not in out else -9 for j,i in enumerate(recs)]
        if max(val)==-9: break
        out.append(recs[int(np.argmax(val))])
    return out

def test_mmr_against_a_loop():
    rng = np.random.default_rng(0)
    V = rng.normal(size=(40,3))
    recs = np.stack([rng.permutation(np.arange(1, 40))[:12] for _ in range(9)])
    scores = -np.sort(-rng.normal(size=(9,12)))
    recs[2,5:],scores[2,5:] = -1,-np.inf
    recs[3],scores[3] = -1,-np.inf
    for div in (0., 0.3, 0.8, 1.):
        got,s = mmr(torch.tensor(recs), torch.tensor(scores), torch.tensor(V), 7, div)
        assert got.shape==s.shape==(9,7)
        for r in range(9): assert got[r][got[r]>=0].tolist()==naive_mmr(recs[r].tolist(), scores[r].tolist(), V, 7, div)
    assert got[3].tolist()==[-1]*7

def test_variety_rises_with_diversity(learn):
    V = learn.model.item_factors.detach()
    codes = lambda d: torch.from_numpy(learn.dls.classes['title'].encode(learn.recommend([5,9,1], k=5, diversity=d).title)).long().reshape(3, 5)
    near,far = (diversity(codes(d), V).mean() for d in (0., 0.9))
    assert far>near+0.1

def test_similar_users_is_the_cosine(learn):
    P,m = learn.model.user_factors.detach().numpy(),learn.dls.classes['user']
    near = learn.similar_users([m[4],m[7]], k=5)
    for c in (4,7):
        cos = P@P[c]/np.linalg.norm(P,axis=1)/np.linalg.norm(P[c])
        sub = near[near.user==m[c]]
        assert sub.similar.tolist()==[m[i] for i in np.argsort(-cos) if i not in (0,c)][:5] and np.allclose(sub.cosine, cos[[m.encode([o])[0] for o in sub.similar]], atol=1e-5)
    assert len(learn.similar_users(k=2))==2*(learn.dls.n_users-1)
    with pytest.raises(UnknownIdError): learn.similar_users(999)

def test_popularity_is_left_as_it_was(learn):
    pop = cf_learner(learn.dls, Popularity(learn.dls))
    before = pop.model.count.clone()
    pop.recommend([5], k=3), pop.recommend(k=3)
    assert torch.equal(pop.model.count, before)

def test_ids_in_any_container():
    "A title is one id, wherever it stands; sets and keys are lists of ids; users of another kind are an error with the mend"
    df = synth_ratings(40, 30, 600)
    dls = CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu')
    learn = cf_learner(dls, n_factors=3, seed=1)
    a,b = dls.classes['title'].ids[:2]
    every = dict(k=30, exclude_seen=False)
    full = learn.recommend(7, **every)
    for out in (a, [a], {a}, {7:a}, {7:{a}}): pd.testing.assert_frame_equal(learn.recommend(7, **{**every, 'k':29}, exclude=out).drop(columns='rank'), full[full.title!=a].reset_index(drop=True).drop(columns='rank'))
    for own in ([a,b], {a,b}, {7:[a,b]}, {7:{a,b}}, {7:pd.Series([a,b])}): assert set(learn.recommend(7, k=2, candidates=own, exclude_seen=False).title)=={a,b}
    for us in ({7,3}, {7:0,3:0}.keys(), iter([7,3]), (7,3)): assert set(learn.recommend(us, k=1).user)=={7,3}
    with pytest.raises(TypeError, match="users such as '7': the known ids are int64, these are str"): learn.recommend([7], candidates={'7':[a]})

def test_models_without_parameters():
    dls = CFDataLoaders.from_df(synth_ratings(40, 30, 600), item_name='title', rating_name=None, seed=1, device='cpu')
    learn = cf_learner(dls, Popularity)
    assert learn.predict((7,dls.classes['title'][1]))[2].item()==learn.model.count[1] and len(learn.validate())==1
    assert learn.recommend([7,3], k=2).user.tolist()==[7,7,3,3]

def test_lists_draw_no_random_numbers():
    dls = CFDataLoaders.from_df(synth_ratings(40, 30, 600), item_name='title', rating_name=None, seed=1, device='cpu')
    learn = cf_learner(dls, LightGCN, n_factors=4, loss_func=BPRLoss(), seed=1)
    before = torch.get_rng_state()
    learn.recommend(None, k=2)
    assert torch.equal(before, torch.get_rng_state())

def test_loaders_of_another_size_are_refused(tmp_path):
    "More ids than rows end in no index error from deep inside, fewer in no answer for somebody else"
    make = lambda n,m,k: CFDataLoaders.from_df(synth_ratings(n, m, k, seed=2), seed=1, device='cpu')
    learn,dls = cf_learner(make(60, 40, 1000), n_factors=5, seed=1),make(60, 40, 1000)
    for other,msg in ((make(90, 40, 1500),'made for 60 users, the loaders know 90'),(make(60, 20, 500),'made for 40 items, the loaders know 20')):
        learn.dls = other
        u,i = (other.classes[c].ids[-1] for c in ('user','item'))
        for f in (lambda: learn.recommend(u), lambda: learn.recommend(unk='mean'), lambda: learn.similar_items(i), lambda: learn.similar_users(u), lambda: learn.cat_view(),
                  lambda: learn.biases(), lambda: learn.nearest(i), lambda: learn.explain(u, i), lambda: learn.save_bundle(tmp_path/'b'), learn.evaluate):
            with pytest.raises(ValueError, match=msg): f()
        assert not (tmp_path/'b').exists()
    learn.dls = dls
    assert len(learn.recommend(dls.classes['user'].ids[-1], k=3))==3

def test_a_frame_or_a_dict_is_no_list_of_ids():
    df = synth_ratings(60, 40, 1000)
    learn = cf_learner(CFDataLoaders.from_df(df, device='cpu'), n_factors=4)
    for odd in (df[:3],{7:1}):
        for f in (learn.recommend,learn.similar_items,learn.similar_users):
            with pytest.raises(TypeError, match=f'one id or several, got a {type(odd).__name__}: pass its column'): f(odd)
    assert learn.recommend(df.user[:3], k=2).user.nunique()==df.user[:3].nunique()

@pytest.mark.parametrize('ids', [lambda u: u.map(lambda o: f'guest{o}' if o%9==1 else o).astype(object), lambda u: pd.to_datetime(u, unit='D'), lambda u: pd.to_timedelta(u, unit='D')],
                         ids=['mixed','dates','spans'])
def test_sets_of_users_of_any_kind(ids):
    "What the model knows is not taken for ids of another type, whichever comes first"
    df = synth_ratings(40, 30, 400, seed=1)
    df['user'] = ids(df.user)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=1, device='cpu'), n_factors=3, seed=0)
    users = sorted(df.user.drop_duplicates(), key=str)[-3:] # guests
    free = learn.recommend(users, k=5)
    barred = free.groupby('user', sort=False).item.first()
    res = learn.recommend(users, k=4, exclude={u: [i] for u,i in barred.items()})
    assert res.item.tolist()==[i for _,g in free.groupby('user', sort=False) for i in g.item[1:]]
    cands = pd.DataFrame({'user':free.user, 'item':free.item})
    assert learn.recommend(users, k=5, candidates=cands).item.tolist()==free.item.tolist()
