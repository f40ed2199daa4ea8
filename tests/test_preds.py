"Mergers against naive references, views against their inverses, and TTA on vision, tabular and ratings learners"
import random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata
from torch import nn
from fastai.callback.progress import ProgressCallback
from fastai.callback.fp16 import AMPMode,MixedPrecision
from fastai.vision.all import *
from fastcore.all import *
from fastcore.imports import noop

from cfext.preds import *
from cfext.views import *
for _n in [o for o in globals() if o.startswith('test')]: del globals()[_n] # fastcore's, which pytest would collect

# Mergers

g = np.random.default_rng(0)
P = g.dirichlet([1,1,1], size=(5,7)) # 5 predictions of 7 rows over 3 classes
B = g.random((4,6,2)) # 4 predictions, each number a probability
soft = lambda a: a/a.sum(-1, keepdims=True)
naive_soft = dict(mean=lambda p: p.mean(0), gmean=lambda p: soft(np.exp(np.log(p).mean(0))), max=lambda p: soft(p.max(0)), median=lambda p: soft(np.median(p, 0)),
    sharpen=lambda p: soft(p**2).mean(0), rank=lambda p: np.mean([rankdata(o, axis=0)/len(o) for o in p], axis=0))
naive_sig = dict(mean=naive_soft['mean'], max=lambda p: p.max(0), median=lambda p: np.median(p, 0), sharpen=lambda p: (p**2/(p**2+(1-p)**2)).mean(0),
    gmean=lambda p: np.exp(np.log(p).mean(0))/(np.exp(np.log(p).mean(0))+np.exp(np.log(1-p).mean(0))))
same = lambda a,b,**kw: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **{'rtol':1e-9,**kw})

@pytest.mark.parametrize('method', naive_soft)
def test_mergers_of_distributions(method): same(merge_preds(P, method, kind='softmax'), naive_soft[method](P))

@pytest.mark.parametrize('method', mergers)
@pytest.mark.parametrize('kind', ['plain','softmax','sigmoid'])
def test_what_comes_in_is_not_what_goes_out(method, kind):
    "The result is a tensor of its own, and a buffer that is written to again does not change what was added"
    if method=='sharpen' and kind=='plain': return
    a = torch.as_tensor(P[0]).clone()
    for one in (a, a.numpy()):
        out,was = merge_preds([one], method, kind=kind),a.clone()
        out.zero_()
        assert torch.equal(a, was)
    buf = torch.empty_like(a)
    same(merge_preds((buf.copy_(torch.as_tensor(p)) for p in P), method, kind=kind), merge_preds(P, method, kind=kind).numpy())

@pytest.mark.parametrize('method', naive_sig)
def test_mergers_of_probabilities(method): same(merge_preds(B, method, kind='sigmoid'), naive_sig[method](B))

def test_mergers_of_numbers():
    for m,f in dict(mean=np.mean, max=np.max, median=np.median).items(): same(merge_preds(P, m), f(P, axis=0))
    same(merge_preds(P, 'gmean'), np.exp(np.log(P).mean(0)))
    z = torch.randn(3,4,5)
    same(merge_preds(z).softmax(-1), merge_preds(z.softmax(-1), 'gmean', kind='softmax'), rtol=1e-5) # mean of logits

def test_weights_and_spread():
    w = [1,0,2,5,3]
    m,sd = merge_preds(P, weights=w, spread=True)
    same(m, np.average(P, axis=0, weights=w))
    same(sd, np.sqrt(np.average((P-np.average(P, axis=0, weights=w))**2, axis=0, weights=w)), rtol=1e-6)
    same(merge_preds(P, 'gmean', [2]*5, kind='softmax'), naive_soft['gmean'](P))
    same(merge_preds(P[:1], spread=True)[1], 0*P[0])
    for bad in ([1,2], [1]*6, [-1,1,1,1,1], [0]*5, [np.nan]*5):
        with pytest.raises(ValueError, match='weights'): merge_preds(P, weights=bad)
    for m in ('max','median'):
        with pytest.raises(ValueError, match='no use for'): merge_preds(P, m, w)

