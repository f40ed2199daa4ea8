"Ranking losses against float64 loops, the sampler against its distribution, and what the callback leaves alone"
import math

import numpy as np,pandas as pd,pytest,torch
from fastai.callback.training import GradientClip
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from cfext import *
from cfext.losses import *
from cfext.negatives import *

pytestmark = pytest.mark.usefixtures('quiet')
inf = math.inf

def table(seed=0, bs=5, n=4, cosine=False):
    "Scores with excluded places, a row without any negative among them"
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(bs, 1+n, generator=g, dtype=torch.float64)*(1 if cosine else 2)
    if cosine: t = t.tanh()
    t[1,2] = t[2,1] = t[2,4] = -inf
    t[3,1:] = -inf
    return t

sig = lambda z: 1/(1+math.exp(-z))
H = lambda n: sum(1/t for t in range(1, n+1))
def live(r): return [s for s in r[1:] if s>-inf]
def naive_bpr(r): return -sum(math.log(sig(r[0]-s)) for s in live(r))/max(1, len(live(r)))
def naive_hinge(r): return sum(max(0, 0.7-r[0]+s) for s in live(r))/max(1, len(live(r)))
def naive_warp(r):
    for n,s in enumerate(live(r), 1):
        if 0.7-r[0]+s>0: return H(30//n)*(0.7-r[0]+s)
    return 0.
def naive_bce(r): return -math.log(sig(r[0]))-sum(math.log(1-sig(s)) for s in live(r))
def naive_sampled(r): return math.log(sum(math.exp(s/0.5) for s in [r[0],*live(r)]))-r[0]/0.5
def naive_ccl(r): return 1-r[0]+3*sum(max(0, s-0.2) for s in live(r))/max(1, len(live(r)))

cases = [(BPRLoss, {}, naive_bpr), (HingeLoss, dict(margin=0.7), naive_hinge), (WARPLoss, dict(margin=0.7, n_items=31), naive_warp),
         (BCELoss, {}, naive_bce), (SampledSoftmaxLoss, dict(temp=0.5), naive_sampled), (CCLLoss, dict(margin=0.2, weight=3.), naive_ccl)]

@pytest.mark.parametrize('cls,kw,naive', cases, ids=lambda o: getattr(o, '__name__', ''))
def test_losses_against_a_naive_loop(cls, kw, naive):
    t = table(cosine=cls is CCLLoss)
    want = torch.tensor([naive(r.tolist()) for r in t], dtype=torch.float64)
    got = cls(reduction='none', **kw)(t)
    assert got.shape==(5,) and got.dtype==torch.float64
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cls(**kw)(t, torch.ones(5,1)), want.mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cls(reduction='sum', **kw)(t), want.sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cls(reduction='none', **kw)(t.float()).double(), want, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('cls,kw,naive', cases, ids=lambda o: getattr(o, '__name__', ''))
def test_gradients(cls, kw, naive):
    t = table(1, cosine=cls is CCLLoss)
    mask,free = t==-inf,t.masked_fill(t==-inf, 0.).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: cls(**kw)(o.masked_fill(mask, -inf)), (free,), eps=1e-7, atol=1e-5)

def test_full_softmax():
    g = torch.Generator().manual_seed(0)
    s,y = torch.randn(6, 9, generator=g, dtype=torch.float64),torch.arange(6)
    pos = s.gather(1, y[:,None])
    for temp in (1., 0.3):
        want = torch.nn.functional.cross_entropy(s/temp, y, reduction='none')
        torch.testing.assert_close(FullSoftmaxLoss(temp, reduction='none')(torch.cat([pos,s], 1)), want)
        lse = temp*(s/temp).logsumexp(1, keepdim=True)
        torch.testing.assert_close(FullSoftmaxLoss(temp, reduction='none')(torch.cat([pos,lse], 1)), want)

def test_extreme_scores_stay_finite():
    t = torch.tensor([[80.,-90.,100.],[-1e4,1e4,-inf]], requires_grad=True)
    for cls,kw,_ in cases[:-1]:
        val = cls(**kw)(t)
        g, = torch.autograd.grad(val, t)
        assert val.isfinite() and g.isfinite().all(), cls.__name__

n_users,n_items = 7,12
x = torch.tensor([[1,3],[1,1],[1,3],[1,11],[2,5],*[[4,i] for i in range(1,n_items)],[6,1],[6,2],[6,11],[5,0],[0,4]])

