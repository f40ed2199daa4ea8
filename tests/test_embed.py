"Embeddings: the lesson's equalities at other shapes, rules and budgets over all loaders, shrinking over all models"
from functools import cache

import numpy as np,pandas as pd,pytest,torch
import torch.nn.functional as F
from torch import nn
from fastai.collab import CollabDataLoaders,collab_learner
from fastai.tabular.all import Categorify,Normalize,RandomSplitter,TabularDataLoaders,TabularPandas,emb_sz_rule,range_of,tabular_learner
import cfext.embed as embed
from cfext.data import CFDataLoaders
from cfext.embed import *
from cfext.graph import LightGCN
from cfext.learner import cf_learner
from cfext.models import CollabNN,DotProduct,DotProductBias,EmbeddingNet
from cfext.sources import synth_ratings

ratings = synth_ratings(60, 40, 900)
frame = ratings.assign(day=lambda d: d.timestamp%7, x=lambda d: np.sin(d.timestamp), rating=lambda d: d.rating.astype('float32'))
cats = ['user','title','day']

@cache
def cf_dls(): return CFDataLoaders.from_df(ratings, item_name='title', seed=1, bs=16, device='cpu')
@cache
def collab_dls(): return CollabDataLoaders.from_df(ratings, item_name='title', rating_name='rating', seed=1, bs=16, device='cpu')
@cache
def tab_dls():
    return TabularDataLoaders.from_df(frame, procs=[Categorify,Normalize], cat_names=cats, cont_names=['x'], y_names='rating', bs=16, seed=1, device='cpu')
@cache
def tab_pandas(): return TabularPandas(frame, [Categorify], cats, ['x'], y_names='rating', splits=RandomSplitter(.25, seed=3)(range_of(frame)))
all_dls = [cf_dls,collab_dls,tab_dls,tab_pandas]

@pytest.mark.parametrize('shape', [(3,),(2,5),(4,1,3),(0,)])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
@pytest.mark.parametrize('idtype', [torch.int64,torch.int32,torch.uint8])
def test_one_hot_is_lookup(shape, dtype, idtype):
    gen = torch.Generator().manual_seed(0)
    table,idxs = torch.randn(7, 4, generator=gen, dtype=dtype),torch.randint(7, shape, generator=gen).to(idtype)
    grads = []
    for f in (one_hot_lookup, lambda i,t: t[i.long()], lambda i,t: F.embedding(i.long(), t)):
        t = table.clone().requires_grad_()
        out = f(idxs, t)
        assert out.shape==(*shape,4) and out.dtype==dtype
        (out**3).sum().backward()
        grads.append((out.detach(),t.grad))
    for out,g in grads[1:]: assert torch.equal(out, grads[0][0]) and torch.allclose(g, grads[0][1], atol=1e-6)

def test_create_params_follows_the_seed_and_nothing_else():
    torch.manual_seed(3); a = create_params(50, 4)
    torch.manual_seed(3); b = create_params((50,4))
    assert torch.equal(a, b) and isinstance(a, nn.Parameter) and abs(a.std().item()-.01)<.002
    state = torch.get_rng_state()
    c,d = create_params([50,4], seed=5),create_params(50, 4, seed=torch.Generator().manual_seed(5))
    assert torch.equal(c, d) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(create_params(3, seed=np.int64(5)), create_params(3, seed=5))
    u = create_params(9, 200, init=(-2,1), seed=0)
    assert u.min()>=-2 and u.max()<1 and abs(u.mean().item()+.5)<.1
    assert create_params(0, 3).shape==(0,3) and create_params(6).shape==(6,)
    for bad in (dict(init=(1,1)), dict(init='he')):
        with pytest.raises(ValueError, match='init'): create_params(3, **bad)

def test_eff_card():
    from scipy.stats import entropy
    c = np.random.default_rng(0).integers(0, 50, 30)
    assert np.isclose(eff_card(c), np.exp(entropy(c)))
    assert np.isclose(eff_card(c*17), eff_card(c)) and eff_card([0,0,3])==1
    for bad in ([], [0,0], [-1,2], [[1,2]]):
        with pytest.raises(ValueError, match='counts'): eff_card(bad)

def test_rules_by_hand():
    hand = dict(fastai={2:2, 10:6, 1000:77, 10**6:600}, course={2:1, 10:5, 1000:50}, google={2:1, 16:2, 10**6:32}, merlin={16:4, 10**6:64},
                dcn={16:12, 10**6:190}, log={1:1, 2:1, 9:4, 1024:10}, full={1:1, 8:7})
    for rule,want in hand.items(): assert {n:emb_rules[rule](n) for n in want}==want
    assert emb_sz_count([0]+[5]*20)==emb_sz_fastai(21)
    assert emb_sz_count([0,1000]+[1]*5000)<emb_sz_fastai(5002)

