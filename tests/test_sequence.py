"The sequence room against naive code, its contracts over all models, and awkward input"
import math

import numpy as np,pandas as pd,pytest,torch
from torch.nn import functional as F
import fastai.callback.progress # `no_bar`
from fastai.learner import load_learner
from fastcore.test import test_eq as eq, test_close as close
from cfext.seq_data import *
from cfext.seq_models import *
from cfext.sequence import *

def visits(n_users=23, n_items=11, seed=42):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 15, n_users)
    df = pd.DataFrame({'user':np.repeat([f'u{i}' for i in range(n_users)], n), 'item':rng.integers(0, n_items, n.sum())*10,
                       'timestamp':rng.integers(0, 9, n.sum())})
    return df.sample(frac=1, random_state=seed)

def same(a, b, eps=0.):
    eq((a.shape,a.dtype,a.device), (b.shape,b.dtype,b.device))
    assert torch.allclose(a, b, rtol=0, atol=eps), (a-b).abs().max()

ARCHS = [('char3',dict(n_factors=5,n_hidden=6)), ('loop',dict(n_factors=5,n_hidden=6)), ('concat',dict(n_factors=5,n_hidden=6)),
         ('rnn',dict(n_factors=5,n_hidden=6)), ('gru',dict(n_factors=5,n_hidden=6,n_layers=2)), ('lstm',dict(n_factors=5,n_hidden=6)),
         ('gru4rec',dict(n_factors=4,n_hidden=7)), ('sasrec',dict(n_factors=6,n_heads=3))]

@pytest.mark.parametrize('max_len', [1,4,99])
def test_histories_against_pandas(max_len):
    df = visits()
    before = df.copy()
    dls = SeqDataLoaders.from_df(df, max_len=max_len, bs=3)
    pd.testing.assert_frame_equal(df, before)
    hist = df.sort_values(['user','timestamp'], kind='stable').groupby('user').item.apply(list)
    dec = lambda o: dls.vocab.decode(o[o>0]).tolist()
    umap = dls.classes['user']
    for i,part in enumerate(('train','valid','test')):
        ds = dls[i].dataset
        got = {umap.decode([int(u)])[0]: [dec(o[0]) for o in ds.cut([r])] for r,u in enumerate(ds.users)}
        want = {}
        for u,h in hist.items():
            if len(h)<3: x,y = (h[:-1],h[1:]) if part=='train' else ([],[])
            elif part=='train': x,y = h[:-3],h[1:-2]
            else: x,y = (h[:-2],h[-2:-1]) if part=='valid' else (h[:-1],h[-1:])
            if x: want[u] = [x[-max_len:],y[-max_len:]]
        eq(got, want)

def test_every_row_once_an_epoch_and_seeded():
    mk = lambda: SeqDataLoaders.from_df(visits(200), max_len=8, bs=7, seed=3)
    a,b = mk(),mk()
    for _ in range(2):
        ia,ib = a.train.get_idxs(),b.train.get_idxs()
        eq(ia.tolist(), ib.tolist())
        eq(sorted(ia.tolist()), list(range(len(a.train.dataset))))
    rows = sum(len(x) for x,_ in a.train)
    eq(rows, len(a.train.dataset))
    eq(sum(1 for _ in a.train), len(a.train))

def test_global_rng_untouched():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    dls = SeqDataLoaders.from_df(visits(), max_len=4, bs=3, seed=3)
    learn = seq_learner(dls, 'gru4rec', seed=4)
    for _ in dls.train: pass
    learn.evaluate('test', 3)
    learn.generate([10,20], 5, seed=1)
    same(torch.rand(3), want)

@pytest.mark.parametrize('arch,config', ARCHS)
def test_model_contract(arch, config):
    "States look back only, a batch is its rows one at a time, and gradients reach every parameter"
    n = 3
    if arch=='sasrec': config = {**config, 'max_len':n}
    net = seq_archs[arch](9, **config).eval()
    x,y = torch.randint(1, 9, (4,n)),torch.randint(1, 9, (4,n))
    h = net(x)
    eq((h.shape[:2],h.dtype), ((4,n),torch.float32))
    eq(net.score(h).shape, (4,n,9))
    for i in range(4): same(net(x[i:i+1])[0], h[i], 1e-5)
    x2 = x.clone()
    x2[:,2] = x[:,2]%8+1
    same(net(x2)[:,:2], h[:,:2], 1e-5)
    assert (net(x2)[:,2]-h[:,2]).abs().max()>1e-4
    SeqLoss(net.train())(net(x), y).backward()
    for name,p in net.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all(), name
    eq(net.item_factors.shape[0], 9)
    eq(net.item_bias.shape, (9,1))