def test_seen_items_hold_what_was_seen():
    s = SeenItems(x, n_users, n_items)
    us,its = torch.arange(n_users),torch.arange(n_items)
    have = {(u,i) for u,i in x.tolist() if u and i}
    assert [(u,i) for u in range(n_users) for i in range(n_items) if s.has(us, its)[u,i]]==sorted(have)
    none = SeenItems(x[:0], n_users, n_items)
    assert not none.has(us, its).any() and (none.draw(us, 50)>0).all()
    assert not SeenItems(x[:0], n_users, 1).draw(us, 2).any()

def test_marks_of_a_large_catalogue_are_few_and_never_wrong():
    g = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randint(1, 900, (4000,), generator=g),torch.randint(1, 800, (4000,), generator=g)], 1)
    s = SeenItems(x, 900, 800)
    assert len(s.marks)==16*len(s.keys)<900*800
    want = torch.zeros(900, 800, dtype=torch.bool)
    want[x[:,0],x[:,1]] = True
    assert torch.equal(s.has(torch.arange(900), torch.arange(800)), want)

def test_ln_q_is_worked_out_where_a_loss_asks_for_it():
    ds = dls_of().train_ds
    s,b = NegativeSampler(ds, 6),ds.x[:9].long()
    a,bare = (s.draw(b, torch.Generator().manual_seed(0), with_logq=o) for o in (True,False))
    assert torch.equal(a[0], bare[0]) and torch.equal(a[1], bare[1]) and a[2].shape==(9,6) and bare[2] is None

@pytest.mark.parametrize('how,n_marks', [('draw',None), ('draw',7), ('around',None)])
@pytest.mark.parametrize('alpha', [0., 0.75, 1.])
def test_draws_follow_the_weights_among_unseen_items(alpha, how, n_marks):
    from scipy.stats import chisquare
    count = torch.tensor([0,50,3,40,7,1,20,9,30,2,15,60])
    w = item_weights(count, alpha)
    s = SeenItems(x, n_users, n_items, w)
    if n_marks: # so few places that they collide
        s.marks = torch.zeros(n_marks, dtype=torch.bool)
        s.marks[s.keys%n_marks] = True
    n = 40_000
    users,g = torch.arange(1, n_users),torch.Generator().manual_seed(0)
    d = s.draw(users, n, g) if how=='draw' else s.around(users, torch.rand(len(users), n, generator=g, dtype=torch.float64))
    for u,row in enumerate(d, 1):
        seen = {i for v,i in x.tolist() if v==u and i}
        free = [i for i in range(1, n_items) if i not in seen]
        got = torch.bincount(row, minlength=n_items)
        if not free:
            assert got[0]==n
            continue
        assert got.sum()==got[free].sum(), 'a seen item was drawn'
        p = np.array([count[i]**alpha for i in free], float)
        assert chisquare(got[free].numpy(), p/p.sum()*n).pvalue>1e-3

@pytest.mark.parametrize('alpha', [0., 0.75])
@pytest.mark.parametrize('n', [1, 3])
def test_draws_are_the_same_in_any_batches(alpha, n):
    s = SeenItems(x, n_users, n_items, item_weights(torch.arange(n_items), alpha))
    users = torch.arange(n_users).repeat(40)
    a,b = torch.Generator().manual_seed(0),torch.Generator().manual_seed(0)
    assert torch.equal(s.draw(users, n, a), torch.cat([s.draw(u, n, b) for u in users.split([1,7,100,172])]))

def dls_of(n_users=60, n_items=40, n=1000, bs=32, **kw):
    return CFDataLoaders.from_df(synth_ratings(n_users, n_items, n), item_name='title', seed=3, device='cpu', bs=bs, **kw)

@pytest.mark.parametrize('how,kw', [('uniform',{}), ('uniform',dict(shared=True)), ('popularity',dict(alpha=0.5)), ('popularity',dict(shared=True)),
                                    ('batch',{}), ('uniform',dict(seen=False)), ('popularity',dict(seen=False))])
