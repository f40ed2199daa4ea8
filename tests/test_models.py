"One contract for every model"
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.collab import EmbeddingDotBias,EmbeddingNN
from fastai.tabular.all import MSELossFlat,Learner
from cfext import *

n_users,n_items = 7,5
edges = torch.tensor([[1,1],[1,2],[2,2],[3,4],[4,1],[6,3],[6,3]])
items = pd.DataFrame(dict(item=[1,2,3,4], genre=['a|b','b',None,'c'], year=[1990,1995,1980,np.nan], won=[True,False,False,True]))
users = pd.DataFrame(dict(user=range(1,7), age=[20,30,40,50,60,70.]))

def sided(**kw):
    specs = dict(item_spec=fit_sides(items, 'item', sep=dict(genre='|')), user_spec=fit_sides(users, 'user'))
    m = SideProduct(n_users, n_items, n_factors=4, id_p=0, **specs, **kw)
    m.set_sides('item', encode_sides(specs['item_spec'], items, 'item', pd.Index(items.item))[0])
    m.set_sides('user', encode_sides(specs['user_spec'], users, 'user', pd.Index(users.user))[0])
    return m

makers = dict(
    DotProduct      = lambda **kw: DotProduct(n_users, n_items, n_factors=4, **kw),
    DotProduct2018  = lambda **kw: DotProduct(n_users, n_items, n_factors=4, init=(0,.05), **kw),
    DotProductBias  = lambda **kw: DotProductBias(n_users, n_items, n_factors=4, **kw),
    DotProductMean  = lambda **kw: DotProductBias(n_users, n_items, n_factors=4, mean=3., **kw),
    CollabNN        = lambda **kw: CollabNN((n_users,3), (n_items,4), **{'y_range':None, **kw}),
    CollabNNDeep    = lambda **kw: CollabNN((n_users,3), (n_items,4), layers=[6,5], ps=0.3, embed_p=0.2, use_bn=True, **{'y_range':None, **kw}),
    EmbeddingNet    = lambda **kw: EmbeddingNet(n_users, n_items, n_factors=4, **kw),
    CosineProduct   = lambda **kw: CosineProduct(n_users, n_items, n_factors=4, **kw),
    LightGCN        = lambda **kw: LightGCN(n_users, n_items, n_factors=4, n_layers=2, rows=edges, **kw),
    LightGCNUnit    = lambda **kw: LightGCN(n_users, n_items, n_factors=4, n_layers=2, unit=True, rows=edges, **kw),
    SideProduct     = lambda **kw: sided(**kw),
    TwoTowers       = lambda **kw: sided(layers=(6,), **kw))
x = torch.tensor([[1,2],[3,0],[6,4]])

@pytest.fixture(params=makers)
def make(request):
    torch.manual_seed(0)
    return makers[request.param]

def loud(model):
    "The model with parameters that make a difference"
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p))
    return model

def close(a, b, **kw):
    assert a.shape==b.shape and a.dtype==b.dtype and a.device==b.device
    torch.testing.assert_close(a, b, **kw)

def test_forward_gives_a_column(make):
    for y_range in (None, (1,5)):
        out = loud(make(y_range=y_range)).eval()(x)
        assert out.shape==(3,1) and out.dtype==torch.float32
        if y_range: assert (out>=0.5).all() and (out<=5.5).all()

def test_one_row_and_none(make):
    m = loud(make()).eval()
    assert m(x[:1]).shape==(1,1) and m(x[:0]).shape==(0,1)
    assert m.score_items(x[:0,0]).shape==(0,n_items)

def test_batch_is_one_at_a_time(make):
    m = loud(make(y_range=(1,5))).eval()
    close(m(x), torch.cat([m(r[None]) for r in x]))

def test_score_items_is_forward_on_every_item(make):
    m = loud(make(y_range=(1,5))).eval()
    us = torch.tensor([6,1,1])
    scores = m.score_items(us)
    assert scores.shape==(3,n_items)
    for r,u in enumerate(us): close(scores[r], m(torch.tensor([[u,i] for i in range(n_items)]))[:,0], atol=1e-6, rtol=1e-5)
    close(score_by_forward(m, us, n_items, tile=6), scores, atol=1e-6, rtol=1e-5)

def test_tables_have_a_row_for_each_id(make):
    m = make().eval()
    assert len(m.user_factors)==n_users and len(m.item_factors)==n_items
    for t in ('user_bias','item_bias'):
        if hasattr(m, t): assert getattr(m, t).shape==((n_users if t[0]=='u' else n_items),1)
    ts = emb_tables(m)
    assert ts['user'][0] is m.user_factors and ts['item'][0] is m.item_factors

def test_score_pairs_is_forward_on_the_pairs(make):
    m = loud(make(y_range=(1,5))).eval()
    if not hasattr(m, 'score_pairs'): return
    us = torch.tensor([6,1,1])
    for mode in (True,False):
        if any(isinstance(o, (nn.Dropout,nn.BatchNorm1d)) for o in m.modules()): break
        m.train(mode)
        for items in (torch.tensor([[2,4],[0,1],[3,3]]), torch.tensor([3,1,4,1]), torch.randint(n_items, (3,40))):
            full = items.expand(3, -1) if items.ndim==1 else items
            close(m.score_pairs(us, items), torch.stack([m(torch.stack([us, c], 1))[:,0] for c in full.T], 1), atol=1e-6, rtol=1e-5)