@pytest.mark.parametrize('make', all_dls)
def test_counts_over_loaders(make):
    dls = make()
    counts = cat_counts(dls)
    n = len(dls.train) if make is tab_pandas else len(dls.train_ds)
    assert list(counts)==list(dls.cat_names) and all(c.sum()==n and len(c)==len(dls.classes[k]) for k,c in counts.items())
    full = {k:pd.concat([pd.Series(cat_codes(dls, i)[k]) for i in (0,1)]) for k in counts}
    for k,codes in full.items():
        got = pd.Series(np.array(list(dls.classes[k]), dtype=object)[codes]).value_counts().sort_index()
        assert got.to_dict()==frame[k].value_counts().to_dict() or '#na#' in got

@pytest.mark.parametrize('make', all_dls)
@pytest.mark.parametrize('rule', [*emb_rules, lambda n: 1, lambda n: n/3])
@pytest.mark.parametrize('budget', [None,200,777,5000,10**9])
def test_budget_is_kept(make, rule, budget):
    dls = make()
    ns = {k:len(c) for k,c in cat_counts(dls).items()}
    szs = get_emb_szs(dls, rule, budget=budget, max_sz=30)
    spent = sum(ns[k]*w for k,w in szs.items())
    assert list(szs)==list(ns) and all(type(w) is int and 1<=w<=30 for w in szs.values())
    if budget is None: return
    assert spent<=budget
    capped = all(w==min(30, ns[k]-1) for k,w in szs.items())
    assert capped or any(budget-spent<n for k,n in ns.items() if szs[k]<min(30, n-1))
    same = get_emb_szs(dls, rule, budget=4*budget+3, unit='bytes', max_sz=30)
    assert same==szs