def test_probabilities_are_those_of_the_draws(how, kw):
    "The mean of sum(f/q)/n over draws is the sum of f over what may be drawn, as the sampled softmax needs"
    ds = dls_of().train_ds
    s = NegativeSampler(ds, n_neg=None if how=='batch' else 25, how=how, **kw)
    g = torch.Generator().manual_seed(0)
    f = torch.rand(ds.n_items, generator=g)+0.5
    users = ds.x[:4].long()
    est = torch.zeros(4)
    reps = 600
    for _ in range(reps):
        rows = ds.x[torch.randint(len(ds), (40,), generator=g)].long() if how=='batch' else users[:0]
        neg,keep,logq = s.draw(torch.cat([users,rows]), g)
        val = (f[neg]*(-logq).exp()*keep)/keep.sum(1, keepdim=True).clamp(min=1)
        est += val[:4].sum(1)/reps
    all_seen = {(u,i) for u,i in ds.x.tolist()}
    for r,(u,i) in enumerate(users.tolist()):
        free = [j for j in range(1, ds.n_items) if j!=i and (not s.seen or (u,j) not in all_seen)]
        assert abs(est[r]/f[free].sum()-1)<0.05, (how, kw)

def test_excluded_places():
    ds = dls_of().train_ds
    for how,kw in (('uniform',{}), ('uniform',dict(shared=True)), ('batch',{}), ('popularity',{}), ('hard',{})):
        s = NegativeSampler(ds, n_neg=6, how=how, **kw)
        b = ds.x[:9].long()
        neg,keep,logq = s.draw(b, None, lambda u,i: torch.rand(i.shape))
        full = neg.expand(9, -1) if neg.ndim==1 else neg
        assert full.shape==keep.shape==(9,6)
        assert not s.items.has(b[:,0], full)[keep].any() and (full[keep]!=0).all()
        assert logq is None if how=='hard' else logq.shape==(9,6)

def test_a_user_who_has_seen_everything_has_no_negatives():
    df = pd.DataFrame(dict(user=[1]*6+[2]*2, item=[1,2,3,4,5,6,1,2]))
    dls = CFDataLoaders.from_df(df, rating_name=None, valid_pct=0, device='cpu', bs=4)
    for how in ('uniform','popularity','hard'):
        neg,keep,_ = NegativeSampler(dls.train_ds, 3, how).draw(torch.tensor([[1,2],[2,1]]), None, lambda u,i: torch.rand(i.shape))
        assert not keep[0].any() and keep[1].all()
    learn = cf_learner(dls, DotProduct, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(3))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.1)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_generators_of_a_gpu_are_left_out_of_an_export():
    from types import SimpleNamespace
    cb = Negatives(seed=1)
    cb.gen,cb.valid_gen = SimpleNamespace(device=torch.device('cuda')),torch.Generator()
    state = cb.__getstate__()
    assert state['gen'] is None and state['valid_gen'] is cb.valid_gen and cb.gen is not None

def test_seed_and_global_generator():
    dls = dls_of()
    def run(seed, glob):
        torch.manual_seed(0)
        l = cf_learner(dls_of(), DotProduct, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(2, seed=seed), seed=1, unk_p=0)
        torch.manual_seed(glob)
        with l.no_bar(),l.no_logging(): l.fit(1, 0.05)
        return l.model.user_factors.detach(),torch.rand(1)
    (a,ra),(b,rb),(c,_) = run(5, 1),run(5, 2),run(6, 1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(1)
    assert torch.equal(ra, torch.rand(1))
    s = NegativeSampler(dls.train_ds, 5)
    draw = lambda k: s.draw(dls.train_ds.x[:8].long(), torch.Generator().manual_seed(k))[0]
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))

all_losses = [(BPRLoss(), {}), (HingeLoss(), dict(how='popularity')), (WARPLoss(), {}), (BCELoss(), {}), (FullSoftmaxLoss(), {}),
              (SampledSoftmaxLoss(), dict(how='batch')), (SampledSoftmaxLoss(), dict(n_neg=30, how='popularity', shared=True)),
              (BPRLoss(), dict(how='hard', pool=5)), (CCLLoss(margin=0.2), dict(n_neg=10))]

@pytest.mark.parametrize('loss,kw', all_losses, ids=lambda o: type(o).__name__ if not isinstance(o, dict) else o.get('how',''))
def test_every_loss_learns_planted_groups(loss, kw):
    g = torch.Generator().manual_seed(0)
    u = torch.arange(60).repeat_interleave(10)
    df = pd.DataFrame(dict(user=u, item=u%3+3*torch.randint(15, (600,), generator=g))).drop_duplicates()
    dls = CFDataLoaders.from_df(df, rating_name=None, seed=1, device='cpu', bs=32)
    torch.manual_seed(0)
    learn = cf_learner(dls, CosineProduct if isinstance(loss, CCLLoss) else 'dot', n_factors=6, loss_func=loss, cbs=Negatives(seed=0, **kw))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(8, 0.05)
    codes = lambda us: dls.encode_ids(us, 'user')
    recs,_ = top_items(learn, codes(list(range(60))), 3)
    right = np.array([[dls.classes['item'].ids[i-1]%3==n%3 for i in r] for n,r in enumerate(recs.tolist())])
    assert right.mean()>0.9, right.mean()
    p,t = learn.get_preds()
    assert p.shape==(len(dls.valid_ds),1)
    torch.testing.assert_close(p, learn.model.eval()(dls.valid_ds.x.long()).detach())