def test_axis_of_classes(): same(merge_preds(P.transpose(0,2,1), 'gmean', kind='softmax', axis=0+1-1), naive_soft['gmean'](P).T)

def test_merging_is_streaming():
    import weakref
    alive,most = weakref.WeakSet(),[0]
    class T(torch.Tensor): pass
    def gen():
        for i in range(20):
            t = torch.full((3,2), float(i)).as_subclass(T)
            alive.add(t)
            most[0] = max(most[0], len(alive))
            yield t
            del t
    same(merge_preds(gen()), np.full((3,2), 9.5))
    assert most[0]<=4

def test_bad_predictions():
    with pytest.raises(ValueError, match='nothing to merge'): merge_preds(iter([]))
    with pytest.raises(ValueError, match='NaN'): merge_preds([P[0], P[1]*np.nan])
    with pytest.raises(ValueError, match='of shape'): merge_preds([P[0], P[1][:3]])
    with pytest.raises(ValueError, match='not negative'): merge_preds([-P[0]], 'gmean')
    with pytest.raises(ValueError, match='can be sharpened'): merge_preds(P, 'sharpen')
    with pytest.raises(ValueError, match='above 0'): merge_preds(P, 'sharpen', kind='softmax', temp=0)

# Views

def seen(v, x):
    for o in v.parts: x = x if o.f is None else o.f(x)
    return x

@pytest.mark.parametrize('v', [*d4_views(), *flip_views(ud=True), *turn_views()], ids=lambda v: v.name)
def test_exact_views_and_the_way_back(v):
    x = torch.zeros(2,1,9,9)
    x[:,:,1,6] = 1. # one bright pixel, at (6,1)
    p = torch.tensor([(6-4)/4.5, (1-4)/4.5]).expand(2,2)
    there = seen(v, x)
    r,c = (there[0,0]==1).nonzero()[0].tolist()
    assert torch.equal(v.undo(there, 'image'), x)
    assert torch.allclose(v.undo(torch.tensor([(c-4)/4.5, (r-4)/4.5]).expand(2,2), 'points'), p)

@pytest.mark.parametrize('v', [*crop_views(0.8), *scale_views((1.25,0.8))], ids=lambda v: v.name)
def test_points_of_resampled_views(v):
    yy,xx = torch.meshgrid(torch.arange(65.), torch.arange(65.), indexing='ij')
    x = torch.exp(-((xx-36)**2+(yy-28)**2)/8)[None,None]
    there = seen(v, x)
    w = there/there.sum()
    c = torch.stack([(w[0,0]*(xx-32)/32.5).sum(), (w[0,0]*(yy-32)/32.5).sum()])
    assert torch.allclose(v.undo(c[None], 'points'), torch.tensor([[4/32.5, -4/32.5]]), atol=2e-2)
    assert there.shape==x.shape

def test_products_and_arguments():
    assert len(d4_views())==8 and len({v.name for v in d4_views()})==8
    assert len(product_views(flip_views(), scale_views(), brightness_views()))==18
    assert product_views(flip_views(), scale_views())[0].plain
    for f in (lambda: crop_views(0), lambda: crop_views(1.2), lambda: scale_views((0,)), lambda: brightness_views((1.,)),
              lambda: train_views(0), lambda: dropout_views(-1), lambda: noise_views(0)):
        with pytest.raises(ValueError): f()

# TTA

class Mean(nn.Module):
    "Logits from a picture, sensitive to where things are"
    def __init__(self, c=1, n_out=3, sz=8):
        super().__init__()
        self.lin = nn.Linear(c*sz*sz, n_out)
    def forward(self, x): return self.lin(x.flatten(1))

def images(n=11, c=1, sz=8, loss=None, model=None, y=None, n_out=3, **kw):
    torch.manual_seed(0)
    x = torch.rand(n, c, sz, sz)
    y = torch.randint(0, n_out, (n,)) if y is None else y
    dl = DataLoader(list(zip(x,y)), bs=4)
    learn = Learner(DataLoaders(dl, dl), model or Mean(c, n_out, sz), loss_func=loss or CrossEntropyLossFlat(), metrics=accuracy, **kw)
    learn.logger = noop
    return learn.remove_cbs(ProgressCallback)

