"Maps and interpretation: oracles, hostile titles, users and columns of any learner, nothing left changed"
import json,re,sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np,pandas as pd,pytest,torch
from torch import nn
from fastai.collab import CollabDataLoaders,collab_learner
from fastai.tabular.all import Categorify,CategoryBlock,Normalize,TabularDataLoaders,tabular_learner
from cfext.core import UnknownIdError
from cfext.bundle import load_bundle
from cfext.closed import EASE,IALS,ItemKNN
from cfext.data import CFDataLoaders
from cfext.graph import BuiltFactors,LightGCN
from cfext.embed import emb_report,plot_spectrum,shrink_curve
from cfext.interpret import *
import cfext.interpret as interpret,cfext.maps as maps
from cfext.learner import cf_learner
from cfext.maps import *
from cfext.models import CollabNN,DotProduct,DotProductBias
from cfext.newcomers import RowPrior
from cfext.sides import SideProduct
from cfext.sources import synth_ratings,read_ratings

ratings,truth = synth_ratings(70, 50, 1600, with_truth=True)

def fit(learn, n=2, lr=.03):
    with learn.no_bar(),learn.no_logging(): learn.fit(n, lr, wd=.1)
    return learn

@pytest.fixture(scope='module')
def dls(): return CFDataLoaders.from_df(ratings, item_name='title', seed=1, bs=32, device='cpu')
@pytest.fixture(scope='module')
def learn(dls): return fit(cf_learner(dls, n_factors=6, y_range=(.5,5.5), seed=1))
@pytest.fixture(scope='module')
def theirs():
    dls = CollabDataLoaders.from_df(ratings, item_name='title', rating_name='rating', seed=1, bs=32, device='cpu')
    return fit(collab_learner(dls, n_factors=6, y_range=(.5,5.5)))
@pytest.fixture(scope='module')
def shop():
    df = ratings.assign(day=(ratings.timestamp%7).map(dict(enumerate('Mon Tue Wed Thu Fri Sat Sun'.split()))), x=np.sin(ratings.timestamp),
                        rating=ratings.rating.astype('float32'))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names=['title','day'], cont_names=['x'], y_names='rating', bs=32, seed=1, device='cpu')
    return fit(tabular_learner(dls, layers=[8], emb_szs=dict(title=6, day=3)))

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def overlapping(ax):
    ax.figure.canvas.draw()
    bs,frame = [t.get_window_extent() for t in ax.texts],ax.get_window_extent()
    out = [b for b in bs if b.x0<frame.x0-1 or b.y0<frame.y0-1 or b.x1>frame.x1+1 or b.y1>frame.y1+1]
    return sum(a.overlaps(b) for i,a in enumerate(bs) for b in bs[:i])+len(out)

@pytest.mark.parametrize('n,f', [(40,6),(7,3),(5,9),(300,2)])
def test_pca_against_sklearn(n, f):
    from sklearn.decomposition import PCA
    t = np.random.default_rng(n).normal(size=(n,f))@np.diag(np.arange(1,f+1))
    k = min(n-1, f)
    scores,share = pca_axes(t, k)
    pca = PCA(k).fit(t)
    assert scores.shape==(n,k) and np.allclose(np.abs(scores), np.abs(pca.transform(t)), atol=1e-8)
    assert np.allclose(share, pca.explained_variance_ratio_)
    assert (scores[np.abs(scores).argmax(0), range(k)]>0).all()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(f,f)))[0]
    assert np.allclose(pca_axes(t@turn, k)[0], scores, atol=1e-7)

@pytest.mark.parametrize('n,size,fontsize,n_labels', [(300,(4,3),10,60),(1000,(9,7),7,200),(3,(2,2),8,40),(50,(6,1.2),9,50)])
@pytest.mark.parametrize('cluster', [False,True])
def test_labels_do_not_overlap(n, size, fontsize, n_labels, cluster):
    rng = np.random.default_rng(n)
    xy = rng.normal(size=(n,2))*(.01 if cluster else 1)+(rng.integers(0, 2, (n,1)) if cluster else 0)
    names = ['W'*rng.integers(1, 30)+' $5_^{' for _ in range(n)]
    ax = draw_map(xy, names, rng.integers(0, 3, n).astype(str), rng.random(n), n_labels=n_labels, fontsize=fontsize,
                  ax=plt.subplots(figsize=size, layout='constrained')[1])
    assert overlapping(ax)==0 and len(ax.texts)<=n_labels

