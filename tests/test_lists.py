"Files of lists and the index, against `recommend`"
import importlib.util,pickle,sys,warnings

import numpy as np,pandas as pd,pytest,torch
from cfext import *

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def learn():
    dls = CFDataLoaders.from_df(synth_ratings(150, 90, 3000), item_name='title', seed=3, device='cpu', bs=64)
    l = cf_learner(dls, n_factors=5, y_range=(0.5,5.5), seed=0)
    with l.no_bar(),l.no_logging(): l.fit_one_cycle(2, 0.03)
    return l

@pytest.mark.parametrize('chunk', [7, 150, 1000])
def test_the_file_holds_what_recommend_gives(learn, tmp_path, chunk):
    pytest.importorskip('pyarrow')
    path = learn.recommend_to(tmp_path/'sub'/'l.parquet', k=4, chunk=chunk, exclude={5:['x']}, diversity=0.3)
    pd.testing.assert_frame_equal(pd.read_parquet(path), learn.recommend(k=4, exclude={5:['x']}, diversity=0.3), check_dtype=False, rtol=1e-5)
    import pyarrow.parquet as pq
    assert pq.ParquetFile(path).num_row_groups==-(-(learn.dls.n_users-1)//chunk)
    assert [o.name for o in path.parent.iterdir()]==['l.parquet']

def test_a_failure_leaves_the_old_file(learn, tmp_path):
    pytest.importorskip('pyarrow')
    path = learn.recommend_to(tmp_path/'l.parquet', [5,9], k=4)
    old = path.read_bytes()
    with pytest.raises(UnknownIdError): learn.recommend_to(path, [5,9,9999], k=4, chunk=2)
    assert path.read_bytes()==old and len(list(tmp_path.iterdir()))==1
    with pytest.raises(ValueError, match='`chunk`=0'): learn.recommend_to(path, chunk=0)

def test_short_lists_are_counted_once_and_no_users_make_an_empty_file(learn, tmp_path):
    pytest.importorskip('pyarrow')
    titles = learn.dls.classes['title'].ids
    with pytest.warns(UserWarning) as ws: path = learn.recommend_to(tmp_path/'l.parquet', k=3, candidates=titles[:2], chunk=40)
    assert [str(w.message).split(' lists')[0] for w in ws if 'lists hold fewer' in str(w.message)]==['150 of 150']
    assert pd.read_parquet(path)['rank'].max()<=2
    assert len(pd.read_parquet(learn.recommend_to(tmp_path/'e.parquet', [])))==0

def test_missing_rows_are_told_once_whatever_the_chunks(learn, tmp_path):
    pytest.importorskip('pyarrow')
    bare = load_bundle(learn.save_bundle(tmp_path/'b', history=False), device='cpu')
    with pytest.warns(UserWarning) as ws: bare.recommend_to(tmp_path/'l.parquet', k=3, chunk=40)
    assert ['nothing is left out as seen' in str(w.message) for w in ws]==[True]

def test_what_is_read_once_is_kept_for_all_chunks(learn, tmp_path):
    pytest.importorskip('pyarrow')
    us,titles = (learn.dls.classes[n].ids for n in ('user','title'))
    some = titles[:30].tolist()
    file = lambda users=None, **kw: pd.read_parquet(learn.recommend_to(tmp_path/'l.parquet', users, k=4, chunk=7, **kw))
    for kw in (dict(exclude=some), dict(candidates=some)):
        for once in ({n: iter(o) for n,o in kw.items()}, {n: {u: iter(o) for u in us} for n,o in kw.items()}):
            pd.testing.assert_frame_equal(file(**once), learn.recommend(k=4, **kw), check_dtype=False, rtol=1e-5)
    for some in ({5,9}, iter([5,9]), {5:0,9:0}.keys(), 5): assert set(file(some).user)<={5,9}
    with pytest.raises(TypeError, match='got a DataFrame: pass its column'): file(pd.DataFrame(dict(user=[5])))
    with pytest.raises(TypeError, match='got a function: only the `candidates` of `recommend` may be a rule'): file(exclude=lambda us: us)

def test_a_first_chunk_without_lists(tmp_path):
    pytest.importorskip('pyarrow')
    df = synth_ratings(60, 40, 1000).assign(user=lambda d: 'u'+d.user.astype(str))
    l = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=3, device='cpu'), n_factors=3, seed=0)
    us,titles = (l.dls.classes[n].ids for n in ('user','title'))
    with pytest.warns(UserWarning, match='59 of 60 lists'): got = pd.read_parquet(l.recommend_to(tmp_path/'l.parquet', k=2, chunk=7, candidates={us[-1]: titles}))
    assert got.user.tolist()==[us[-1]]*2
    with pytest.warns(UserWarning): none = pd.read_parquet(l.recommend_to(tmp_path/'l.parquet', us[:9], k=2, chunk=7, candidates=[]))
    assert len(none)==0 and (none.dtypes==got.dtypes).all()