def by_hand(learn, views, merge, kind):
    outs = []
    for v in views:
        p = learn.get_preds(cbs=TTA([v]))[0]
        outs.append(p)
    return merge_preds(outs, merge, kind=kind)

@pytest.mark.parametrize('merge', ['mean','gmean','max','median','sharpen'])
@pytest.mark.parametrize('loss,kind,y', [(CrossEntropyLossFlat(),'softmax',None), (BCEWithLogitsLossFlat(),'sigmoid',torch.rand(11,3).round())])
def test_merges_as_merge_preds_does(merge, loss, kind, y):
    learn = images(loss=loss, y=y)
    learn.metrics = []
    assert torch.allclose(learn.get_preds(cbs=TTA(d4_views(), merge))[0], by_hand(learn, d4_views(), merge, kind), atol=1e-5)

def test_identity_is_identical():
    learn = images()
    a,b = learn.get_preds(with_loss=True, with_decoded=True, with_input=True),learn.get_preds(with_loss=True, with_decoded=True, with_input=True, cbs=TTA(identity_views()))
    assert all(torch.equal(x,y) for x,y in zip(a, b, strict=True))
    assert learn.validate()==learn.validate(cbs=TTA(identity_views()))

def test_all_ways_of_asking_agree():
    learn = images()
    with tta_ctx(learn, d4_views()):
        p,t = learn.get_preds()
        loss,acc = learn.validate()
    assert not learn._grab_cbs(TTA)
    assert np.isclose(loss, F.nll_loss(p.log(), t).item(), rtol=1e-5) and np.isclose(acc, accuracy(p, t).item())
    assert torch.allclose(tta_preds(learn, d4_views())[0], p)
    learn.add_cb(TTA(d4_views()))
    learn.fit(1, 0.)
    assert np.isclose(learn.recorder.values[-1][1], loss, rtol=1e-5) # in a fit, validation is augmented, training is not
    assert callable(learn.tta)

def test_logits_beta_and_weights():
    learn = images()
    plain,flip = [learn.get_preds(cbs=TTA([v]), act=noop)[0] for v in flip_views()]
    got = learn.get_preds(cbs=TTA(flip_views(), on='logits', weights=[1,3]), act=noop)[0]
    assert torch.allclose(got, plain/4+flip*3/4, atol=1e-6)
    got = learn.get_preds(cbs=TTA(flip_views()[1:], beta=0.25))[0]
    assert torch.allclose(got, 0.75*flip.softmax(1)+0.25*plain.softmax(1), atol=1e-6)

def test_spread_follows_the_order_of_the_data():
    learn = images()
    _,_,sd = tta_preds(learn, flip_views(), spread=True)
    a,b = [learn.get_preds(cbs=TTA([v]))[0] for v in flip_views()]
    assert torch.allclose(sd, (a-b).abs()/2, atol=1e-5)
    shuffled = learn.dls[1].new(get_idxs=lambda: list(range(10,-1,-1)))
    p,t,sd2 = tta_preds(learn, flip_views(), dl=shuffled, spread=True)
    assert torch.allclose(sd2, sd, atol=1e-5) and torch.equal(t, learn.get_preds()[1])

def test_batches_change_nothing():
    learn = images()
    one = tta_preds(learn, d4_views(), dl=learn.dls[1].new(bs=1))[0]
    assert torch.allclose(tta_preds(learn, d4_views())[0], one, atol=1e-6)

class Conv1(nn.Module):
    def __init__(self, c=1, n_out=2): super().__init__(); self.c = nn.Conv2d(c, n_out, 1)
    def forward(self, x): return self.c(x)