def test_every_parameter_gets_a_gradient(make):
    m = loud(make()).train()
    m(x).pow(2).sum().backward()
    for n,p in m.named_parameters(): assert p.grad is not None, n

def test_state_dict_round_trip(make):
    a = loud(make(y_range=(1,5))).eval()
    b = make(y_range=(1,5)).eval()
    b(x)
    b.load_state_dict(a.state_dict())
    close(a(x), b(x))
    c = type(a).restore(a.config, a.state_dict()).eval()
    with torch.no_grad(): close(a.score_items(x[:,0]), c.score_items(x[:,0]))

def test_made_again_from_its_config(make):
    import json
    a = make(y_range=(1,5)).eval()
    b = type(a)(**json.loads(json.dumps(a.config))).eval()
    b.load_state_dict(a.state_dict())
    close(a(x), b(x))
    assert b.config['y_range']==a.config['y_range'] or tuple(b.config['y_range'])==tuple(a.config['y_range'])

def test_train_and_eval_differ_only_by_dropout(make):
    m = loud(make()).train()
    m(x)
    m.eval()
    close(m(x), m(x))

def test_learns_a_checkerboard(make):
    "Ratings 4 and 2 alternating over users and items have rank 1 about their mean: every model must learn them; a cosine, 1 and -1"
    board = torch.cartesian_prod(torch.arange(1, n_users), torch.arange(1, n_items))
    hi,lo = (1.,-1.) if getattr(make(), 'cosines', False) else (4.,2.)
    y = torch.where((board.sum(1)%2)==0, hi, lo)[:,None]
    for seed in range(3):
        torch.manual_seed(seed)
        m = make().train()
        with torch.no_grad():
            for p in m.parameters(): p.mul_(30) if p.abs().max()<.06 else p
        for d in m.modules():
            if isinstance(d, nn.Dropout): d.p = 0.
        opt = torch.optim.Adam(m.parameters(), 0.03)
        for _ in range(800):
            loss = (m(board)-y).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
        m.eval()
        pred = m(board)
        if (pred-y).abs().max()<0.2: return
    raise AssertionError(f'largest error {(pred-y).abs().max():.3f}')

def test_fastais_models_are_scored_the_same_way():
    m = EmbeddingDotBias(4, n_users, n_items).eval()
    s = score_by_forward(m, torch.tensor([2,5,1]), n_items)
    close(s[1], m(torch.tensor([[5,i] for i in range(n_items)])))
    m = EmbeddingNN([(n_users,3),(n_items,2)], [6]).eval()
    assert score_by_forward(m, torch.tensor([2,5,1]), n_items).shape==(3,n_items)
    assert [len(o) for o in emb_tables(m).values()]==[1,1]

def test_mean_unknown_is_a_model_beside_the_other(make):
    m = loud(make()).eval()
    with torch.no_grad():
        before = m(x)
        average = mean_unknown(m)
        both = [emb_tables(o) for o in (m,average)]
        for r in ('user','item'):
            for a,b in zip(*(o[r] for o in both)): close(b.detach(), torch.cat([a[1:].mean(0, keepdim=True),a[1:]]).detach())
        close(m(x), before)
        assert not torch.equal(average(x), before) and torch.equal(average(x)[[0,2]], before[[0,2]])
    shared = {id(o) for o in (*m.parameters(),*m.buffers())}
    tables = [id(t) for t in (*both[1]['user'],*both[1]['item'])]
    assert all(id(o) in shared or id(o) in tables for o in (*average.parameters(),*average.buffers()))

@pytest.mark.parametrize('fast', [True,False])
def test_kept_factors_follow_training(fast):
    "The fused optimizer does not count its steps: what is kept must not outlive a fit, with and without validation rows"
    for valid_pct in (0.2,0):
        dls = CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', rating_name=None, valid_pct=valid_pct, seed=3, device='cpu', bs=64)
        learn = cf_learner(dls, LightGCN, n_factors=4, loss_func=BPRLoss(), seed=0, fast=fast)
        for _ in range(2):
            before = learn.recommend(k=3).score.sum()
            with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.05)
            fresh = LightGCN.restore(learn.model.config, learn.model.state_dict()).eval()
            with torch.no_grad(): close(learn.model.user_factors, fresh.user_factors)
            scores = learn.recommend(k=3)
            assert scores.score.sum()!=before
            x = dls.encode_ids(scores.user, 'user'),dls.encode_ids(scores.title, 'item')
            with torch.no_grad(): close(torch.tensor(scores.score.to_numpy()), fresh(torch.stack(x, 1))[:,0], atol=1e-5, rtol=1e-4)
            import copy
            assert copy.deepcopy(learn.model).n_users==learn.model.n_users

def test_two_micro_batches_without_a_step():
    m = loud(LightGCN(n_users, n_items, n_factors=4, rows=edges)).train()
    us,its = x[:,0],torch.tensor([[1,2],[3,4],[0,1]])
    for _ in range(2): (m(x).sum()+m.score_pairs(us, its).sum()+m.score_items(us).sum()).backward()
    two = m.user_base.grad.clone()
    m.user_base.grad = None
    fresh = LightGCN.restore(m.config, m.state_dict()).train()
    (fresh(x).sum()+CFModel.score_pairs(fresh, us, its).sum()+fresh.score_items(us).sum()).backward()
    close(two, 2*fresh.user_base.grad, atol=1e-5, rtol=1e-4)
