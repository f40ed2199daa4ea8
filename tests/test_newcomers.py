"Folding in against NumPy's least squares and torch's descent, and the learner that comes back"
import warnings

import numpy as np,pandas as pd,pytest,torch
from cfext import *
from cfext.newcomers import *
from cfext.evaluation import _split_rows
from cfext.explorer import Explorer

pytestmark = pytest.mark.usefixtures('quiet')

def fitted(y_range=(0.5,5.5), cls=DotProductBias, rating_name='rating'):
    df = synth_ratings(120, 60, 3000)
    dls = CFDataLoaders.from_df(df[df.user<=100], item_name='title', rating_name=rating_name, seed=0, device='cpu', bs=32)
    torch.manual_seed(0)
    learn = cf_learner(dls, cls, n_factors=4, y_range=y_range, seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(4, 0.03)
    return learn,df[df.user>100]

@pytest.fixture(scope='module')
def pair(): return fitted()

@pytest.mark.parametrize('cls', [DotProduct, DotProductBias])
def test_without_y_range_it_is_ridge_regression(cls):
    learn,new = fitted(None, cls)
    m,prior = learn.model,RowPrior(learn.model, learn.dls.train_ds)
    us,rows = np.unique(new.user, return_inverse=True)
    its = torch.from_numpy(learn.dls.classes['title'].encode(new.title)).long()
    y = torch.tensor(new.rating.to_numpy(), dtype=torch.float32)
    got = ridge_rows(m, torch.from_numpy(rows), its, y, prior, tile=400)
    Q = m.item_factors.detach().double().numpy()
    bias = hasattr(m, 'item_bias')
    H = np.hstack([Q, np.ones((len(Q),1))]) if bias else Q
    c = (m.item_bias[:,0]+m.offset).detach().double().numpy() if bias else np.zeros(len(Q))
    L,mu = (prior.precision*prior.noise).double().numpy(),prior.mean.double().numpy()
    for r in range(len(us)):
        h,t = H[its[rows==r]],y[rows==r].double().numpy()-c[its[rows==r]]
        np.testing.assert_allclose(got[r], np.linalg.solve(h.T@h+L, h.T@t+L@mu), rtol=1e-3, atol=1e-4)

def test_with_y_range_the_gradient_is_zero(pair):
    learn,new = pair
    m,prior = learn.model,RowPrior(learn.model, learn.dls.train_ds)
    us,rows = np.unique(new.user, return_inverse=True)
    its = torch.from_numpy(learn.dls.classes['title'].encode(new.title)).long()
    y = torch.tensor(new.rating.to_numpy(), dtype=torch.float32)
    th = ridge_rows(m, torch.from_numpy(rows), its, y, prior).double().requires_grad_()
    H = torch.cat([m.item_factors, torch.ones(m.n_items, 1)], 1).detach().double()
    c = (m.item_bias[:,0]+m.offset).detach().double()
    p = m.squash((H[its]*th[torch.from_numpy(rows)]).sum(1)+c[its])
    d = th-prior.mean
    obj = ((p-y)**2).sum()/prior.noise + (d@prior.precision.double()*d).sum()
    start = ((m.squash((H[its]*prior.mean).sum(1)+c[its])-y)**2).sum()/prior.noise
    g, = torch.autograd.grad(obj, th)
    assert obj<start and g.norm()<1e-2*start**0.5

def test_batch_is_one_at_a_time(pair):
    learn,new = pair
    both = learn.fold_in(new)
    prior = RowPrior(learn.model, learn.dls.train_ds)
    for u in new.user.unique()[:3]:
        one = learn.fold_in(new[new.user==u], prior=prior)
        a,b = (l.predict(new[new.user==u])[2] for l in (one,both))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_the_old_learner_is_left_alone(pair):
    learn,new = pair
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    n,m = len(learn.dls.train_ds),learn.dls.n_users
    frame = new.copy()
    got = learn.fold_in(new)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert (len(learn.dls.train_ds), learn.dls.n_users)==(n, m) and len(got.dls.train_ds)==n+len(new)
    pd.testing.assert_frame_equal(frame, new)
    for k,v in got.model.state_dict().items(): assert torch.equal(v[:len(before[k])] if v.ndim else v, before[k])

def test_new_users_in_lists_bundles_and_further_training(pair, tmp_path):
    learn,new = pair
    got = learn.fold_in(new)
    u = int(new.user.iloc[0])
    recs = got.recommend(u, k=5)
    assert len(recs)==5 and not set(recs.title)&set(new.title[new.user==u])
    again = load_bundle(got.save_bundle(tmp_path/'b'), device='cpu')
    pd.testing.assert_frame_equal(again.recommend(u, k=5), recs)
    with got.no_bar(),got.no_logging(): got.fit(1, 1e-3)
    with pytest.raises(UnknownIdError): learn.recommend(u)

def test_known_users_are_solved_again_and_repeats_of_a_fold_agree(pair):
    learn,new = pair
    a,b = new.iloc[::2],new.iloc[1::2]
    prior = RowPrior(learn.model, learn.dls.train_ds)
    twice,once = learn.fold_in(a, prior=prior).fold_in(b, prior=prior),learn.fold_in(new, prior=prior)
    ids = new.user.unique()
    rows = [l.model.user_factors[l.dls.encode_ids(ids, 'user')] for l in (twice,once)]
    torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-3)