@pytest.mark.parametrize('merge', ['mean','gmean','max','median'])
def test_segmentation_comes_back(merge):
    learn = images(loss=CrossEntropyLossFlat(axis=1), model=Conv1(), y=torch.randint(0,2,(11,8,8)))
    learn.metrics = []
    plain = learn.get_preds()[0]
    assert torch.allclose(learn.get_preds(cbs=TTA(product_views(d4_views(), brightness_views((0.5,))), merge))[0], plain, atol=1e-5)
    shrunk = learn.get_preds(cbs=TTA(scale_views((0.5,))))[0]
    assert shrunk.shape==plain.shape
    for views in (crop_views(), scale_views((1.2,)), [BatchView('mine', lambda x: x.flip(-1))]):
        with pytest.raises(ValueError, match='no way back'): learn.get_preds(cbs=TTA(views))

class Centre(nn.Module):
    "Where the brightness of a picture lies, as points of -1 to 1"
    def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        w,a = x[:,0]/x[:,0].sum((1,2), keepdim=True),torch.linspace(-1,1,x.shape[-1]+1).unfold(0,2,1).mean(1)
        return torch.stack([(w.sum(1)*a).sum(1), (w.sum(2)*a).sum(1)], 1) + self.p

def test_points_come_back():
    y = [TensorPoint(torch.zeros(1,2)) for _ in range(11)]
    learn = images(loss=MSELossFlat(), model=Centre(), y=y)
    learn.metrics = []
    plain = learn.get_preds()[0]
    for out in ('auto','points'):
        assert torch.allclose(learn.get_preds(cbs=TTA(d4_views(), out=out))[0], plain, atol=1e-5)
    assert not torch.allclose(learn.get_preds(cbs=TTA(d4_views(), out='label'))[0], plain, atol=1e-3)
    with pytest.raises(ValueError, match='no way back for an output that is points'): learn.get_preds(cbs=TTA([BatchView('mine', lambda x: x.flip(-1))]))

def test_mixed_precision():
    class CPUMixed(MixedPrecision):
        def __init__(self): self.amp_mode,self.kwargs = AMPMode.BF16,{}
        def before_fit(self): self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16),torch.amp.GradScaler('cpu', enabled=False),L()
    learn = images()
    full = learn.get_preds(cbs=TTA(d4_views()))[0]
    learn.add_cb(CPUMixed())
    half = learn.get_preds(cbs=TTA(d4_views()))[0]
    assert half.dtype==torch.float32 and torch.allclose(half, full, atol=2e-2) and not torch.equal(half, full)

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('amp', [False,True])
def test_cuda(amp):
    learn = images()
    cpu = learn.get_preds(cbs=TTA(d4_views()))[0]
    learn.dls.to('cuda')
    learn.model.cuda()
    if amp: learn.to_fp16()
    assert torch.allclose(learn.get_preds(cbs=TTA(d4_views()))[0], cpu, atol=1e-2 if amp else 1e-5)
    assert torch.equal(*[tta_preds(learn, product_views(flip_views(), brightness_views()), seed=3)[0] for _ in range(2)])

def folder(tmp_path, n=24, c='RGB'):
    for split in ('train','valid'):
        for i in range(n):
            d = tmp_path/split/'ab'[i%2]
            d.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (16,16,3), dtype='uint8')).save(d/f'{i}.png')
    return tmp_path

def vision(path, batch_tfms, **kw):
    torch.manual_seed(0)
    dls = ImageDataLoaders.from_folder(path, bs=7, num_workers=0, batch_tfms=batch_tfms, device=torch.device('cpu'), **kw)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.Flatten(), nn.Linear(4*14*14, 2)), metrics=accuracy)
    learn.logger = noop
    return learn.remove_cbs(ProgressCallback)

norm = lambda: Normalize.from_stats([0.4,0.5,0.6], [0.2,0.25,0.3])

