"The sequence room against naive code, its contracts over all models, and awkward input"
import gzip,math

import numpy as np,pandas as pd,pytest,torch
from torch.nn import functional as F
import fastai.callback.progress # `no_bar`
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastcore.test import test_eq as eq, test_close as close
from cfext.callbacks import GradientAccumulator
from cfext.sources import synth_ratings
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

@pytest.mark.parametrize('max_len', [1,4,99])
def test_random_crops_stay_in_their_history(max_len):
    "Training sees more than the latest items and nothing that is held out; the held-out rows are read as ever"
    df = visits(60)
    plain,dls = (SeqDataLoaders.from_df(df, max_len=max_len, bs=7, crop=o, seed=3) for o in ('latest','random'))
    allowed = {u: h[:-2].tolist() if len(h)>2 else h.tolist() for u,h in ((u, dls.hist[u]) for u in range(1, len(dls.hist)))}
    ds,seen = dls.train.dataset,set()
    for _ in range(20):
        for r in dls.train.get_idxs().tolist():
            x,y = ds.cut([r])
            whole,u = [*x[0].tolist(),y[0,-1].item()],int(ds.users[r])
            at = [i for i in range(len(allowed[u])) if allowed[u][i:i+len(whole)]==whole]
            assert at, (u,whole,allowed[u])
            seen |= {(u,i) for i in at}
    longer = {u for u,h in allowed.items() if len(h)>max_len+1}
    assert all(len({i for v,i in seen if v==u})>1 for u in longer)
    for a,b in zip(plain.loaders[1:], dls.loaders[1:]):
        for p,q in zip(a, b): same(p[0], q[0]), same(p[1], q[1])
    again = SeqDataLoaders.from_df(df, max_len=max_len, bs=7, crop='random', seed=3)
    for _ in range(20): again.train.get_idxs()
    same(again.train.dataset.back, ds.back)
    same(ds.subset([2,0]).slack, ds.slack[[2,0]])

FILES = [('users in turn', 'b x\na x\nb y\na y\nb z\na z\na w\n', {'a':['x','y','z','w'],'b':['x','y','z']}),
         ('blank lines, either line end', '\n1 5\r\n\r\n 1 6 \n1\t7\r\n\n1 8', {1:[5,6,7,8]}),
         ('ids as they are written', '007 1\n7 1\n007 2\n7 2\n007 3\n7 03\n7 4\n', {'007':['1','2','3'],'7':['1','2','03','4']}),
         ('NA is an id', 'NA null\nNA nan\nNA "q\nNA None\n', {'NA':['null','nan','"q','None']}),
         ('below zero, and too large', '-1 5\n-1 99999999999999999999\n-1 7\n-1 8\n', {-1:['5','99999999999999999999','7','8']}),
         ('a mark of the byte order', '\ufeffé 1\né 2\né 3\né 4\n', {'é':[1,2,3,4]}),
         ('one item a user', '1 5\n2 6\n3 5\n3 6\n3 7\n3 8\n', {1:[5],2:[6],3:[5,6,7,8]})]

@pytest.mark.parametrize('packed', [False,True])
@pytest.mark.parametrize('what,text,want', FILES, ids=[o[0] for o in FILES])
def test_files_of_pairs(tmp_path, what, text, want, packed):
    path = tmp_path/('pairs.gz' if packed else 'pairs.txt')
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    dls = SeqDataLoaders.from_pairs(path, bs=2)
    users = dls.classes['user'].decode(range(1, len(dls.hist))).tolist()
    eq({u: dls.vocab.decode(dls.hist[i]).tolist() for i,u in enumerate(users, 1)}, want)

@pytest.mark.parametrize('text,says', [('', 'is empty'), ('\n\n', 'is empty'), ('1 5\n1\n1 7\n', "entry 2: '1' stands alone"), ('1 5\n1 6\n1 7 9\n', 'line 3'),
                                       ('user item\n1 5\n1 6\n', 'looks like a heading'), ('1,5\n1,6\n', '1 columns in its first line'), ('1 5\n2 6\n', 'none of 2 histories')])
def test_awkward_files_of_pairs(tmp_path, text, says):
    (tmp_path/'pairs.txt').write_text(text)
    with pytest.raises(ValueError, match=says): SeqDataLoaders.from_pairs(tmp_path/'pairs.txt')

def test_names_and_bytes_of_files(tmp_path):
    (tmp_path/'not_packed.gz').write_text('1 5\n1 6\n1 7\n1 8\n')
    (tmp_path/'packed').write_bytes(gzip.compress(b'1 5\n1 6\n1 7\n1 8\n'))
    for o in ('not_packed.gz','packed'): eq(SeqDataLoaders.from_pairs(tmp_path/o).vocab.decode([1,2,3]).tolist(), [5,6,7])
    (tmp_path/'latin').write_bytes('é 1\né 2\né 3\n'.encode('latin1'))
    with pytest.raises(ValueError, match='not a text in UTF-8'): SeqDataLoaders.from_pairs(tmp_path/'latin')