def test_labels_go_to_the_heaviest():
    ax = draw_map([[0,0],[0,0],[1,1]], ['light','heavy','far'], weight=[1,9,2], n_labels=2)
    assert [t.get_text() for t in ax.texts]==['heavy','far']

def test_projections():
    rng = np.random.default_rng(0)
    t = np.concatenate([rng.normal(size=(20,5)), rng.normal(size=(20,5))+8])
    for m in ('pca','tsne'):
        xy = project(t, m)
        assert xy.shape==(40,2) and np.array_equal(xy, project(t, m))
        d = np.linalg.norm(xy[:,None]-xy, axis=2)
        assert d[:20,:20].mean()<d[:20,20:].mean()
    assert project(t[:,:1]).shape==(40,2)
    try: import umap
    except ImportError:
        with pytest.raises(ImportError, match=r"cfext\[umap\]"): project(t, 'umap')
    else: assert project(t, 'umap').shape==(40,2)

def test_colors():
    c = color_points(pd.Categorical(['b','a','b',None]))
    assert c.names==['b','a','unknown'] and c.idx.tolist()==[0,1,0,2] and len(c.palette)==3
    c = color_points(pd.array([1,None,3], dtype='Int64'))
    assert c.names==[] and (c.lo,c.hi)==(1,3) and c.idx.tolist()==[0,63,62]
    assert color_points([2.,2.,2.]).idx.tolist()==[0,0,0]
    assert color_points([True,False,True]).names==['True','False']
    c = color_points([f'g{i%11}' for i in range(30)])
    assert len(c.names)==9 and c.names[-1]=='other' and c.idx.max()==8

evil = ['</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"; alert(1); "', "a'b&c\u2028d", '<!--<script>', '__JS__ __DATA__ \\u003c']

@pytest.mark.parametrize('color', [None, evil, [1.,2,3,4,5,np.nan]])
def test_page_holds_no_foreign_markup(tmp_path, color):
    f = map_page(tmp_path/'sub'/'m.html', np.random.default_rng(0).normal(size=(6,2)), evil, color, title=evil[0], info=evil, color_name=evil[1])
    page = f.read_text(encoding='utf-8')
    assert page.count('<script')==2 and page.count('</script>')==2 and '<img' not in page and '<!--' not in page
    data = json.loads(re.search(r'application/json">(.*?)</script>', page, re.S)[1])
    assert data['t']==evil and data['info']==evil and len(data['x'])==6
    assert not re.search(r'(src|href)\s*=\s*["\']|@import|url\(|https?://|innerHTML|document\.write|eval\(', page.replace(json.dumps(data), '').split('<script id="data"')[0]+page.split('</script>')[1])
    assert [p.name for p in (tmp_path/'sub').iterdir()]==['m.html']

def test_page_scripts_parse(tmp_path):
    import shutil,subprocess
    if not (node := shutil.which('node')): pytest.skip('no node here to parse the script of the page')
    page = map_page(tmp_path/'m.html', np.zeros((3,2)), list('abc')).read_text()
    (tmp_path/'m.js').write_text(page.split('<script>')[1].split('</script>')[0])
    assert subprocess.run([node,'--check',str(tmp_path/'m.js')]).returncode==0