def test_items_and_their_order_of_magnitude(pair):
    learn,_ = pair
    us = learn.dls.classes['user'].ids
    rows = pd.concat([pd.DataFrame(dict(user=us, title=t, rating=r)) for t,r in (('Loved',5.),('Hated',1.))])
    got = learn.fold_in(rows, 'item')
    p = {t: got.predict(pd.DataFrame(dict(user=us, title=t)))[2].mean().item() for t in ('Loved','Hated')}
    assert p['Loved']>4.3 and p['Hated']<1.7

def test_choices_without_ratings_and_other_models():
    learn,new = fitted(None, rating_name=None)
    assert learn.fold_in(new.drop(columns='rating')).dls.n_users==learn.dls.n_users+new.user.nunique()
    nn = cf_learner(learn.dls, 'nn')
    with pytest.raises(TypeError, match='CollabNN cannot take newcomers'): nn.fold_in(new)

def test_bad_rows(pair):
    learn,new = pair
    odd = pd.concat([new, new.iloc[:2].assign(title='Nowhere')])
    with pytest.warns(UserWarning, match='2 of .* unknown item and are left out'): learn.fold_in(odd)
    with pytest.raises(ValueError, match='no row is left'): learn.fold_in(new.iloc[:2].assign(title='Nowhere'))
    with pytest.raises(ValueError, match='1 missing or infinite'):
        learn.fold_in(new.assign(rating=[float('nan'),*new.rating[1:]]))
    with pytest.raises(ValueError, match="`role`='film'"): learn.fold_in(new, 'film')
    with pytest.raises(ValueError, match='is not a column'): learn.fold_in(new.drop(columns='title'))

def ranked(loss=None, cls='dot', **neg):
    df = synth_ratings(120, 60, 3000)
    dls = CFDataLoaders.from_df(df[df.user<=100], item_name='title', rating_name=None, seed=0, device='cpu', bs=64)
    if cls is IALS: return cf_learner(dls, IALS(dls, 4, n_iter=3)),df[df.user>100]
    torch.manual_seed(0)
    learn = cf_learner(dls, cls, n_factors=4, loss_func=loss, cbs=Negatives(seed=0, **neg), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(4, 0.03)
    return learn,df[df.user>100]

def same_but(a, b, role, codes, had):
    "Assert that all rows of one side but `codes` and the new ones are the same to the bit"
    keep = torch.ones(had, dtype=torch.bool)
    keep[codes[codes<had]] = False
    for k in ('factors','bias'):
        t = getattr(a, f'{role}_{k}', None)
        if t is not None: assert torch.equal(t[keep], getattr(b, f'{role}_{k}')[:had][keep])

@pytest.mark.parametrize('loss,cls,neg', [(BPRLoss(),'dot',dict(n_neg=3)), (FullSoftmaxLoss(),DotProduct,{}), (SampledSoftmaxLoss(),'dot',dict(n_neg=9, how='popularity')),
                                          (CCLLoss(),CosineProduct,dict(n_neg=5)), (None,IALS,{})], ids=['bpr','softmax','sampled','ccl','ials'])
def test_ranking_models_take_newcomers_and_leave_the_others_alone(loss, cls, neg):
    learn,new = ranked(loss, cls, **neg)
    state,rng = {k: v.clone() for k,v in learn.model.state_dict().items()},torch.get_rng_state()
    got,again = learn.fold_in(new),learn.fold_in(new)
    assert torch.equal(rng, torch.get_rng_state()) and all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
    n = learn.dls.n_users
    same_but(learn.model, got.model, 'user', torch.arange(0), n)
    same_but(learn.model, got.model, 'item', torch.arange(0), learn.dls.n_items)
    assert torch.equal(got.model.user_factors, again.model.user_factors)
    own = got.model.user_factors[n:]
    assert own.shape==(new.user.nunique(), got.model.user_factors.shape[1]) and len(own.unique(dim=0))==len(own)
    assert all(p.requires_grad==q.requires_grad for p,q in zip(got.model.parameters(), learn.model.parameters()))
    assert type(got.loss_func)==type(learn.loss_func) and len(got.recommend(new.user.unique(), k=3))==3*new.user.nunique()

def test_ials_folds_in_what_it_would_have_solved():
    df = synth_ratings(120, 60, 3000)
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None, valid_pct=0, device='cpu')
    model = IALS(dls, 4, n_iter=2)
    got = cf_learner(dls, model).fold_in(df[df.user==7])
    starts,items = user_histories(dls.train_ds.x, dls.n_users, dls.n_items)
    u = dls.encode_ids([7], 'user')
    want = solve_rows(starts, items, model.item_factors, model.config['alpha0'], model.config['lam'], model.config['nu'])[u]
    torch.testing.assert_close(got.model.user_factors[u].detach(), want.detach(), atol=1e-4, rtol=1e-3)