def test_no_users_and_no_lists(learn):
    full,near = learn.recommend([5], k=3),learn.similar_users([5], k=3)
    indices = [ItemIndex(learn)] if importlib.util.find_spec('usearch') else []
    for got in (*(l.recommend([], k=3) for l in (learn,*indices)), learn.recommend([5], k=3, exclude=learn.dls.classes['title'].ids)):
        assert len(got)==0 and (got.dtypes==full.dtypes).all() and len(got.merge(full, on=['user','title']))==0
    assert (learn.similar_users([]).dtypes==near.dtypes).all()
    if indices: assert set(indices[0].recommend({5,9}, k=3).user)=={5,9}

def test_without_pyarrow_or_usearch(learn, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'usearch.index', None)
    with pytest.raises(ImportError, match=r"cfext\[fast-io\]"): learn.recommend_to(tmp_path/'l.parquet')
    with pytest.raises(ImportError, match=r"cfext\[ann\]"): ItemIndex(learn)

@pytest.mark.parametrize('kind', ['bias','dot','long vectors'])
def test_the_index_follows_the_scores(learn, kind):
    pytest.importorskip('usearch')
    dls,g = learn.dls,torch.Generator().manual_seed(0)
    model = (DotProduct if kind=='dot' else DotProductBias)(dls.n_users, dls.n_items, 6)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(generator=g)
        if kind=='long vectors': model.item_factors.mul_(torch.rand(dls.n_items, 1, generator=g)*3)
    l = cf_learner(dls, model, unk_p=0)
    index = ItemIndex(l, expansion_search=200)
    assert index.recall(k=10)>0.97
    users = torch.tensor([5,9,1])
    recs,s = index.top_items(users, 6)
    want,ws = top_items(l, users, 6)
    assert recs.shape==s.shape==(3,6) and (recs==want).float().mean()>0.9
    torch.testing.assert_close(s[recs==want], ws[recs==want], atol=1e-4, rtol=1e-4)
    seen = learn.dls.train_ds.x[learn.dls.train_ds.x[:,0]==5,1]
    assert not np.isin(recs[0], seen).any()

@pytest.mark.parametrize('kind', ['cosines','graph','graph of cosines','sides','towers','ials'])
def test_the_index_takes_cosines_and_built_factors(learn, kind):
    pytest.importorskip('usearch')
    dls,its = learn.dls,pd.DataFrame(dict(title=learn.dls.classes['title'].ids, n=range(90)))
    make = {'cosines':lambda: CosineProduct(dls.n_users, dls.n_items, 5), 'ials':lambda: IALS(dls, 5, n_iter=2), 'graph':lambda: LightGCN.from_dls(dls, n_factors=5, init_sd=1.),
            'graph of cosines':lambda: LightGCN.from_dls(dls, n_factors=5, unit=True), 'sides':lambda: SideProduct.from_dls(dls, items=its, n_factors=5),
            'towers':lambda: SideProduct.from_dls(dls, items=its, n_factors=5, layers=(6,))}
    torch.manual_seed(0)
    model = make[kind]()
    if kind not in ('ials','graph'):
        with torch.no_grad():
            for p in model.parameters(): p.normal_()
    l = cf_learner(dls, model, unk_p=0)
    l.model.train()
    index = ItemIndex(l, expansion_search=200)
    assert index.recall(k=10)>0.97 and l.model.training
    got,want = (o.recommend([5,9,1], k=6) for o in (index,l))
    both = got.merge(want, on=['user','title'])
    assert len(both)>=16 and np.allclose(both.score_x, both.score_y, atol=1e-4)

def test_an_index_is_pickled_as_it_is(learn):
    pytest.importorskip('usearch')
    index = ItemIndex(learn, connectivity=9, expansion_search=37)
    again = pickle.loads(pickle.dumps(index))
    assert repr(again)==repr(index) and len(again)==len(index)>0
    pd.testing.assert_frame_equal(again.recommend([5,9,1], k=6), index.recommend([5,9,1], k=6))

def test_no_item_is_lost_by_several_threads(learn):
    pytest.importorskip('usearch')
    assert all(ItemIndex(learn, threads=16, expansion_search=200).recall(k=10)==1 for _ in range(40))

def test_a_user_who_has_seen_nearly_everything(learn):
    pytest.importorskip('usearch')
    titles = learn.dls.classes['title'].ids
    df = pd.DataFrame(dict(user=np.repeat([1,2,3], [len(titles)-2,3,3]), title=[*titles[:-2],*titles[-3:],*titles[:3]], rating=3.))
    dls = CFDataLoaders.from_df(df, item_name='title', valid_pct=0, device='cpu')
    l = cf_learner(dls, n_factors=3, seed=0)
    with pytest.warns(UserWarning, match='1 of 2 lists hold fewer than `k`=4'): got = ItemIndex(l).recommend([1,2], k=4)
    pd.testing.assert_frame_equal(got[got.user==1], l.recommend(1, k=4), check_exact=False, rtol=1e-4)
    assert (got.user==2).sum()==4