def test_a_catalogue_of_one_item(tmp_path):
    (tmp_path/'one').write_text('1 5\n'*4+'2 5\n'*5)
    dls = SeqDataLoaders.from_pairs(tmp_path/'one', bs=2)
    learn = seq_learner(dls, 'sasrec', config=dict(n_factors=4))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    eq(learn.evaluate('test', 1, drop_seen=False)['recall@1'], 1.)
    with pytest.raises(ValueError, match='has already'): learn.evaluate('test', 1)
    eq((len(learn.recommend(1)),len(learn.recommend(1, drop_seen=False))), (0,1))
    with pytest.raises(ValueError, match='no negatives'): seq_learner(dls, 'sasrec', 'gbce')

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

@pytest.mark.parametrize('arch,config', [('sasrec',dict(n_factors=6)),('gru4rec',dict(n_factors=4,n_hidden=5)),('loop',dict(n_factors=3,n_hidden=5))])
def test_full_softmax_without_its_scores(arch, config, monkeypatch):
    "Loss and gradients are those of PyTorch's cross-entropy over all scores, a row at a time and all at once"
    net = seq_archs[arch](9, **config).train()
    for m in net.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    x,y = torch.randint(1, 9, (3,4)),torch.randint(1, 9, (3,4))
    y[1,2:] = 0
    grads = []
    for lean in (False,True):
        net.zero_grad()
        monkeypatch.setattr(SeqLoss, '_can_lean', lambda self, h: lean)
        loss = SeqLoss(net)(net(x), y)
        eq(type(loss.grad_fn).__name__=='LinearCEBackward', lean)
        (loss*.7).backward()
        grads.append([loss.detach(),*(p.grad.clone() for p in net.parameters())])
    for a,b in zip(*grads): same(a, b, 1e-6)

def test_who_can_lean():
    net = GRU4Rec(9, 4, 5).train()
    loss,h = SeqLoss(net),net(torch.ones(2, 3, dtype=torch.long))
    assert loss._can_lean(h) and not loss._can_lean(h.detach())
    with torch.autocast('cpu', torch.bfloat16): assert not loss._can_lean(h)
    class Own(GRU4Rec):
        def score(self, h, items=None): return super().score(h, items)*2
    assert not SeqLoss(Own(9, 4, 5))._can_lean(h)
    close(SeqLoss(net)(h, torch.full((2,3), 4)).item(), SeqLoss(net)(h, torch.full((2,3), 4), 'none').mean().item(), 1e-6)

def test_negatives_by_either_way():
    "Drawn for each target, they are scored from all scores or from their own vectors: the same numbers"
    for n_neg,n in ((5,200),(5,9)): # 5 draws of 4 factors are less than 200 items, and more than 9
        torch.manual_seed(0)
        net = GRU4Rec(n, 4, 5).train()
        h,y = torch.randn(6, 4),torch.randint(1, n, (6,))
        torch.manual_seed(1)
        pos,neg = SeqLoss(net, 'gbce', n_neg, shared=False).sample(h, y)
        torch.manual_seed(1)
        drawn = torch.randint(1, n, (6,n_neg))
        s = net.score(h)
        same(pos, s.gather(1, y[:,None])[:,0], 1e-5)
        same(neg, s.gather(1, drawn).masked_fill(drawn==y[:,None], -math.inf), 1e-5)

def test_dropout_by_bytes():
    x = torch.ones(301, 997, requires_grad=True)
    for p in (.001,.2,.5,1.):
        torch.manual_seed(0)
        out = ByteDropout(p)(x)
        share = (out==0).float().mean().item()
        close(share, p, 4e-3)
        if p<1: close(out.mean().item(), 1, 1e-2)
        out.sum().backward()
        same(x.grad, out.detach())
        x.grad = None

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
                want.append(math.inf if drop and target in past.tolist() else sum((s[i]>s[target]).item()+.5*(s[i]==s[target]).item() for i in cand))
            assert math.inf in want or not drop
            assert learn.next_ranks(part, drop).tolist()==pytest.approx(want)