def test_new_items_of_a_ranking_model_are_found_by_those_who_like_them():
    learn,_ = ranked(FullSoftmaxLoss())
    fans = learn.dls.classes['user'].ids[:50]
    got = learn.fold_in(pd.DataFrame(dict(user=fans, title='Hit')), 'item')
    other = learn.fold_in(pd.DataFrame(dict(user=fans[:2], title='Flop')), 'item')
    us = torch.arange(1, 101)
    assert got.model.score_items(us)[:,-1].mean()>other.model.score_items(us)[:,-1].mean()

@pytest.mark.parametrize('cls,config', [(LightGCN,dict(n_layers=2)), (LightGCN,dict(n_layers=1, unit=True)), (SideProduct,dict(id_p=0.1))], ids=['graph','unit graph','sides'])
@pytest.mark.parametrize('loss', ['rank','ratings'])
def test_computed_factors_take_newcomers_as_they_stand(cls, config, loss):
    if loss=='ratings' and 'unit' in config: pytest.skip('cosines are for lists')
    df = synth_ratings(120, 60, 3000)
    dls = CFDataLoaders.from_df(df[df.user<=100], item_name='title', rating_name='rating' if loss=='ratings' else None, seed=0, device='cpu', bs=64)
    if cls is SideProduct: config = dict(config, items=df[['title','genre']].drop_duplicates('title'))
    torch.manual_seed(0)
    learn = cf_learner(dls, cls, n_factors=4, config=config, loss_func=SampledSoftmaxLoss(0.3) if loss=='rank' else None, seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.03)
    new = df[df.user>100]
    users = torch.arange(dls.n_users)
    with torch.no_grad(): want = learn.model.eval().score_items(users)
    for got in (learn.fold_in(new), learn.partial_fit(new)):
        assert isinstance(got.model, DotProduct) and getattr(got.model, 'cosines', False)==config.get('unit', False)
        with torch.no_grad(): torch.testing.assert_close(got.model.score_items(users), want, atol=1e-5, rtol=1e-4)
        rows = got.model.user_factors[dls.n_users:].detach()
        assert len(rows.unique(dim=0))==new.user.nunique() and len(got.recommend(new.user.unique(), k=3))==3*new.user.nunique()
    with torch.no_grad(): torch.testing.assert_close(learn.model.score_items(users), want)

def day(learn):
    "New users, new items, known users, and an item that only new users know"
    ids = learn.dls.classes
    u,t = ids['user'].ids,ids['title'].ids
    return pd.DataFrame([(901,t[0],5.),(901,t[3],2.),(901,'A',4.),(901,'B',3.),(902,'B',5.),(902,t[5],1.),(u[4],'A',5.),(u[4],t[7],2.),(u[9],'A',4.)], columns=['user','title','rating'])