def test_page_of_27000_points_is_small(tmp_path):
    n = 27_000
    f = map_page(tmp_path/'m.html', np.random.default_rng(0).normal(size=(n,2)), [f'Film {i} (1999)' for i in range(n)], ['a','b']*(n//2), np.arange(n))
    assert f.stat().st_size<3e6

@pytest.mark.parametrize('xy', [np.zeros((2,2)), np.full((3,2), np.nan), np.zeros(3)])
def test_page_refuses_bad_places(tmp_path, xy):
    with pytest.raises(ValueError, match='`xy` should be'): map_page(tmp_path/'m.html', xy, list('abc'))
    assert not list(tmp_path.iterdir())

def test_views_agree_with_the_frame(dls, learn, theirs, shop):
    for l in (learn, theirs):
        for role,col in (('user','user'),('item','title')):
            v = cat_view(l, role)
            ds = l.dls.train_ds
            code,y = (ds.x[:,('user','item').index(role)].numpy(),ds.y[:,0].numpy()) if hasattr(ds, 'x') and l is learn else (ds.cats[col].to_numpy(),ds.ys.iloc[:,0].to_numpy())
            df = pd.DataFrame(dict(id=np.array(list(l.dls.classes[col]), dtype=object)[code], y=y)).groupby('id').y.agg(['size','mean'])
            assert v.col==col and (v.count==df['size'].reindex(v.ids).fillna(0)).all()
            assert np.allclose(v.mean[v.count>0], df['mean'].reindex(v.ids[v.count>0]), atol=1e-5)
            assert v.table.shape==(len(l.dls.classes[col])-1,6) and v.bias.shape==(len(v),)
    assert cat_view(shop, 'day').table.shape==(7,3) and cat_view(shop, 'title').bias is None
    named = cat_view(learn, titles={learn.dls.classes['title'][1]:'First'})
    assert named.names[0]=='First' and named.names[1]==named.ids[1] and cat_view(named) is named

def test_recovers_the_planted_biases():
    world,t = synth_ratings(400, 60, 9000, noise=.3, with_truth=True)
    l = fit(cf_learner(CFDataLoaders.from_df(world, item_name='title', seed=2, device='cpu'), n_factors=8, y_range=(.5,5.5), seed=2), 8)
    b = biases(l).set_index('title').bias
    assert np.corrcoef(b, pd.Series(t['item_bias'], index=t['titles'])[b.index])[0,1]>.9

@pytest.mark.parametrize('col', ['item','user'])
def test_biases(learn, theirs, col):
    for l in (learn, theirs):
        b = biases(l, col, min_count=3)
        assert b.bias.is_monotonic_increasing and (b['count']>=3).all()
        axs = show_biases(l, col, k=4, min_count=3)
        assert [t.get_text() for t in axs[0].get_yticklabels()]==[str(o) for o in [*b.iloc[:4,0], *b.iloc[-4:,0]]]
        assert overlapping(axs[1])==0

def test_nothing_is_changed(learn):
    learn.model.train()
    learn.model.item_factors.requires_grad_(True)
    before,rng,frame = {k:v.clone() for k,v in learn.model.state_dict().items()},torch.get_rng_state(),ratings.copy()
    nrng = np.random.get_state()[1].copy()
    show_item_map(learn, color='genre', df=ratings); show_biases(learn, k=3); describe_axes(learn); nearest(learn, cat_view(learn).ids[3], 4)
    explain(learn, cat_view(learn, 'user').ids[5], cat_view(learn).ids[2])
    assert learn.model.training and all(p.grad is None or True for p in learn.model.parameters())
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and np.array_equal(nrng, np.random.get_state()[1]) and frame.equals(ratings)

@pytest.mark.parametrize('col', [None,'user'])
@pytest.mark.parametrize('color', [None,'count','mean','bias','genre','rating'])
def test_maps(learn, tmp_path, col, color):
    ax = show_item_map(learn, col, color=color, df=ratings, n_labels=12, html=tmp_path/'m.html')
    assert overlapping(ax)==0 and len(ax.texts)<=12 and (tmp_path/'m.html').exists()
    assert '%' in ax.get_xlabel()
    ax = show_item_map(learn, col, top=9)
    assert len(ax.collections[0].get_offsets())==9

def test_map_of_a_hostile_title(tmp_path):
    bad = ratings.assign(title=ratings.title.where(ratings.title!=ratings.title.iloc[0], evil[0]), genre=evil[1])
    l = cf_learner(CFDataLoaders.from_df(bad, item_name='title', seed=1, device='cpu'), n_factors=3, seed=1)
    show_item_map(l, color='genre', df=bad, html=tmp_path/'m.html', top=None)
    page = (tmp_path/'m.html').read_text(encoding='utf-8')
    assert page.count('<script')==2 and '<img' not in page and '\\u003c/script\\u003e' in page

def test_maps_of_columns(shop):
    ax = show_item_map(shop, 'day', color='count')
    assert {t.get_text() for t in ax.texts}<=set('Mon Tue Wed Thu Fri Sat Sun'.split()) and overlapping(ax)==0
    genre = ratings.groupby('title').genre.first()
    ax = show_item_map(shop, 'title', color=genre)
    assert {t.get_text() for t in ax.get_legend().get_texts()}==set(genre)
    assert describe_axes(shop, 'day', n_axes=2, k=2).shape==(2,5)
    dls = CFDataLoaders.from_df(ratings, item_name='title', seed=1, device='cpu')
    for n in (1,2,5): assert len(describe_axes(cf_learner(dls, n_factors=n, seed=1)))==min(n, 3)

@pytest.mark.parametrize('how', ['cosine','dot','euclid'])
@pytest.mark.parametrize('col', [None,'user'])
def test_nearest_against_a_loop(learn, how, col):
    v = cat_view(learn, col)
    ids = [v.ids[3],v.ids[0],v.ids[3]]
    res = nearest(learn, ids, 5, col, how)
    assert len(res)==15 and res['rank'].tolist()==[1,2,3,4,5]*3
    f = dict(cosine=lambda a,b: a@b/np.linalg.norm(a)/np.linalg.norm(b), dot=lambda a,b: a@b, euclid=lambda a,b: -np.linalg.norm(a-b))[how]
    for q,part in zip((3,0,3), (res[:5],res[5:10],res[10:])):
        vals = sorted(((f(v.table[q], t),i) for i,t in enumerate(v.table) if i!=q), key=lambda o: (-o[0],o[1]))[:5]
        assert part.near.tolist()==[v.names[i] for _,i in vals]
        assert np.allclose(part[how].abs(), [abs(x) for x,_ in vals])

def test_errors_add_up(learn, shop, theirs):
    for l in (learn, shop, theirs):
        p,y = l.get_preds(ds_idx=1)[:2]
        mse = ((p.reshape(-1)-y.reshape(-1))**2).mean().item()
        for col in l.dls.cat_names:
            e = error_by_count(l, col, n_bins=4)
            assert e.rows.sum()==len(y) and np.isclose((e.rmse**2*e.rows).sum()/len(y), mse, atol=1e-5)
            assert (e.least<=e.most).all() and e.least.is_monotonic_increasing and len(e)<=5
        assert f'RMSE {mse**.5:.3f}' in show_preds(l).child_axes[0].get_title()
        assert len(show_errors(l, n_bins=3))==len(l.dls.cat_names)

def ridge(phi, target, lam): return np.linalg.solve(phi.T@phi+lam*np.eye(phi.shape[1]), phi.T@target)

@pytest.mark.parametrize('through', ['items','users'])
def test_explain_is_exact_for_a_ridge_solution(dls, through):
    l = cf_learner(dls, DotProductBias, n_factors=4, config=dict(init=(-1.,1.)), seed=3)
    m,x,y = l.model,dls.train_ds.x.long().numpy(),dls.train_ds.y[:,0].numpy().astype(float)
    role = ('items','users').index(through)
    own,fixed = (m.user_factors,m.item_factors) if role==0 else (m.item_factors,m.user_factors)
    code,target = 9,4
    rows = np.flatnonzero(x[:,role]==code)
    Q = fixed.detach().double().numpy()
    r = y[rows]-m.user_bias.detach().double().numpy()[x[rows,0],0]-m.item_bias.detach().double().numpy()[x[rows,1],0]
    full = ridge(Q[x[rows,1-role]], r, 3.)
    with torch.no_grad(): own[code] = torch.tensor(full, dtype=torch.float32)
    ids = [dls.classes['user'][code],dls.classes['title'][target]] if role==0 else [dls.classes['user'][target],dls.classes['title'][code]]
    ex = explain(l, *ids, None, through=through)
    assert np.isclose(ex.share.sum(), Q[target]@full, atol=1e-4) and np.isclose(ex.attrs['reg'], 3, rtol=1e-2)
    assert np.isclose(ex.attrs['taste'], ex.attrs['explained'], atol=1e-4)
    col = ex.columns[0]
    loo = {o: Q[target]@(full-ridge(np.delete(Q[x[rows,1-role]], j, 0), np.delete(r, j), 3.)) for j,o in enumerate(dls.classes[col].decode(x[rows,1-role]))}
    ex = explain(l, *ids, None, through=through, reg=3.)
    assert np.allclose(ex.loo, [loo[o] for o in ex[col]], atol=1e-4)
    assert (ex.share.abs().diff().dropna()<=1e-12).all() and len(ex)==len(rows)

@pytest.mark.parametrize('model,config', [(LightGCN,{}),(LightGCN,dict(unit=True)),(SideProduct,dict(items=ratings.drop_duplicates('title')[['title','genre']]))])
@pytest.mark.parametrize('through', ['items','users'])
def test_explain_by_factors_that_are_built(dls, model, config, through):
    l = fit(cf_learner(dls, model, n_factors=5, y_range=(.5,5.5), seed=1, config=config))
    ids = cat_view(l, 'user').ids[5],cat_view(l).ids[7]
    ex,plain = explain(l, *ids, None, through=through),explain(cf_learner(dls, BuiltFactors.without_rows(l.model)), *ids, None, through=through)
    pd.testing.assert_frame_equal(ex, plain)
    assert np.isclose(ex.attrs['pred'], l.predict(ids)[2].item(), atol=1e-5) and ex.share.abs().max()>0

def test_explain_leaves_the_parameters_of_a_shared_model_in_place(dls, learn):
    "Other threads may ask the same model while an explanation is worked out"
    u,v = cat_view(learn, 'user').ids,cat_view(learn).ids
    during = []
    class Spy(DotProductBias):
        def forward(self, x):
            during.append(shared.user_factors)
            return super().forward(x)
    shared = Spy.restore(learn.model.config, learn.model.state_dict())
    own = shared.user_factors
    explain(cf_learner(dls, shared), u[5], v[2])
    assert len(during)>1 and all(o is own for o in during)

def test_explain_from_threads(learn):
    u,v = cat_view(learn, 'user').ids[:12],cat_view(learn).ids
    ask = lambda o: (explain(learn, o, v[2]).share.tolist(), learn.recommend([o], k=3).score.tolist())
    want,old = [ask(o) for o in u],sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as ex: got = list(ex.map(ask, [*u]*3))
    finally: sys.setswitchinterval(old)
    assert got==want*3 and [ask(o) for o in u]==want

@pytest.mark.parametrize('model', ['dot','nn',DotProduct])
def test_explain_works_for_any_model_with_factors(dls, model):
    l = fit(cf_learner(dls, model, y_range=(.5,5.5), seed=1, **({'n_factors':5} if model!='nn' else {})))
    v,u = cat_view(l),cat_view(l, 'user')
    ex = explain(l, u.ids[u.count.argmax()], v.ids[7], 6)
    assert len(ex)==6 and np.isfinite(ex[['share','loo']].to_numpy()).all() and .5<ex.attrs['pred']<5.5

def test_explain_on_fastais_learner(theirs):
    v,u = cat_view(theirs),cat_view(theirs, 'user')
    ex = explain(theirs, u.ids[u.count.argmax()], v.ids[7], 3)
    assert ex.columns.tolist()==['title','rating','share','loo']

def test_bad_input(learn, shop, dls):
    cases = [(ValueError, 'one of the columns with a table: user, title, or user, item', lambda: show_item_map(learn, 'genre')),
             (ValueError, 'one of the columns with a table: title, day', lambda: nearest(shop, 'Mon')),
             (UnknownIdError, 'Nosferatu', lambda: nearest(learn, ['Nosferatu', cat_view(learn).ids[0]])),
             (ValueError, "`how`='manhattan'", lambda: nearest(learn, cat_view(learn).ids[0], how='manhattan')),
             (ValueError, 'there are only 6 others of day', lambda: nearest(shop, 'Mon', 7, 'day')),
             (ValueError, '`k`=40 lowest and highest need 80 categories', lambda: show_biases(learn, k=40)),
             (ValueError, 'no bias for each day', lambda: show_biases(shop, 'day')),
             (ValueError, 'names at each end need 8 of day, there are 7', lambda: describe_axes(shop, 'day', 2, 4)),
             (ValueError, "`n_axes`=9", lambda: describe_axes(learn, n_axes=9)),
             (ValueError, "`color`='genre': pass df=", lambda: show_item_map(learn, color='genre')),
             (ValueError, '`color` has 3 values for', lambda: show_item_map(learn, color=[1,2,3])),
             (ValueError, "`method`='lle'", lambda: show_item_map(learn, method='lle')),
             (ValueError, '`top`=1', lambda: show_item_map(learn, top=1)),
             (ValueError, 'explain needs a learner over users and items|no factors of users and items', lambda: explain(shop, 1, 2)),
             (UnknownIdError, 'Nosferatu', lambda: explain(learn, cat_view(learn, 'user').ids[0], 'Nosferatu')),
             (ValueError, "`k`=-1", lambda: explain(learn, 1, 2, k=-1)), (ValueError, '`reg`=-1', lambda: explain(learn, 1, 2, reg=-1)),
             (TypeError, '`titles` should be .* got str', lambda: cat_view(learn, titles='title')), (TypeError, 'got DataFrame', lambda: cat_view(learn, titles=ratings)),
             (ValueError, "`through`='genres'", lambda: explain(learn, 1, 2, through='genres'))]
    for err,match,f in cases:
        with pytest.raises(err, match=match): f()
    class Bare(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(2, 1)
        def forward(self, x): return self.lin(x.float())
    bare = cf_learner(dls, Bare())
    for f in (show_item_map, biases, describe_axes):
        with pytest.raises(ValueError, match='no embedding tables'): f(bare)
    with pytest.raises(ValueError, match='no factors'): explain(bare, cat_view(learn, 'user').ids[0], cat_view(learn).ids[0])

def test_one_column_of_errors(learn): assert [ax.get_xlabel() for ax in show_errors(learn, 'user')]==['training rows of the user']

def test_series_that_repeat_an_id(learn):
    "The first value that there is counts, as with a frame"
    by_title = ratings.set_index('title')
    ax,want = (show_item_map(learn, color=c, df=d) for c,d in ((by_title.genre,None),('genre',ratings)))
    assert ax.collections[0].get_facecolors().tolist()==want.collections[0].get_facecolors().tolist()
    v = cat_view(learn, 'user')
    some = pd.Series(['a','b',None,'c'], index=[v.ids[2],v.ids[2],v.ids[5],v.ids[5]])
    named = cat_view(learn, 'user', titles=some)
    assert named.names[[2,5,6]].tolist()==['a','c',v.ids[6]] and all(not isinstance(o, pd.Series) for o in named.names)
    with pytest.raises(ValueError, match="`color`='genre' names 2 columns"): show_item_map(learn, color='genre', df=pd.concat([ratings,ratings[['genre']]], axis=1))

@pytest.mark.parametrize('method', ['pca','tsne'])
@pytest.mark.parametrize('top', [2,3])
def test_map_of_a_few_points(learn, tmp_path, top, method):
    ax = show_item_map(learn, top=top, method=method, html=tmp_path/'m.html', color='count')
    assert len(ax.collections[0].get_offsets())==top and 1<=len(ax.texts)<=top
    if method=='pca': assert ax.get_xlabel().startswith('axis 1 (') and ax.get_ylabel().startswith('axis 2 (')==(top>2)
    xy = project([[0,3.],[4,0]])
    assert xy.shape==(2,2) and np.isclose(np.abs(np.diff(xy, axis=0)), [[5,0]]).all()

def test_learners_without_rows(learn, dls, tmp_path):
    "What needs rows says so; what does not goes on"
    none = fit(cf_learner(CFDataLoaders.from_df(ratings, item_name='title', valid_pct=0, bs=32, device='cpu'), n_factors=4), 1)
    bare = load_bundle(learn.save_bundle(tmp_path/'b', history=False), device='cpu')
    for f in (show_preds, show_errors, error_by_count):
        with pytest.raises(ValueError, match='has no validation rows to predict: hold some out .* ds_idx=0'): f(none)
        f(none, ds_idx=0)
        with pytest.raises(ValueError, match='has no training rows to predict: it was loaded without'): f(bare, ds_idx=0)
    u,i = cat_view(learn, 'user').ids[3],cat_view(learn).ids[4]
    with pytest.raises(ValueError, match=f"no training rows of user {u!r} to explain by"): explain(bare, u, i)
    with pytest.raises(ValueError, match="no training rows of title '.*' to explain by"): explain(bare, u, i, through='users')
    with pytest.raises(ValueError, match='no training rows to estimate it from'): bare.fold_in(ratings[:5].assign(user=999))
    with pytest.raises(ValueError, match='no training rows to estimate it from'): bare.partial_fit(ratings[:5].assign(user=999))
    prior = RowPrior(learn.model, dls.train_ds)
    rows = ratings[:5].assign(user=999)
    torch.testing.assert_close(bare.fold_in(rows, prior=prior).model.user_factors[-1], learn.fold_in(rows).model.user_factors[-1])
    for solve in (EASE,ItemKNN,IALS):
        with pytest.raises(ValueError, match='no training rows to solve from'): solve(bare.dls)
    for l in (bare,none):
        with pytest.raises(ValueError, match='no validation rows to measure'): shrink_curve(l, [3])
    rep,full = emb_report(bare, plot=False),emb_report(learn, plot=False)
    assert rep.effective.isna().all() and (rep['width']==full['width']).all() and rep['rank'].between(1, 6).all()
    assert len(plot_spectrum(bare).lines)==2 and len(nearest(bare, i, 3))==3

def test_classifier_is_refused_by_error_plots(dls):
    df = ratings.assign(good=ratings.rating>3, x=np.cos(ratings.timestamp))
    tab = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['user','title'], cont_names=['x'], y_names='good', y_block=CategoryBlock(), bs=32, device='cpu')
    l = tabular_learner(tab, layers=[4])
    with pytest.raises(ValueError, match='expected one number for each row'): show_preds(l)
    assert describe_axes(l, 'title', 2, 2).shape==(2,5)

def test_methods_and_names(learn):
    for n in ('show_item_map','show_biases','show_preds','show_errors','nearest','describe_axes','explain','biases','cat_view','error_by_count'):
        assert getattr(type(learn), n) is getattr(interpret, n)
    import fastai.collab,fastai.tabular.all,fastai.text.all,fastai.vision.all
    theirs = set().union(*(dir(m) for m in (fastai.collab, fastai.tabular.all, fastai.text.all, fastai.vision.all)))
    assert not theirs&set(interpret.__all__+maps.__all__)

def test_star_wars(data_dir):
    df = read_ratings(data_dir('ml-100k'))
    dls = CFDataLoaders.from_df(df, item_name='title', seed=42, bs=512, device='cpu')
    l = fit(cf_learner(dls, n_factors=20, y_range=(0,5.5), seed=42), 5, 2e-2)
    assert 'Empire Strikes Back, The (1980)' in nearest(l, 'Star Wars (1977)', 3).near.tolist()
    ax = show_item_map(l, color='genres', df=df)
    assert overlapping(ax)==0 and len(ax.texts)>25

def test_small_catalogues_and_what_is_no_rating():
    from cfext import BPRLoss,EASE
    df = synth_ratings(60, 7, 200, seed=3)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=0, device='cpu'), n_factors=3, seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.02)
    assert len(show_biases(learn))==2 and len(describe_axes(learn).low.iloc[0])==3 and len(nearest(learn, 1))==6
    for l in (cf_learner(learn.dls, n_factors=3, loss_func=BPRLoss()), cf_learner(learn.dls, EASE)):
        for f in (show_preds, show_errors, error_by_count):
            with pytest.raises(ValueError, match='no scale of ratings.*learn.evaluate'): f(l)