@pytest.mark.parametrize('loss,kw', all_losses, ids=lambda o: type(o).__name__ if not isinstance(o, dict) else o.get('how',''))
def test_the_lean_loop_gives_the_numbers_of_fastais(loss, kw):
    def run(fast):
        learn = cf_learner(dls_of(), CosineProduct if isinstance(loss, CCLLoss) else DotProduct, n_factors=3, loss_func=loss, cbs=Negatives(seed=0, **kw), seed=0, fast=fast)
        torch.manual_seed(1)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.05)
        return [p.detach() for p in learn.model.parameters()],learn.recorder.values
    (a,va),(b,vb) = run(True),run(False)
    for p,q in zip(a, b): torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(va, vb, rtol=1e-4)

def test_full_softmax_in_the_loop_is_cross_entropy_over_the_catalogue():
    dls = dls_of()
    x = dls.valid_ds.x.long()
    for model,y_range in ((DotProduct,None), ('dot',None), ('dot',(0,5.5)), (CosineProduct,None), ('nn',None)):
        learn = cf_learner(dls, model, n_factors=3, y_range=y_range, loss_func=FullSoftmaxLoss(0.5), cbs=Negatives(), seed=0)
        with torch.no_grad():
            for p in learn.model.parameters(): p.normal_(0, 0.5)
        learn.model.eval()
        s = learn.model.score_items(x[:,0])[:,1:]/0.5
        want = (s.logsumexp(1)-learn.model(x)[:,0]/0.5).mean()
        for dls.valid.bs in (8192,7): assert abs(learn.validate()[0]-want)<1e-5, model
        with torch.no_grad():
            for p in learn.model.parameters(): p.normal_(0, 0.5)
        assert abs(learn.validate()[0]-want)>1e-3, 'what was worked out for other weights was kept'

def test_other_callbacks_and_row_weights():
    df = synth_ratings(60, 40, 1000).assign(w=lambda d: (d.rating>=4).astype(float))
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None, weight_name='w', seed=3, device='cpu', bs=32)
    learn = cf_learner(dls, n_factors=3, loss_func=BPRLoss(), cbs=[Negatives(2, seed=0), GradientClip(1.), SaveModelCallback(fname='t', with_opt=False)], seed=0, unk_p=0)
    learn.path = dls.path
    import tempfile,pathlib
    with tempfile.TemporaryDirectory() as d, learn.no_bar(),learn.no_logging():
        learn.path = pathlib.Path(d)
        learn.fit(2, 0.05)
    never = ~torch.isin(torch.arange(dls.n_users), dls.train_ds.x[dls.train_ds.w>0,0].long())
    fresh = cf_learner(dls, n_factors=3, seed=0, unk_p=0)
    torch.testing.assert_close(learn.model.user_factors[never], fresh.model.user_factors[never], atol=0.02, rtol=0)

def test_valid_loss_is_the_same_twice_and_network_models_train():
    dls = dls_of()
    for model in ('dot','nn'):
        learn = cf_learner(dls, model, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(2))
        assert learn.validate()[0]==learn.validate()[0]
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    assert learn.model.score_pairs(torch.tensor([1,2]), torch.tensor([[1,2,3],[4,5,6]])).shape==(2,3)

def test_errors():
    dls = dls_of()
    with pytest.raises(ValueError, match='cbs=Negatives'): Learner(dls, DotProduct(dls.n_users, dls.n_items, 4), loss_func=BPRLoss()).validate()
    assert [cb for cb in cf_learner(dls, loss_func=BPRLoss()).cbs if isinstance(cb, Negatives)]
    with pytest.raises(ValueError, match='hard negatives have none'):
        cf_learner(dls, loss_func=SampledSoftmaxLoss(), cbs=Negatives(2, 'hard')).validate()
    with pytest.raises(ValueError, match='`n_neg`=0'): NegativeSampler(dls.train_ds, 0)
    with pytest.raises(ValueError, match='`shared` goes with'): NegativeSampler(dls.train_ds, 2, 'hard', shared=True)
    with pytest.raises(ValueError, match='`alpha`=nan'): NegativeSampler(dls.train_ds, 2, 'popularity', alpha=math.nan)