@pytest.mark.parametrize('kind', ['full','sampled','gbce'])
@pytest.mark.parametrize('shared', [True,False])
def test_padding_changes_no_loss(kind, shared):
    net = GRU4Rec(9, 4, 5, drop=0.)
    x,y = torch.randint(1, 9, (3,4)),torch.randint(1, 9, (3,4))
    y[1,2:] = 0
    pad = lambda o: F.pad(o, (0,3))
    res = []
    for a,b in ((x,y),(pad(x),pad(y))):
        torch.manual_seed(0)
        res.append(SeqLoss(net, kind, 5, shared=shared)(net(a), b))
    same(res[0], res[1], 1e-5)

def test_gbce_beta_is_the_papers():
    for n_neg,n_items,t in ((1,100,.5),(16,1000,.75),(256,3416,.75),(5,6,1.)):
        alpha = n_neg/(n_items-1)
        close(gbce_beta(n_neg, n_items, t), t*alpha-t+1, 1e-9)

def test_sampled_softmax_is_unbiased_in_its_partition():
    net = GRU4Rec(50, 4, 5).train()
    loss = SeqLoss(net, 'sampled', 7)
    h,y = torch.randn(6, 4),torch.randint(1, 50, (6,))
    s = net.score(h)
    want = s.exp().sum(1)
    torch.manual_seed(0)
    got = torch.stack([(lambda pos,neg: pos.exp()+neg.exp().sum(1)*49/7)(*loss.sample(h, y)) for _ in range(4000)]).mean(0)
    assert ((got/want)-1).abs().max()<.02

def test_ranks_against_a_naive_loop():
    dls = SeqDataLoaders.from_df(visits(60), max_len=5, bs=3, seed=3)
    learn = seq_learner(dls, 'gru4rec', config=dict(n_factors=4, n_hidden=5), seed=4)
    for part,off in (('valid',2),('test',1)):
        for drop in (True,False):
            want = []
            for u in range(1, len(dls.hist)):
                h = dls.hist[u].long()
                if len(h)<3: continue
                past,target = h[:len(h)-off],int(h[len(h)-off])
                s = learn.next_scores(past[-5:][None])[0]
                cand = [i for i in range(1, dls.n_vocab) if i!=target and not (drop and i in past.tolist())]
                want.append(sum((s[i]>s[target]).item()+.5*(s[i]==s[target]).item() for i in cand))
            close(learn.next_ranks(part, drop).tolist(), want)

def test_constant_model_is_in_the_middle():
    dls = SeqDataLoaders.from_df(visits(60), max_len=5, bs=3)
    class Flat(SeqModel):
        def states(self, x, state=None): return torch.zeros(*x.shape, 2),None
    net = Flat(dls.n_vocab, 2)
    with torch.no_grad(): net.head.bias[1:] = 0.
    eq(seq_learner(dls, net).next_ranks('test', False).unique().tolist(), [(dls.n_vocab-2)/2])