@pytest.mark.parametrize('kind', ['ratings','plain','bpr','ials'])
@pytest.mark.parametrize('known', [True, False])
def test_partial_fit_takes_everything_at_once(kind, known, tmp_path):
    learn = dict(ratings=lambda: fitted()[0], plain=lambda: fitted(None, DotProduct)[0], bpr=lambda: ranked(BPRLoss(), n_neg=3)[0], ials=lambda: ranked(cls=IALS)[0])[kind]()
    rows,dls = day(learn),learn.dls
    frame,state = rows.copy(),{k: v.clone() for k,v in learn.model.state_dict().items()}
    got = learn.partial_fit(rows, known=known)
    pd.testing.assert_frame_equal(rows, frame)
    assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
    assert (got.dls.n_users, got.dls.n_items, len(got.dls.train_ds))==(dls.n_users+2, dls.n_items+2, len(dls.train_ds)+len(rows))
    assert got.dls.classes['title'].ids[-2:].tolist()==['A','B'] and got.dls.classes['user'].ids[:-2].equals(dls.classes['user'].ids)
    named = dls.encode_ids(dls.classes['user'].ids[[4,9]], 'user')
    same_but(learn.model, got.model, 'user', named if known else torch.arange(0), dls.n_users)
    same_but(learn.model, got.model, 'item', torch.arange(0), dls.n_items)
    if known: assert not torch.equal(got.model.user_factors[named], learn.model.user_factors[named])
    x = dls.train_ds.x.long()
    x = x[~torch.isin(x[:,0], named)]
    with torch.no_grad(): assert torch.equal(got.model.eval()(x), learn.model.eval()(x))
    recs = got.recommend([901,902], k=4)
    assert len(recs)==8 and not set(recs.title[recs.user==901])&set(rows.title[rows.user==901])
    assert (got.model.item_factors[-2:]!=0).any(1).all() and len(got.model.item_factors[-2:].unique(dim=0))==2
    assert len(got.similar_items('B', k=2))==2 and len(got.similar_users(902, k=2))==2
    path = tmp_path/'b'
    learn.save_bundle(path)
    load_bundle(path, device='cpu').partial_fit(rows, known=known).save_bundle(path)
    pd.testing.assert_frame_equal(load_bundle(path, device='cpu').recommend([901,902,dls.classes['user'].ids[4]], k=4),
                                  got.recommend([901,902,dls.classes['user'].ids[4]], k=4), check_exact=False, rtol=1e-4)

def test_partial_fit_of_users_is_fold_in(pair):
    learn,new = pair
    a,b = learn.partial_fit(new),learn.fold_in(new)
    torch.testing.assert_close(a.model.user_factors, b.model.user_factors)
    assert torch.equal(a.dls.train_ds.x, b.dls.train_ds.x)

def test_what_was_seen_besides_the_rows_stays_seen():
    df = synth_ratings(80, 60, 2000)
    full = CFDataLoaders.from_df(df[df.user<=70], item_name='title', seed=0, device='cpu', bs=64)
    dls = full.positives(4)
    learn = cf_learner(dls, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(2, seed=0), seed=0)
    got = learn.fold_in(df[(df.user>70)&(df.rating>=4)])
    low = full.train_ds.frame((full.train_ds.x, full.train_ds.y))
    u = low.user[low.rating<4].iloc[0]
    assert not set(got.recommend(u, k=20).title)&set(low.title[low.user==u])
    assert not set(learn.recommend(u, k=20).title)&set(low.title[low.user==u])
    assert torch.equal(inner_loaders(dls).also_seen[0], dls.also_seen[0])