def test_evaluation_says_what_the_lists_hold():
    "Where people come back for the same, rows that no list can hold are left out, and counted"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 40, 900), item=(rng.pareto(1, 900)*5).astype(int)%30, timestamp=np.arange(900)))
    dls = SeqDataLoaders.from_df(df, seed=0)
    learn = seq_learner(dls, MostPopular(dls))
    with torch.no_grad(): learn.model.head.bias += torch.rand(dls.n_vocab, generator=torch.Generator().manual_seed(0)) # no ties
    hist = df.groupby('user').item.agg(list)
    for drop in (True,False):
        rows = [o for o in hist if not (drop and o[-1] in o[:-1])]
        hits = [o[-1] in learn.recommend_next(o[:-1], 5, drop).item.tolist() for o in rows]
        res = learn.evaluate('test', 5, drop)
        assert 3<len(rows) and (res['n'],res['left_out'])==(len(rows),len(hist)-len(rows)) and abs(res['recall@5']-np.mean(hits))<1e-9
        assert drop==(res['left_out']>0)
    again = SeqDataLoaders.from_df(pd.DataFrame(dict(user=[1,1,1,1,2,2,2,2], item=[1,2,1,1,2,1,2,2], timestamp=range(8))), seed=0)
    with pytest.raises(ValueError, match='has already.*pass drop_seen=False'): seq_learner(again, MostPopular(again)).evaluate()

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
    torch.manual_seed(2) # dropout draws from torch's own generator, which other tests move
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 2e-2)
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

def test_temperatures():
    "Any number from 0 is one, however small; nothing else is"
    s = torch.tensor([[0.,3,1,2.9999],[5,4,-math.inf,3]])
    for t in (0,-0.,1e-300,1e-38,1e-9): eq(draw_next(s, temperature=t).tolist(), [1,0])
    assert len(set(draw_next(s[:1].expand(200, -1), temperature=1e30, generator=torch.Generator().manual_seed(0)).tolist()))==4
    for t in (math.nan,math.inf,-1,-1e-9,'hot',None):
        with pytest.raises(ValueError, match='`temperature`=.* should be a number, 0 or above'): draw_next(s, temperature=t)

def test_what_is_advised_can_be_done(tmp_path):
    "A loaded learner without its rows, a diverged one, and unknown symbols where nothing can be skipped"
    df = visits()
    dls = SeqDataLoaders.from_df(df, bs=3, seed=1)
    learn = seq_learner(dls, 'gru', config=dict(n_factors=5,n_hidden=6), seed=0, path=tmp_path)
    learn.export('next.pkl')
    again,user = load_learner(tmp_path/'next.pkl'),df.user.iloc[0]
    for f in (lambda: again.recommend(user), lambda: again.next_ranks(), lambda: again.evaluate('valid')):
        with pytest.raises(ValueError, match=r"without its users' histories: use `recommend_next\(history\)`, or .* `learn.dls = dls`"): f()
    with pytest.raises(ValueError, match='no training rows to count'): MostPopular(again.dls)
    pd.testing.assert_frame_equal(again.recommend_next([10,20], 3), learn.recommend_next([10,20], 3))
    again.dls = dls
    pd.testing.assert_frame_equal(again.recommend(user, 3), learn.recommend(user, 3))
    eq(again.evaluate(), learn.evaluate())
    for f,skips in ((learn.generate,False),(learn.similar_items,False),(learn.predict,True),(learn.recommend_next,True)):
        with pytest.raises(KeyError) as e: f([10,999])
        eq("unk='skip'" in str(e.value), skips)
    with torch.no_grad(): learn.model.head.bias.fill_(math.nan)
    for f in (lambda: learn.recommend(user), lambda: learn.recommend_next([10]), lambda: learn.predict([10]), lambda: learn.generate([10], 3), lambda: learn.evaluate()):
        with pytest.raises(ValueError, match='NaN: has training diverged'): f()

def test_loaders_of_another_vocabulary_are_refused():
    "More items than rows end in no index error from deep inside, fewer in no answer about other items"
    make = lambda n: SeqDataLoaders.from_df(visits(60, n), bs=3, seed=1)
    dls = make(11)
    learn = seq_learner(dls, 'gru4rec', seed=0)
    for n in (7,23):
        learn.dls = make(n)
        with learn.no_bar(),learn.no_logging():
            for f in (lambda: learn.recommend('u3'), lambda: learn.recommend_next([0]), lambda: learn.generate([0], 2), lambda: learn.similar_items(0), lambda: learn.predict([0]),
                      learn.evaluate, learn.validate, learn.get_preds, lambda: learn.fit(1)):
                with pytest.raises(ValueError, match=f'made for 11 symbols, the loaders know {n}'): f()
    learn.dls = dls
    eq(len(learn.recommend('u3', 3)), 3)