def test_too_few_categories_are_told_where_k_was_left_open():
    learn = cf_learner(CFDataLoaders.from_df(synth_ratings(60, 7, 200, seed=3), seed=0, device='cpu'), n_factors=3, seed=0)
    with pytest.raises(ValueError, match='there are 0 with `min_count`=999'): show_biases(learn, min_count=999)
    v = cat_view(learn)
    one = CatView(v.col, v.ids[:1], v.names[:1], v.table[:1], v.bias[:1], v.count[:1], v.mean[:1])
    with pytest.raises(ValueError, match='need 2 of item, there are 1'): describe_axes(one)
    with pytest.raises(ValueError, match='only 0 others of item'): nearest(one, v.ids[0])

def test_each_id_that_was_never_seen_counts():
    from cfext import ColdUserSplitter
    df = synth_ratings(60, 30, 700, seed=3)
    dls = CFDataLoaders.from_df(df, splitter=ColdUserSplitter(.2, seed=0), device='cpu')
    learn = cf_learner(dls, n_factors=3, seed=0)
    tr,va = ColdUserSplitter(.2, seed=0)(df)
    e = error_by_count(learn, 'user')
    assert (e.most[0],e.ids[0],e.rows[0])==(0,df.user.iloc[va].nunique(),len(va))
    want = ((df.rating.iloc[va]-df.rating.iloc[tr].mean())**2).mean()**.5
    assert e.mean_rmse[0]==pytest.approx(want, rel=1e-4)