def test_agrees_with_fastai_for_the_same_views(tmp_path):
    path = folder(tmp_path)
    for tfm in (lambda: Flip(p=1., draw=1.), lambda: Brightness(p=1., draw=0.6), lambda: Zoom(p=1., draw=1.2, draw_x=0.5, draw_y=0.5), lambda: Dihedral(p=1., draw=5)):
        learn = vision(path, [tfm(), norm()])
        theirs,t1 = learn.tta(n=1, beta=0.25)
        ours,t2 = learn.get_preds(cbs=TTA(train_views(1)))
        assert torch.allclose(ours, theirs, atol=2e-5) and torch.equal(t1, t2), tfm()
    learn = vision(path, [norm()])
    level = learn.get_preds(cbs=TTA(brightness_views((0.6,))))[0]
    assert torch.allclose(level, vision(path, [Brightness(p=1., draw=0.6), norm()]).tta(n=1, beta=0.)[0], atol=1e-2)

def test_training_views_are_seeded_and_leave_no_trace(tmp_path):
    learn = vision(folder(tmp_path), [*aug_transforms(size=16), RandomErasing(p=1.), norm()])
    def state(): return [{k: v for k,v in t.__dict__.items() if k not in ('mat','do','split_idx')} for t in learn.dls.train.after_batch.fs],[str(t) for t in learn.dls.train.after_batch.fs]
    before,plain = state()[1],learn.get_preds()[0]
    def after(seed):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        p = learn.get_preds(cbs=TTA(seed=seed))[0] if seed is not None else learn.get_preds()[0]
        return p,(torch.rand(1).item(), random.random(), np.random.rand())
    (a,ra),(b,rb),(c,rc),(_,r) = after(1),after(1),after(2),after(None)
    assert torch.equal(a, b) and not torch.allclose(a, c) and ra==rb==rc==r
    assert state()[1]==before and torch.equal(learn.get_preds()[0], plain)
    single = [learn.predict(f)[2] for f in learn.dls.valid_ds.items[:2]]
    with tta_ctx(learn, flip_views()): pred = [learn.predict(f)[2] for f in learn.dls.valid_ds.items[:2]]
    assert torch.allclose(torch.stack(pred), learn.get_preds(cbs=TTA(flip_views()))[0][:2], atol=1e-5) and not torch.allclose(pred[0], single[0])

def test_each_image_is_decoded_once(tmp_path):
    n = []
    class Counting(PILImage):
        @classmethod
        def create(cls, fn, **kw):
            n.append(fn)
            return super().create(fn, **kw)
    block = DataBlock((ImageBlock(Counting), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter(), batch_tfms=[*aug_transforms(), norm()])
    dls = block.dataloaders(folder(tmp_path), bs=7, num_workers=0, device=torch.device('cpu'))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*256, 2))).remove_cbs(ProgressCallback)
    def count(f):
        n.clear()
        f()
        return len(n)
    assert count(lambda: learn.get_preds(cbs=TTA(train_views(4))))==24
    assert count(lambda: learn.tta(n=4))==24*5

def test_tabular_and_ratings():
    from fastai.collab import CollabDataLoaders,collab_learner
    from fastai.tabular.all import Categorify,TabularDataLoaders,tabular_learner
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=r.choice(list('xyz'), 60), b=r.normal(size=60).astype('float32'), y=r.choice(['u','v'], 60)))
    tab = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['a'], cont_names=['b'], y_names='y', y_block=CategoryBlock(), valid_idx=list(range(20)), bs=8)
    rat = pd.DataFrame(dict(user=r.integers(0,9,90), item=r.integers(0,7,90), rating=r.random(90).astype('float32')))
    col = CollabDataLoaders.from_df(rat, bs=8, seed=1, valid_pct=0.3)
    for learn in (tabular_learner(tab, layers=[6], config=dict(ps=[0.4], embed_p=0.1)), collab_learner(col, n_factors=4, y_range=(0,1))):
        learn.remove_cbs(ProgressCallback)
        drop = any(isinstance(m, nn.Dropout) and m.p for m in learn.model.modules())
        state = {k: v.clone() for k,v in learn.model.state_dict().items()}
        for views in [noise_views(4)]+[dropout_views(4)]*drop:
            p,_,sd = tta_preds(learn, views, spread=True)
            again = tta_preds(learn, views, spread=True)
            assert torch.equal(p, again[0]) and torch.equal(sd, again[2]) and sd.shape==p.shape and sd.max()>0
            assert not torch.equal(p, tta_preds(learn, views, seed=7)[0])
        assert all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())
        one = tta_preds(learn, noise_views(3), dl=learn.dls.valid.new(bs=5))[0]
        assert torch.allclose(one, tta_preds(learn, noise_views(3))[0], atol=1e-6) # noise is a draw of the model, not of the batch
        if not drop:
            with pytest.raises(ValueError, match='need dropout layers'): learn.get_preds(cbs=TTA(dropout_views(2)))
        for views in (flip_views(), train_views(2)):
            with pytest.raises(ValueError, match='for images|random batch transforms'): learn.get_preds(cbs=TTA(views))