def test_odd_arguments():
    learn = seq_learner(SeqDataLoaders.from_df(visits(), bs=3), 'gru4rec')
    for f in (learn.recommend,learn.similar_items):
        with pytest.raises(TypeError, match='one id or several, got a DataFrame: pass its column'): f(visits()[:3])
    for n in (0,-1,math.nan,2.5):
        with pytest.raises(ValueError, match='`n_sampled`=.* whole number of at least 1'): learn.evaluate(n_sampled=n)
    for kind in ('sampled','gbce'):
        with pytest.raises(ValueError, match='`n_neg`=0'): seq_learner(learn.dls, loss=kind, n_neg=0)

def test_histories_are_shown_and_batches_of_ones_own_are_predicted():
    df = synth_ratings(40, 30, 500)
    learn = seq_learner(SeqDataLoaders.from_df(df, item_name='title', max_len=6, bs=7, seed=0, device='cpu'), 'gru4rec', config=dict(n_factors=5, n_hidden=6), seed=0)
    learn.show_results(max_n=3)
    xb,yb = learn.dls.valid.one_batch()
    with learn.no_bar(): p,y = learn.get_preds(dl=[(xb[:4],yb[:4]),(xb[4:,:3],yb[4:,:3])])
    assert p.shape[:2]==y.shape==xb.shape and len(xb)==40 and torch.equal(y[:4], yb[:4])

def test_what_a_learner_of_sequences_is_not_asked(tmp_path):
    df = synth_ratings(40, 30, 500)
    learn = seq_learner(SeqDataLoaders.from_df(df, item_name='title', max_len=6, bs=7, seed=0, device='cpu'), 'gru4rec', config=dict(n_factors=5, n_hidden=6), seed=0)
    with pytest.raises(ValueError, match='`history` is empty: it needs at least one item to go on from'): learn.recommend_next([])
    with pytest.raises(ValueError, match='`history` holds nothing that the model knows: it needs at least one item'): learn.recommend_next(['no film'], unk='skip')
    titles = df.title.to_numpy()[:2]
    for f,arg in ((learn.predict,'item'),(learn.recommend_next,'history')):
        for many in ((titles,titles), [[*titles]], [[]]):
            with pytest.raises(TypeError, match=f'`{arg}` should be one list of items, got a list of .*: ask for one history at a time'): f(many)
    with pytest.raises(TypeError, match=r'no bundle.*`learn.export\(path\)`.*`load_learner'): learn.save_bundle(tmp_path/'b')
    assert not (tmp_path/'b').exists()

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
    for times in (df.timestamp, df.timestamp.astype(str), df.timestamp.dt.day.map({1:'9', 2:'10'})): # by its letters, 10 would come first
        dls = SeqDataLoaders.from_df(df.assign(timestamp=times), bs=2)
        eq(dls.vocab.decode(dls.hist[1]).tolist(), ['x','z','w','y'])
    with pytest.raises(ValueError, match='1 rows have no time'): SeqDataLoaders.from_df(df.assign(timestamp=df.timestamp.where(df.index>0)), bs=2)

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

def test_predictions_of_batches_of_different_width():
    "Put together they are as wide as the longest history, and each position is what it is alone"
    rows = pd.DataFrame([(u,(u+t)%7,t) for u in range(200) for t in range(4 if u<128 else 9)], columns=['user','item','timestamp'])
    for arch in ('gru','sasrec'):
        learn = seq_learner(SeqDataLoaders.from_df(rows, bs=64, seed=1, device='cpu'), arch, seed=1)
        with learn.no_bar(),learn.no_logging():
            learn.fit(1)
            p,y = learn.get_preds()
            loss = learn.validate()[0]
        longest = int(learn.dls.valid_ds.lens.max())
        assert p.shape[:2]==y.shape==(200,longest)
        assert -p[y>0].gather(1, y[y>0][:,None]).log().mean().item()==pytest.approx(loss, rel=1e-5)

def test_accumulated_batches_of_a_sequence_model_are_the_big_one():
    "Its loss is a mean over targets, of which batches hold different numbers"
    rng,got = np.random.default_rng(0),[]
    rows = pd.DataFrame([(u,int(rng.integers(12)),t) for u in range(160) for t in range(int(rng.integers(4, 40)))], columns=['user','item','timestamp'])
    class Spy(Callback):
        order = 20
        def before_step(self): self.seen.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))
    for bs,acc in ((64,[]),(16,[GradientAccumulator(64)])):
        spy = Spy()
        spy.seen = []
        dls = SeqDataLoaders.from_df(rows, bs=bs, max_len=50, seed=1, device='cpu')
        dls.train.shuffle = False
        learn = seq_learner(dls, 'gru', seed=1, cbs=[spy,*acc])
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
        got.append(spy.seen)
    assert len(got[0])==len(got[1])==3
    for a,b in zip(*got): assert (a-b).norm()<1e-5*a.norm()