def test_shared_and_custom():
    dls = cf_dls()
    ns = [len(dls.classes[k]) for k in dls.cat_names]
    assert set(get_emb_szs(dls, shared=True).values())=={emb_sz_rule(min(ns))}
    w = set(get_emb_szs(dls, shared=True, budget=1000).values())
    assert w=={1000//sum(ns)}
    assert set(get_emb_szs(dls, shared=True, max_sz=3).values())=={3}
    assert get_emb_szs(dls, lambda n: n//10)==dict(user=ns[0]//10, title=ns[1]//10)
    with pytest.raises(ValueError, match='below one for each'): get_emb_szs(dls, shared=True, budget=50)
    with pytest.raises(ValueError, match='max_sz'): get_emb_szs(dls, max_sz=0)
    with pytest.raises(TypeError, match='categorical columns'): get_emb_szs(ratings)
    table = compare_emb_szs(dls, ['fastai','google'], budget=2000)
    assert table.index.tolist()==['fastai','google'] and (table.params<=2000).all()

@pytest.mark.parametrize('budget', [None,900])
def test_sizes_go_straight_into_models(budget):
    tab = tab_dls()
    szs = get_emb_szs(tab, 'count', budget=budget)
    learn = tabular_learner(tab, layers=[5], emb_szs=szs)
    assert [e.embedding_dim for e in learn.model.embeds]==list(szs.values())
    dls = cf_dls()
    szs = get_emb_szs(dls, budget=budget)
    learn = cf_learner(dls, model='nn', emb_szs=szs)
    assert {k:t.shape for k,t in cat_tables(learn).items()}=={k:(len(dls.classes[k]),w) for k,w in szs.items()}
    col = collab_dls()
    learn = collab_learner(col, use_nn=True, emb_szs=get_emb_szs(col), layers=[5], y_range=(0,6))
    assert {k:t.shape[1] for k,t in cat_tables(learn).items()}==get_emb_szs(col)

def test_report_does_not_touch_the_learner():
    learn = cf_learner(cf_dls(), model='nn')
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    rep = emb_report(learn)
    assert rep.columns.tolist()==['n','effective','width','params','bytes','rank'] and (rep.bytes==4*rep.params).all()
    assert (rep['rank']<=rep.width).all() and (rep.effective<=rep.n).all()
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert emb_report(tab_dls(), {'day':3}, plot=False).loc['day','width']==3

def test_effective_rank():
    gen = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(40, 5, generator=gen))[0]
    t = (q-q.mean(0))@torch.diag(torch.tensor([1.,1,1,0,0]))
    assert 2.5<effective_rank(t)<3.01
    s = torch.linalg.svdvals((t-t.mean(0)).double())
    assert torch.allclose(emb_spectrum(t), s, atol=1e-8)
    wild = torch.cat([t, 100*torch.randn(3, 5, generator=gen)])
    assert np.isclose(effective_rank(wild, [1]*40+[0]*3), effective_rank(t))

@pytest.mark.parametrize('n,m,d,r', [(20,9,6,3),(5,30,8,4),(4,3,6,6),(9,9,1,1)])
@pytest.mark.parametrize('weighted', [False,True])
def test_low_rank_is_the_best(n, m, d, r, weighted):
    gen = torch.Generator().manual_seed(n)
    a,b = torch.randn(n, d, generator=gen, dtype=torch.float64),torch.randn(m, d, generator=gen, dtype=torch.float64)
    w = torch.rand(n, generator=gen, dtype=torch.float64)+.1 if weighted else torch.ones(n, dtype=torch.float64)
    x,y = low_rank(a, b, r, w if weighted else None)
    full = (a@b.T)*w.sqrt()[:,None]
    u,s,vt = torch.linalg.svd(full, full_matrices=False)
    assert torch.allclose((x@y.T)*w.sqrt()[:,None], (u[:,:r]*s[:r])@vt[:r], atol=1e-9)
    assert x.shape==(n,min(r,n,m,d)) and y.shape==(m,min(r,n,m,d))

def fitted(kind):
    if kind=='tabular': learn = tabular_learner(tab_dls(), layers=[8,6], emb_szs=dict(user=7, title=5, day=3), y_range=(0,6))
    elif kind=='fastai dot': learn = collab_learner(collab_dls(), n_factors=6, y_range=(0,6))
    elif kind=='fastai nn': learn = collab_learner(collab_dls(), use_nn=True, emb_szs=dict(user=7, title=5), layers=[8], y_range=(0,6))
    elif kind=='nn': learn = cf_learner(cf_dls(), model='nn', emb_szs=dict(user=7, title=5), config=dict(layers=[8,4], use_bn=True, ps=.1, embed_p=.1), y_range=(0,6))
    else: learn = cf_learner(cf_dls(), model=dict(dot=DotProduct, bias=DotProductBias, net=EmbeddingNet)[kind], n_factors=6, y_range=(0,6))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn

@pytest.mark.parametrize('kind', ['dot','bias','net','nn','fastai dot','fastai nn','tabular'])
def test_shrink(kind):
    learn = fitted(kind)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    xs = learn.dls.valid.one_batch()[:-1]
    def pred(m):
        training = [o.training for o in m.modules()]
        m.eval()
        with torch.no_grad(): res = m(*xs)
        for o,t in zip(m.modules(), training): o.training = t
        return res
    full = shrink(learn, 1000)
    assert torch.allclose(pred(full), pred(learn.model), atol=1e-4)
    errs = []
    for r in (4,2,1):
        small = shrink(learn, r)
        ts = cat_tables(small)
        assert all(t.shape[1]<=r for t in ts.values()) and pred(small).shape==pred(learn.model).shape
        assert [m.training for m in small.modules()]==[m.training for m in learn.model.modules()]
        errs.append((pred(small)-pred(learn.model)).pow(2).mean().item())
        if hasattr(small, 'config'):
            again = type(small)(**small.config)
            again.load_state_dict(small.state_dict())
            assert torch.equal(pred(again.eval()), pred(small.eval()))
    assert errs[0]<=errs[-1]+1e-9
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    model,curve = learn.model,shrink_curve(learn, [1000,2])
    assert learn.model is model and abs(curve.valid_loss.iloc[0]-curve.valid_loss.iloc[1])<1e-4

def test_shrink_keeps_training():
    learn = fitted('nn')
    learn.model = shrink(learn, 2)
    learn.create_opt()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert np.isfinite(learn.validate()[0])

def test_shrink_refuses_tables_that_are_worked_out():
    dls = CFDataLoaders.from_df(synth_ratings(40, 30, 600), item_name='title', device='cpu')
    with pytest.raises(ValueError, match="can't shrink LightGCN"): shrink(cf_learner(dls, LightGCN, n_factors=8), 3)

def test_shrink_refuses():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.user_factors,self.item_factors = create_params(6,3, init=(-1,1), seed=1),create_params(4,3, init=(-1,1), seed=2)
        def forward(self, x): return (self.user_factors[x[:,0]].abs()*self.item_factors[x[:,1]]).sum(1, keepdim=True)
    with pytest.raises(ValueError, match="can't shrink it"): shrink(Odd(), 2)
    bn_first = tabular_learner(tab_dls(), layers=[8], config=dict(lin_first=False))
    with pytest.raises(ValueError): shrink(bn_first, 2)
    with pytest.raises(ValueError, match='has no embedding tables'): shrink(nn.Linear(2,1), 2)
    with pytest.raises(ValueError, match='`sz`=0'): shrink(fitted('dot'), 0)
    with pytest.raises(ValueError, match='names'): shrink(fitted('tabular'), dict(shop=2))

def test_names():
    import fastai.collab,fastai.tabular.all,fastai.text.all,fastai.vision.all
    theirs = set().union(*(dir(m) for m in (fastai.collab, fastai.tabular.all, fastai.text.all, fastai.vision.all)))
    assert not theirs&set(embed.__all__)