def test_outputs_that_are_tuples():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = Mean(n_out=3),Mean(n_out=2)
        def forward(self, x): return self.a(x),self.b(x)
    learn = images(model=Two(), loss=lambda p,y: F.cross_entropy(p[0], y)+p[1].mean())
    learn.metrics = []
    a,b = learn.get_preds(cbs=TTA(flip_views()), act=noop)[0]
    p,q = [learn.get_preds(cbs=TTA([v]), act=noop)[0] for v in flip_views()]
    assert torch.allclose(a, (p[0]+q[0])/2, atol=1e-6) and torch.allclose(b, (p[1]+q[1])/2, atol=1e-6)

@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError])
def test_interrupted(ex):
    learn = images(model=nn.Sequential(Mean(), nn.Dropout(0.5)))
    learn.model[1].eval()
    cbs,plain = list(learn.cbs),learn.get_preds()[0]
    n = []
    def stop(x):
        n.append(1)
        if len(n)==3: raise ex('stop')
        return x
    state = torch.random.get_rng_state()
    with pytest.raises(ex): learn.get_preds(cbs=TTA(product_views(dropout_views(1), [BatchView('stop', stop)])))
    modes = [m.training for m in learn.model.modules()]
    assert list(learn.cbs)==cbs and not any(modes) and torch.equal(learn.get_preds()[0], plain)
    n.clear()
    with pytest.raises(ex), tta_ctx(learn, [BatchView('stop', stop)]): learn.validate()
    assert list(learn.cbs)==cbs

def test_bad_arguments():
    for kw,match in [(dict(views=[]),'empty'), (dict(views=flip_views(), weights=[1]),'1 `weights` and 2 views'), (dict(beta=2),'between 0 and 1'),
                     (dict(merge='best'),'not one of'), (dict(on='p'),'not one of'), (dict(out='x'),'not one of'), (dict(merge='rank'),'all rows'),
                     (dict(views=flip_views(), merge='max', weights=[1,2]),'no use for'), (dict(seed=-1),'at least 0')]:
        with pytest.raises(ValueError, match=match): TTA(**kw)
    for views in ('flip', [1,2], dict(a=1), [*flip_views(),'flip']):
        with pytest.raises(TypeError, match=r"`views` should be `BatchView`s, such as flip_views\(\), got"): TTA(views)
    learn = images()
    with pytest.raises(ValueError, match='keeps the size'): learn.get_preds(cbs=TTA([BatchView('half', lambda x: x[...,::2])]))
    with pytest.raises(ValueError, match='keeps the size'): images(sz=8, model=nn.Sequential(nn.Flatten(), nn.LazyLinear(3))).get_preds(cbs=TTA([BatchView('wide', lambda x: x[...,:4])]))
    with pytest.raises(ValueError, match="NaN in view 'bad' of batch 0"): learn.get_preds(cbs=TTA([*flip_views(), BatchView('bad', lambda x: x*float('nan'))]))
    with pytest.raises(ValueError, match="NaN in view"): learn.get_preds(cbs=TTA([BatchView('bad', lambda x: x*float('nan'))]))
    with pytest.raises(ValueError, match='random batch transforms'): learn.get_preds(cbs=TTA())
    assert learn.get_preds()[0].shape==(11,3)