@pytest.mark.parametrize('fit', ['fold_in','partial_fit'])
def test_rows_below_the_threshold_of_positives_are_no_choices(fit, tmp_path):
    df = synth_ratings(80, 60, 2000)
    new = df[df.user>70]
    for low_seen in (True,False):
        dls = CFDataLoaders.from_df(df[df.user<=70], item_name='title', seed=0, device='cpu', bs=64).positives(4, low_seen=low_seen)
        first = cf_learner(dls, n_factors=3, loss_func=BPRLoss(), cbs=Negatives(2, seed=0), seed=0)
        for learn in (first, load_bundle(first.save_bundle(tmp_path/f'{low_seen}'), device='cpu')):
            a,b = (getattr(learn, fit)(o, epochs=2) for o in (new, new[new.rating>=4]))
            assert torch.equal(a.dls.train_ds.x, b.dls.train_ds.x) and (a.dls.train_ds.y==1).all() and torch.equal(a.model.item_factors, b.model.item_factors)
            few = new[(new.rating<4)&new.title.isin(dls.classes['title'].ids)]
            u = few.user.iloc[0]
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                listed = a.recommend(u, k=60).title
            assert len(set(listed)&set(few.title[few.user==u]))==(0 if low_seen else few.title[few.user==u].nunique())
            if not low_seen: assert torch.equal(a.model.user_factors, b.model.user_factors)
            with pytest.raises(ValueError, match=r'none of the \d+ rows has a rating of at least 4'): getattr(learn, fit)(few)
            with pytest.warns(UserWarning, match='new users without a row rated at least 4 are left out: 1'):
                got = getattr(learn, fit)(pd.concat([few[few.user==u], new[new.user!=u]]), epochs=1)
            assert got.dls.classes['user'].encode([u])[0]==0
    assert a.dls.at_least==inner_loaders(dls).at_least==4 and dls.positives(1).at_least==4

def weighted(how, w):
    df = synth_ratings(100, 60, 2500).assign(w=w)
    dls = CFDataLoaders.from_df(df[df.user<=80], item_name='title', rating_name='rating' if how=='ridge' else None, weight_name=None if w is None else 'w', seed=0, device='cpu', bs=64)
    if how=='ials': return cf_learner(dls, IALS(dls, 4, n_iter=2)),df[df.user>80]
    learn = cf_learner(dls, n_factors=3, y_range=(0.5,5.5) if how=='ridge' else None, loss_func=BPRLoss() if how=='steps' else None, cbs=[Negatives(2, seed=0)] if how=='steps' else None, seed=0)
    torch.manual_seed(0)
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.03)
    return learn,df[df.user>80]