def test_positives(recwarn):
    dls = dls_of()
    few = dls.positives(4.5)
    assert len(few.train_ds)==(dls.train_ds.y>=4.5).sum() and few.n_users==dls.n_users and (few.valid_ds.y==1).all()
    assert (dls.train_ds.y<4.5).any() and few.train.bs==32 and few.train.shuffle and not few.valid.shuffle
    with pytest.raises(ValueError, match='at least 9'): dls.positives(9)

def test_what_was_rated_low_is_seen_unless_asked():
    dls = dls_of()
    low = lambda d: d.frame((d.x[d.y[:,0]<4],))
    pairs = lambda df: set(zip(df.iloc[:,0], df.iloc[:,1]))
    train,valid = pairs(low(dls.train_ds)),pairs(low(dls.valid_ds))
    got = {}
    for low_seen in (True,False):
        few = dls.positives(4, low_seen=low_seen)
        learn = cf_learner(few, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(20, seed=0), metrics=list_metrics('recall', k=5), seed=0)
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.05)
        x = dls.train_ds.x[dls.train_ds.y[:,0]<4].long()
        drawn = learn.negatives.sampler.draw(x)[0]
        recs = learn.recommend(k=38)
        got[low_seen] = (drawn==x[:,1:]).any().item(),bool(pairs(recs[['user','title']])&train),bool(pairs(recs[['user','title']])&valid)
        top = top_items(learn, torch.arange(1, dls.n_users), 39, seen='train')[0]
        m = few.classes['title'].decode
        in_lists = {(u, t) for u,r in zip(few.classes['user'].ids, top) for t in m(r[r>0])}
        assert bool(in_lists&train)!=low_seen and in_lists&valid, 'held-out rows are not known to whoever makes lists to be judged'
        assert learn.validate()[1]==pytest.approx(learn.evaluate(k=5)['recall@5'].iloc[0], rel=1e-5)
    assert got=={True:(False,False,False), False:(True,True,True)}
    assert len(seen_rows(dls.positives(3).positives(1, low_seen=True)))==len(dls.train_ds)+len(dls.valid_ds)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('loss,kw', all_losses, ids=lambda o: type(o).__name__ if not isinstance(o, dict) else o.get('how',''))
def test_on_a_gpu(loss, kw):
    dls = CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', rating_name=None, seed=3, device='cuda', bs=32)
    learn = cf_learner(dls, CosineProduct if isinstance(loss, CCLLoss) else 'dot', n_factors=6, loss_func=loss, cbs=Negatives(seed=0, **kw), seed=0,
                       metrics=list_metrics(k=5))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.05)
    assert learn.model.user_factors.is_cuda and learn.model.user_factors.isfinite().all()
    s,gen = NegativeSampler(dls.train_ds, 50, 'popularity'),torch.Generator('cuda').manual_seed(0)
    x = dls.train_ds.x[:200].long()
    neg,keep,logq = s.draw(x, gen)
    assert neg.is_cuda and keep.all() and not s.items.has(x[:,0], neg).any()
    host = NegativeSampler(dls.train_ds.subset(slice(None)).to('cpu'), 50, 'popularity')
    assert torch.equal(host.items.gaps, s.items.gaps.cpu())

def test_losses_and_negatives_go_with_the_loaders_of_the_fit():
    "The same loss on other loaders, another loss on the same learner"
    df = synth_ratings(40, 30, 600)
    loaders = lambda d: CFDataLoaders.from_df(d, item_name='title', rating_name=None, seed=1, device='cpu')
    warp,seen = WARPLoss(),[]
    for d in (df, df[df.title.isin(df.title.unique()[:10])]):
        learn = cf_learner(loaders(d), n_factors=3, loss_func=warp, seed=1)
        with learn.no_bar(),learn.no_logging(): learn.fit(1)
        assert warp.n_items is None and warp._there==learn.dls.n_items-1 and warp.config['n_items'] is None
    bpr = cf_learner(loaders(df), n_factors=3, loss_func=BPRLoss(), seed=1)
    with bpr.no_bar(),bpr.no_logging():
        bpr.fit(1)
        assert bpr.negatives.sampler.n_neg==1
        bpr.loss_func = SampledSoftmaxLoss()
        bpr.fit(1)
    assert bpr.negatives.sampler.n_neg==64