@pytest.mark.parametrize('arch,config', [o for o in ARCHS if o[0]!='char3'])
def test_learns_a_cycle(arch, config):
    "Every network finds the one order that there is"
    dls = SeqDataLoaders.from_text('abcdefg'*120, seq_len=6, bs=8, layout='stretches', seed=1)
    learn = seq_learner(dls, arch, config=config, seed=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(12, 2e-2)
    eq(learn.generate('abcdef', 15, temperature=0), 'abcdef'+'gabcdefgabcdefg')

def test_carry_equals_one_long_reading():
    dls = SeqDataLoaders.from_text(''.join(np.random.default_rng(0).choice(list('abcde'), 400)), seq_len=5, bs=3)
    learn = seq_learner(dls, 'gru', config=dict(n_factors=4, n_hidden=6), seed=1)
    net = learn.model.eval()
    net.reset()
    got = torch.cat([net(x).detach() for x,_ in dls.train], 1)
    whole = torch.cat([x for x,_ in dls.train], 1)
    same(got, net.states(whole)[0].detach(), 1e-5)
    net.reset()

def test_mode_and_state_are_left_as_they_were():
    dls = SeqDataLoaders.from_text('abcdefg'*60, seq_len=6, bs=4)
    learn = seq_learner(dls, 'lstm', config=dict(n_factors=4, n_hidden=6))
    learn.model.train()
    learn.generate('abc', 4)
    assert learn.model.training and learn.model.state is None
    with pytest.raises(ValueError): learn.generate('abc', 4, temperature=-1)
    assert learn.model.training

def test_export_and_load(tmp_path):
    dls = SeqDataLoaders.from_df(visits(60), max_len=5, bs=3)
    learn = seq_learner(dls, 'sasrec', config=dict(n_factors=4), path=tmp_path)
    learn.export('next.pkl')
    again = load_learner(tmp_path/'next.pkl')
    pd.testing.assert_frame_equal(again.recommend_next([10,20], 3), learn.recommend_next([10,20], 3))
    eq(again.generate([10,20], 5, seed=1), learn.generate([10,20], 5, seed=1))
    assert again.loss_func.model is again.model

@pytest.mark.parametrize('users', [[], ['u3'], ['u3','u1','u3']])
def test_recommend_shapes(users):
    dls = SeqDataLoaders.from_df(visits(), max_len=5, bs=3)
    learn = seq_learner(dls, 'gru4rec')
    df = learn.recommend(users, 4, drop_seen=False)
    eq(list(df.columns), ['user','item','score','rank'])
    eq(df.user.tolist(), [u for u in users for _ in range(4)])
    one = learn.recommend('u3', 99)
    seen = set(visits().query("user=='u3'").item)
    eq(set(one.item), set(visits().item)-seen)

def test_seen_items_beyond_max_len_are_left_out():
    df = pd.DataFrame({'user':1, 'item':list(range(12)), 'timestamp':range(12)})
    df = pd.concat([df, pd.DataFrame({'user':2, 'item':range(20), 'timestamp':range(20)})])
    learn = seq_learner(SeqDataLoaders.from_df(df, max_len=3, bs=2), 'gru4rec')
    eq(set(learn.recommend(1, 99).item), set(range(12, 20)))

def test_datetimes_and_ties():
    df = pd.DataFrame({'user':['a']*4, 'item':['w','x','y','z'], 'timestamp':pd.to_datetime(['2024-01-02','2024-01-01','2024-01-02','2024-01-01'])})
    dls = SeqDataLoaders.from_df(df, bs=2)
    eq(dls.vocab.decode(dls.hist[1]).tolist(), ['x','z','w','y'])

def test_metric_matches_evaluate():
    dls = SeqDataLoaders.from_df(visits(60), max_len=50, bs=3, seed=3)
    learn = seq_learner(dls, 'sasrec', config=dict(n_factors=4), metrics=[NextAt('ndcg', 3), NextAt('recall', 3), NextAt('mrr')], seed=4)
    with learn.no_bar(), learn.no_logging(): res = learn.validate()
    close(list(res[1:]), [learn.evaluate('valid', 3)[o] for o in ('ndcg@3','recall@3','mrr')], 1e-6)

def test_word_texts():
    dls = SeqDataLoaders.from_text('the cat sat. the cat ran.\n'*30, seq_len=4, bs=2, by='word', min_freq=2)
    learn = seq_learner(dls, 'gru', config=dict(n_factors=4, n_hidden=5))
    assert learn.generate('the cat', 3, seed=1).startswith('the cat ')
    eq(dls.dataset.sep, ' ')

def test_fastai_methods_on_a_text():
    dls = SeqDataLoaders.from_text('the cat sat on the mat. '*60, seq_len=8, bs=4, layout='stretches')
    learn = seq_learner(dls, 'gru', config=dict(n_factors=4, n_hidden=8))
    with learn.no_bar(), learn.no_logging():
        p,y,dec,loss = learn.get_preds(with_decoded=True, with_loss=True)
        eq((p.shape,y.shape,dec.shape,loss.shape), ((35,8,12),(35,8),(35,8),(35,)))
        close(loss.mean().item(), learn.validate()[0], 1e-5)
        close(loss, -p.gather(2, y[...,None])[...,0].log().mean(1), 1e-4)
        learn.show_results(max_n=2)
    x,y = dls.valid.one_batch()
    eq(list(dls.valid.show_results((x,y), (y,), max_n=2, show=False).columns), ['reads','then','guess'])
    close(learn.predict('the c', 99).prob.sum(), 1, 1e-5)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', ['full','sampled','gbce'])
def test_trains_on_a_gpu(kind):
    dls = SeqDataLoaders.from_df(visits(200), max_len=8, bs=7, seed=3, device='cuda')
    for arch in ('gru4rec','sasrec'):
        learn = seq_learner(dls, arch, kind, n_neg=5, shared=kind!='gbce', metrics=NextAt(k=3))
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        eq(next(learn.model.parameters()).device.type, 'cuda')
        assert math.isfinite(learn.evaluate('test', 3)['ndcg@3'])
        learn.recommend('u3', 3), learn.recommend_next([10,20], 3), learn.generate([10], 3)