@pytest.mark.parametrize('fit', ['fold_in','partial_fit'])
@pytest.mark.parametrize('how', ['ridge','ials','steps'])
def test_weights_of_newcomers_rows(how, fit, tmp_path):
    (plain,new),(learn,_) = weighted(how, None),weighted(how, 1. if how=='ials' else 3.)
    if how!='ials': learn.model.load_state_dict(plain.model.state_dict())
    go,own = lambda l,df: getattr(l, fit)(df, epochs=3),lambda l: l.model.user_factors.detach()[plain.dls.n_users:]
    usual = 1. if how=='ials' else 3.
    base = own(go(plain, new))
    torch.testing.assert_close(own(go(learn, new.assign(w=usual))), base, atol=1e-4, rtol=1e-3)
    heavy = own(go(learn, new.assign(w=40*usual)))
    assert not torch.allclose(heavy, base, atol=1e-2)
    torch.testing.assert_close(own(go(load_bundle(learn.save_bundle(tmp_path/'b'), device='cpu'), new.assign(w=40*usual))), heavy, atol=1e-4, rtol=1e-3)
    if how=='ridge': # a row of double weight is the row twice
        twice = own(go(plain, pd.concat([new, new])))
        torch.testing.assert_close(own(go(learn, new.assign(w=6.))), twice, atol=1e-4, rtol=1e-3)
    if how=='ials': # against what the training solves with these weights
        rows = CFDataLoaders.from_df(pd.concat([new,new]).assign(w=40.), item_name='title', rating_name=None, weight_name='w', valid_pct=0, device='cpu')
        u,m = rows.classes['user'].ids,learn.model
        x = torch.stack([rows.train_ds.x[:,0].long(), torch.from_numpy(learn.dls.classes['title'].encode(rows.classes['title'].decode(rows.train_ds.x[:,1]))).long()], 1)
        n = len(u)+1,m.n_items
        want = solve_rows(*user_histories(x, *n), m.item_factors.detach(), *(m.config[k] for k in ('alpha0','lam','nu')), weights=pair_weights(x, rows.train_ds.w, *n))[1:]
        if fit=='fold_in': torch.testing.assert_close(heavy[go(learn, new.assign(w=1.)).dls.classes['user'].encode(u)-learn.dls.n_users], want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(own(go(learn, new.drop(columns='w'))), base, atol=1e-4, rtol=1e-3)
    if how=='ridge': assert torch.allclose(Explorer(learn).newcomer({1:5.,2:1.})[0].model.user_factors[-1], Explorer(plain).newcomer({1:5.,2:1.})[0].model.user_factors[-1], atol=1e-4)
    with pytest.raises(ValueError, match="`weight_name`='w' should be at least 0 .* here it runs from -1 to -1"): go(learn, new.assign(w=-1.))

def test_later_rows_below_the_threshold_of_positives_are_no_right_answers():
    df = synth_ratings(80, 60, 2000)
    rated = CFDataLoaders.from_df(df[:1500], item_name='title', seed=0, device='cpu', bs=64)
    learn,plain = (cf_learner(d, n_factors=3, loss_func=BPRLoss(), seed=0) for d in (rated.positives(4), rated))
    later = df[1500:]
    a,b = (learn.evaluate(k=5, split=o) for o in (later, later[later.rating>=4]))
    pd.testing.assert_frame_equal(pd.DataFrame(a), pd.DataFrame(b))
    assert a.counts['rows_rated_lower']==(later.rating<4).sum() and f"{(later.rating<4).sum()} rows rated lower" in a.note
    assert learn.evaluate(k=5, split=later.drop(columns='rating')).counts['held_out_rows']==plain.evaluate(k=5, split=later).counts['held_out_rows']==len(later)
    with pytest.raises(ValueError, match='no row of `split` has a rating of at least 4'): learn.evaluate(split=later[later.rating<4])
    assert len(learn.compare(learn, 5, split=later))==2

def test_partial_fit_bad_input(pair):
    learn,new = pair
    with pytest.raises(ValueError, match='is an empty frame'): learn.partial_fit(new[:0])
    with pytest.raises(ValueError, match='1 missing or infinite'): learn.partial_fit(new.assign(rating=[float('inf'),*new.rating[1:]]))
    with pytest.raises(ValueError, match='missing ids'): learn.partial_fit(new.assign(title=[None,*new.title[1:]]))
    with pytest.raises(ValueError, match='is not a column'): learn.partial_fit(new.drop(columns='user'))
    with pytest.raises(ValueError, match="`how`='sgd'"): learn.partial_fit(new, how='sgd')
    with pytest.raises(ValueError, match="goes with IALS"): learn.partial_fit(new, how='ials')
    with pytest.raises(ValueError, match='goes with a ranking loss'): learn.fold_in(new, how='steps')

def test_new_items_known_by_new_users_alone():
    "The first round has nothing to solve them by, the next one has"
    df = synth_ratings(60, 40, 1200)
    learn = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu'), n_factors=3, y_range=(0.5,5.5), seed=1)
    new = learn.partial_fit(pd.DataFrame(dict(user=[9001,9001,7], title=['new film',df.title[0],df.title[1]], rating=[5.,4.,3.])))
    assert new.dls.classes['title'].encode(['new film'])[0]==learn.dls.n_items and new.model.item_bias.isfinite().all()

@pytest.mark.parametrize('shift', [0,10**18])
def test_ids_stay_what_they_were(shift):
    df = synth_ratings(60, 40, 1200)
    learn = cf_learner(CFDataLoaders.from_df(df.assign(user=df.user+shift), item_name='title', seed=1, device='cpu'), n_factors=3, seed=1)
    rows = lambda u: pd.DataFrame(dict(user=[u], title=[df.title[0]], rating=[5.]))
    new = learn.fold_in(rows(9001.))
    assert new.dls.classes['user'].ids.dtype==np.int64 and new.recommend([9001], k=1).user.tolist()==[9001] and len(new.recommend([7+shift], k=1))==1
    with pytest.raises(TypeError, match='such as 9001.5 among known ones that are whole numbers'): learn.fold_in(rows(9001.5))
    with pytest.raises(TypeError, match=r"such as '7' \(str\) among known ones such as"): learn.fold_in(rows('7'))

@pytest.mark.parametrize('top', [2**63-1, 2**64-1])
@pytest.mark.parametrize('dtype', ['as known',object,'category','nullable'])
def test_large_whole_numbers_are_ids_like_any(top, dtype, tmp_path):
    known = np.int64 if top<2**63 else np.uint64
    df = synth_ratings(60, 40, 1000).assign(item=lambda d: d.groupby('title').ngroup())
    df = df.assign(**{c: pd.Series([top-v for v in df[c]], dtype=known) for c in ('user','item')})
    new = df[df.user<=top-50]
    learn = cf_learner(CFDataLoaders.from_df(df[df.user>top-50], seed=3, device='cpu', bs=32), n_factors=3, seed=0)
    u = int(new.user.iloc[0])
    given = new.astype({c: {'as known':known, 'nullable':'Int64' if known is np.int64 else 'UInt64'}.get(dtype, dtype) for c in ('user','item')})
    for got in (learn.fold_in(given), learn.partial_fit(given)):
        assert got.dls.classes['user'].ids.dtype==known and got.recommend([u], k=2).user.tolist()==[u,u] and set(new.user)<=set(got.dls.classes['user'].ids)
        assert got.dls.classes['user'].ids.is_unique and got.evaluate(k=3, split=new, exclude_seen=False).counts['rows_of_unknown_users']==0
    sides = cf_learner(learn.dls, SideProduct, n_factors=3, config=dict(items=pd.DataFrame(dict(item=learn.dls.classes['item'].ids)).assign(x=lambda d: np.arange(len(d)))), seed=0)
    later = sides.add_ids(pd.DataFrame(dict(item=[5], x=[1]))).dls.classes['item'].ids # of the other type, where the known are uint64
    assert later.dtype==known and list(later)[-2:]==[learn.dls.classes['item'].ids[-1],5]
    if known is np.int64:
        with pytest.raises(TypeError, match='new ids such as .* among known ones that are whole numbers'): learn.fold_in(new.astype({'user':float}))

def test_held_out_rows_of_newcomers_count_once_they_are_known(tmp_path):
    df = synth_ratings(60, 40, 900)
    cold = df.user.isin(range(1, 60, 6)).to_numpy()
    late = cold&(np.arange(len(df))%2==0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = CFDataLoaders.from_df(df[~late], splitter=lambda d: (~d.user.isin(range(1, 60, 6)), d.user.isin(range(1, 60, 6))), seed=0, device='cpu')
    learn = cf_learner(dls, n_factors=4, y_range=(.5,5.5), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(2, 0.03)
    assert learn.evaluate(k=5).counts['users_judged']==0
    for l in (learn, load_bundle(learn.save_bundle(tmp_path/'b'), device='cpu')):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            new = l.fold_in(df[late])
        got,want = (new.evaluate(k=5, split=o, exclude_seen=False) for o in ('valid', df[cold&~late]))
        assert got.counts['users_judged']==10
        pd.testing.assert_frame_equal(pd.DataFrame(got), pd.DataFrame(want))
    assert not (new.dls.valid_ds.x==0).any() and (learn.dls.valid_ds.x[:,0]==0).all()
    with pytest.warns(UserWarning, match='held-out rows of these loaders'): learn.fold_in(df[cold&~late])

def test_one_unknown_item_is_one_right_answer():
    train,later = pd.DataFrame(dict(user=list('uuvv'), item=list('abbc'))),pd.DataFrame(dict(user=list('uuu'), item=['N','N','c']))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = CFDataLoaders.from_df(pd.concat([train, later], ignore_index=True), rating_name=None, splitter=lambda d: (np.arange(4), np.arange(4, 7)), device='cpu')
    learn = cf_learner(dls, Popularity(dls), loss_func=BPRLoss())
    assert learn.evaluate(k=1).loc['Popularity','recall@1']==0.5 # of N and c
    other = later.assign(item=['N','M','c'])
    held = lambda d: HeldOut(learn.dls, _split_rows(learn, d)[0])
    assert [len(held(d).targets[:,1].unique()) for d in (later, other)]==[2,3]

def test_a_catalogue_of_numbers_and_text_takes_both():
    df = synth_ratings(40, 30, 500, seed=1)
    df['user'] = df.user.map(lambda o: f'guest{o}' if o%9==1 else o).astype(object)
    learn = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu'), n_factors=3, seed=0)
    new = pd.DataFrame({'user':pd.Series([999,'guest999'], dtype=object), 'title':df.title[:2].tolist(), 'rating':[4.,2.]})
    assert learn.fold_in(new).recommend([999,'guest999'], k=2).user.tolist()==[999,999,'guest999','guest999']
    assert 999 in learn.fold_in(new[:1].astype({'user':int})).dls.classes['user'].ids
