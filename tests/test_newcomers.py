"Folding in against NumPy's least squares and torch's descent, and the learner that comes back"
import warnings

import numpy as np,pandas as pd,pytest,torch
from cfext import *
from cfext.newcomers import *

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
