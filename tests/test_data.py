"Frames to loaders: any dtype of id, every row once, unknown ids by policy, the caller's frame unchanged"
import pickle,warnings

import numpy as np,pandas as pd,pyarrow as pa,pytest,torch
from fastai.collab import CollabDataLoaders
from fastai.tabular.all import RandomSplitter,ColSplitter,IndexSplitter
from cfext import *
from cfext.ids import _encode_train

pytestmark = pytest.mark.usefixtures('quiet')
dtypes = dict(int64=lambda s: s, int32=lambda s: s.astype('int32'), uint8=lambda s: s.astype('uint8'), nullable=lambda s: s.astype('Int64'),
              arrow_int=lambda s: s.astype('int64[pyarrow]'), float=lambda s: s.astype(float), big=lambda s: s+10**15, negative=lambda s: s-50, int8_wide=lambda s: (s*4-125).astype('int8'), int16_wide=lambda s: (s*1000-30000).astype('int16'),
              uint64_huge=lambda s: s.astype('uint64')+np.uint64(2**63+5), nullable_huge=lambda s: s.astype('UInt64')+(2**63+5),
              str=lambda s: s.map('u{:03}'.format), string=lambda s: s.map('u{:03}'.format).astype('string'),
              arrow_str=lambda s: s.map('u{:03}'.format).astype('string[pyarrow]'), object=lambda s: s.map('u{:03}'.format).astype(object),
              category=lambda s: s.astype('category'), category_str=lambda s: s.map('u{:03}'.format).astype('category'),
              datetime=lambda s: pd.to_datetime('2001-01-01')+pd.to_timedelta(s, unit='D'), unsorted_big=lambda s: (s*7919*10**10)%(10**13),
              mixed=lambda s: s.map(lambda o: o if o%2 else str(o)).astype(object))

decimal = pd.ArrowDtype(pa.decimal128(25, 2))

@pytest.fixture(scope='module')
def df(): return synth_ratings(60, 40, 900)[['user','item','title','rating','timestamp']]

def loaders(df, **kw): return CFDataLoaders.from_df(df, **{'seed':3, 'device':'cpu', 'bs':7, **kw})

def rows_of(ds):
    f = ds.frame((ds.x, ds.y))
    return sorted(zip(*(f[c].astype(str) for c in f)))

@pytest.mark.parametrize('name', dtypes)
def test_ids_of_any_dtype_come_back(df, name):
    d = df.assign(user=dtypes[name](df.user))
    copy = d.copy(deep=True)
    dls = loaders(d)
    pd.testing.assert_frame_equal(d, copy)
    mask = np.zeros(len(d), bool)
    mask[RandomSplitter(0.2, seed=3)(d)[1]] = True
    f = dls.train_ds.frame((dls.train_ds.x, dls.train_ds.y))
    assert f.user.tolist() == d.user[~mask].tolist() and f.item.tolist() == d.item[~mask].tolist()
    assert np.array_equal(f.rating, d.rating[~mask].astype('float32'))
    codes = dls.classes['user'].encode(d.user[~mask])
    assert codes.dtype==np.int32 and (codes==dls.train_ds.x[:,0].numpy()).all() and codes.min()==1

def test_categories_are_read_by_value_not_by_code(df):
    dls = loaders(df.assign(user=df.user.astype('category')))
    few = df[df.user.isin([5,9,30])]
    new = few.assign(user=pd.Categorical(few.user, categories=[30,9,5]))
    old = dls.test_dl(few).dataset.x
    assert torch.equal(dls.test_dl(new).dataset.x, old)

def test_unused_categories_get_no_code(df):
    d = df.assign(user=pd.Categorical(df.user, categories=[*range(100,60,-1), *range(60,0,-1)]))
    dls = loaders(d, valid_pct=0)
    assert list(dls.classes['user']) == ['#na#', *range(60,0,-1)]

def test_same_validation_rows_as_fastai(df):
    for seed in (0,42):
        theirs = CollabDataLoaders.from_df(df, item_name='title', rating_name='rating', seed=seed, device='cpu')
        ours = loaders(df, item_name='title', seed=seed)
        v = df.loc[theirs.valid_ds.items.index]
        f = ours.valid_ds.frame((ours.valid_ds.x, ours.valid_ds.y))
        known = (f.user!='#na#')&(f.title!='#na#')
        ref = sorted(zip(v.user.astype(str), v.title, v.rating))
        got = sorted(zip(f.user[known].astype(str), f.title[known], f.rating[known]))
        assert len(f)==len(ref) and set(got)<=set(ref)

@pytest.mark.parametrize('bs,n', [(7,701),(64,701),(1,50),(100,701),(1000,701)])
def test_every_row_once_an_epoch(df, bs, n):
    dls = loaders(df[:n], valid_pct=0, bs=bs)
    ref = rows_of(dls.train_ds)
    for _ in range(2):
        bx,by = zip(*dls.train)
        x,y = torch.cat(bx),torch.cat(by)
        assert len(x)==n and len(bx)==len(dls.train)
        f = dls.train_ds.frame((x,y))
        assert sorted(zip(*(f[c].astype(str) for c in f))) == ref
        assert all(b.dtype==torch.int64 and b.shape[1]==2 for b in bx) and all(b.shape[1]==1 and b.dtype==torch.float32 for b in by)

def test_blocks_change_nothing(df):
    dls = loaders(df)
    a = [b[0].clone() for b in dls.train.new(seed=5)]
    small = dls.train.new(seed=5)
    small.block = 21
    b = [b[0].clone() for b in small]
    assert len(a)==len(b) and all(torch.equal(p,q) for p,q in zip(a,b))

def test_last_batch(df):
    dls = loaders(df[:101], valid_pct=0, bs=20)
    assert [len(b[0]) for b in dls.train] == [20,20,20,20,21]
    assert [len(b[0]) for b in dls.train.new(shuffle=False)] == [20]*5+[1]
    assert [len(b[0]) for b in dls.train.new(drop_last=True)] == [20]*5

def test_order_follows_the_seed(df):
    def order(seed, noise=0):
        dls = loaders(df, seed=seed)
        torch.rand(noise)
        return [torch.cat([b[0] for b in dls.train]) for _ in range(2)]
    a,b,c = order(3),order(3, 17),order(4)
    assert all(torch.equal(p,q) for p,q in zip(a,b)) and not torch.equal(a[0],a[1]) and not torch.equal(a[0],c[0])
    torch.manual_seed(1); d = loaders(df, seed=None).train
    torch.manual_seed(2); p = torch.cat([b[0] for b in d])
    torch.manual_seed(2); q = torch.cat([b[0] for b in d])
    assert torch.equal(p,q)

def test_rows_of_one_user_stay_together(df):
    "x and y are cut alike"
    dls = loaders(df, valid_pct=0)
    truth = dict(zip(zip(df.user, df.item), df.rating))
    for x,y in dls.train:
        f = dls.train_ds.frame((x,y))
        assert all(truth[u,i]==r for u,i,r in zip(*(f[c] for c in f)))

def test_unknown_ids_by_policy(df):
    dls = loaders(df, valid_pct=0)
    new = pd.DataFrame(dict(item=[1,10_000,2], user=[5,6,-3]))
    with pytest.raises(UnknownIdError) as e: dls.test_dl(new)
    assert e.value.role=='user' and e.value.ids==[-3]
    with pytest.warns(UserWarning, match='unknown item'): x = dls.test_dl(new, unk='na').dataset.x
    assert x[:,0].tolist()==[*dls.classes['user'].encode([5,6]).tolist(),0] and x[1,1]==0 and (x[[0,2],1]>0).all()
    with pytest.raises(ValueError, match="`unk`='skip'"): dls.test_dl(new, unk='skip')
    assert loaders(df, unk='na').test_dl(new).unk=='na'

def test_cold_validation_rows_are_counted(df):
    held = np.flatnonzero(df.user<=3)
    with pytest.warns(UserWarning, match=f'of {len(held)} validation rows, {len(held)} have a user and 0 an item'):
        dls = loaders(df, splitter=IndexSplitter(held))
    assert (dls.valid_ds.x[:,0]==0).all() and len(dls.valid_ds)==len(held)

def test_duplicates(df):
    d = pd.concat([df, df.iloc[:5].assign(rating=1.)], ignore_index=True)
    assert len(loaders(d, valid_pct=0).train_ds)==905
    last = loaders(d, valid_pct=0, dups='last').train_ds
    assert len(last)==900 and (last.y==1).sum()==(df.rating[5:]==1).sum()+5
    mean = loaders(d, valid_pct=0, dups='mean').train_ds
    assert len(mean)==900 and abs(mean.y.sum().item()-(df.rating[5:].sum()+(df.rating[:5].sum()+5)/2))<1e-3
    with pytest.raises(ValueError, match='5 rows repeat a pair'): loaders(d, dups='raise')

def test_bad_frames(df):
    bad = [(dict(user_name='usr'), ValueError, r"`user_name`='usr' is not a column of the frame \(user, item, title, rating, timestamp\)"),
           (dict(valid_pct=1.), ValueError, '`valid_pct`=1.0 should be a share'), (dict(bs=0), ValueError, '`bs`=0'),
           (dict(dups='none'), ValueError, "`dups`='none'"), (dict(unk='none'), ValueError, "`unk`='none'"),
           (dict(rating_name='title'), TypeError, "`rating_name`='title' should hold numbers"),
           (dict(item_name='user'), ValueError, 'should be three columns'), (dict(weight_name='w'), ValueError, "`weight_name`='w'"),
           (dict(splitter=lambda o: ([0,1,2],[2,3])), ValueError, '1 rows into both'),
           (dict(splitter='random'), TypeError, "`splitter`='random' should be a function of the frame")]
    for kw,err,msg in bad:
        with pytest.raises(err, match=msg): loaders(df, **kw)
    for d,msg in ((df[:0], 'the frame has 0 rows'), (df[df.user==1], "`user_name`='user' holds a single id, 1"), (df[df.item==1], "`item_name`"),
                  (df.assign(rating=df.rating.where(df.rating<5)), 'missing or infinite values'), (df.assign(rating=np.inf), 'missing or infinite'),
                  (df.assign(user=df.user.astype(float).where(df.user>3)), 'missing ids'),
                  (df.assign(item=df.item.astype('Int64').where(df.item>3)), 'missing ids')):
        with pytest.raises(ValueError, match=msg): loaders(d)

def test_no_ratings_and_weights(df):
    dls = loaders(df, rating_name=None)
    assert (dls.train_ds.y==1).all() and dls.train_ds.y_names==[]
    assert dls.show_batch is not None and 'target' in dls.train.show_batch(show=False)
    w = loaders(df.assign(w=np.arange(900.)), weight_name='w', valid_pct=0)
    f = w.train_ds.frame((w.train_ds.x, w.train_ds.y))
    for x,y in w.train: assert len(w.train.wb)==len(x)
    with pytest.raises(ValueError, match='negative weights'): loaders(df.assign(w=-1.), weight_name='w')

def test_rows_however_given(df):
    dls = loaders(df, item_name='title')
    r = df.iloc[3]
    ref = dls.test_dl(df.iloc[[3]]).dataset.x
    for o in ((r.user,r.title), dict(user=r.user,title=r.title), r, [r], [(r.user,r.title)], [dict(user=r.user,title=r.title)],
              dict(user=[r.user],title=[r.title]), df.iloc[[3]][['title','user']]):
        assert torch.equal(dls.test_dl(o).dataset.x, ref)
    with pytest.raises(ValueError, match='expected pairs'): dls.test_dl([(1,2,3)])

def test_usual_names_are_found(df):
    d = df.rename(columns=dict(user='userId', item='movieId', timestamp='date'))
    dls = loaders(d)
    assert dls.cat_names==['userId','movieId']
    assert len(TimeSplitter(0.1)(d)[1])==90
    with pytest.raises(ValueError, match="`user_name`='usr'"): loaders(d, user_name='usr')

def test_splitters(df):
    tr,va = TimeSplitter(0.25)(df)
    assert len(va)==225 and df.timestamp.iloc[tr].max()<=df.timestamp.iloc[va].min() and sorted([*tr,*va])==list(range(900))
    tied = pd.DataFrame(dict(user=1, item=range(10), timestamp=0))
    assert TimeSplitter(0.3)(tied)[1].tolist()==[7,8,9]
    tr,va = LastNSplitter(1)(df)
    assert df.user.iloc[va].value_counts().eq(1).all()
    n = df.user.value_counts()
    tr,va = LastNSplitter(int(n.min()))(df)
    assert (n[n==n.min()].index.isin(df.user.iloc[tr])).all() and not n[n==n.min()].index.isin(df.user.iloc[va]).any()
    tr,va = ColdUserSplitter(0.3, seed=1)(df)
    assert not set(df.user.iloc[tr]) & set(df.user.iloc[va]) and df.user.iloc[va].nunique()==18
    for f in (TimeSplitter(0.25),LastNSplitter(2),ColdUserSplitter(0.3, seed=1)):
        for a,b in zip(f(df), pickle.loads(pickle.dumps(f))(df)): assert np.array_equal(a, b)
    with pytest.raises(ValueError, match='have no time'): TimeSplitter()(df.assign(timestamp=df.timestamp.where(df.user>3)))

def test_row_0_is_what_is_not_in_training(df):
    col = pd.Series([5,1,9,5,2])
    codes,m = _encode_train(col, 'user_name', np.array([1,1,0,1,0], bool))
    assert codes.tolist()==[2,1,0,2,0] and list(m)==['#na#',1,5]

def test_files(df, tmp_path):
    df.to_csv(tmp_path/'r.csv', index=False)
    df.to_csv(tmp_path/'r.tsv.gz', index=False, sep='\t')
    df.to_csv(tmp_path/'semi.txt', index=False, sep=';')
    df.to_parquet(tmp_path/'r.parquet')
    for f in ('r.csv','r.tsv.gz','semi.txt','r.parquet'): assert rows_of(loaders(read_ratings(tmp_path/f)).train_ds)==rows_of(loaders(df).train_ds)
    with pytest.raises(ValueError, match='is no file that is read here'): (tmp_path/'r.docx').write_text('x'); read_ratings(tmp_path/'r.docx')
    with pytest.raises(ValueError, match='is no known layout'): (tmp_path/'d').mkdir(); read_ratings(tmp_path/'d')

def test_ml_100k(data_dir):
    d = data_dir('ml-100k')
    df = read_ratings(d)
    assert len(df)==100_000 and df.user.nunique()==943 and df.item.nunique()==1682 and df.title.nunique()==1664
    assert abs(df.rating.mean()-3.52986)<1e-9
    tests = [read_ratings(d, f'u{i}').query('is_valid') for i in range(1,6)]
    pd.testing.assert_frame_equal(pd.concat(tests)[list(df)].sort_values(['user','item'], ignore_index=True), df.sort_values(['user','item'], ignore_index=True))
    assert df.genres.str.contains('Sci-Fi').sum()>1000
    dls = CFDataLoaders.from_path(d, split='u1', device='cpu')
    assert (len(dls.train_ds),len(dls.valid_ds))==(80_000,20_000)
    with pytest.raises(ValueError, match='has the splits u1, u2'): read_ratings(d, 'u9')
    with pytest.warns(UserWarning, match='17,048 have a user'): CFDataLoaders.from_df(df, splitter=TimeSplitter(0.2), device='cpu')

def test_ml_latest_small(data_dir):
    df = read_ratings(data_dir('ml-latest-small-2016'))
    assert len(df)==100_004 and df.user.nunique()==671 and df.item.nunique()==9066 and df.title.notna().all()

def test_lightgcn_layout(tmp_path):
    (tmp_path/'train.txt').write_text('0 5 7 9 7\n1 7\n2\n\n3 5 9 \n4 9\n')
    (tmp_path/'test.txt').write_text('0 8\n1\n3 7 8 5\n9 5\n')
    df = read_ratings(tmp_path, split='test')
    assert df.groupby(['is_valid','user']).item.agg(list).to_dict()=={(False,0):[5,7,9,7], (False,1):[7], (False,3):[5,9], (False,4):[9],
                                                                     (True,0):[8], (True,3):[7,8,5], (True,9):[5]}
    assert list(read_ratings(tmp_path))==['user','item'] and len(read_ratings(tmp_path))==len(df) and df.user.dtype==df.item.dtype==np.int64
    with pytest.warns(UserWarning, match='of 5 validation rows, 1 have a user and 2 an item without a training row'):
        dls = CFDataLoaders.from_path(tmp_path, split='test', rating_name=None, device='cpu')
    assert (len(dls.train_ds),len(dls.valid_ds))==(8,5) and dls.classes['item'].ids.tolist()==[5,7,9]
    with pytest.raises(ValueError, match="has one split, 'test'"): read_ratings(tmp_path, split='u1')
    (tmp_path/'test.txt').write_text('0 8\n1 2.5\n')
    with pytest.raises(ValueError, match="test.txt, line 2: expected whole numbers.*'1 2.5'"): read_ratings(tmp_path)
    (tmp_path/'test.txt').write_text('0\n1\n')
    with pytest.raises(ValueError, match='holds no interaction'): read_ratings(tmp_path)
    (tmp_path/'test.txt').unlink()
    with pytest.raises(ValueError, match='has a train.txt and no test.txt'): read_ratings(tmp_path)

def test_large_ids_are_not_taken_for_their_neighbours(df):
    "Floats hold 53 bits: beyond them another id would answer"
    m = IdMap(np.arange(2**60, 2**60+10))
    assert m.encode([2**60+7]).tolist()==[8] and m.encode([float(2**60+7)]).tolist()==[0]
    for dtype in ('UInt64','Int64','uint64','int64[pyarrow]'): assert m.encode(pd.array([2**60+7], dtype=dtype)).tolist()==[8], dtype
    assert m.encode(pd.array([2**60+7,None,5], dtype='UInt64')).tolist()==[8,0,0]
    assert IdMap([3,5]).encode([5.,4.5,np.nan]).tolist()==[2,0,0]
    dls = loaders(df.assign(user=df.user+2**60))
    with pytest.raises(UnknownIdError, match='these are float'): dls.test_dl(df.assign(user=df.user+2**60)[['user','item','rating']].iloc[5])

def test_names_and_weights_that_could_not_work(df):
    for n in ('rank','score','pred'):
        with pytest.raises(ValueError, match='would be overwritten'): loaders(df.rename(columns=dict(item=n)), item_name=n)
    with pytest.raises(ValueError, match='is 0 in every training row'): loaders(df.assign(w=0.), weight_name='w')

def test_ordered_categories_are_times_in_their_order():
    months = ['Jan','Feb','Mar','Apr']
    when = pd.Categorical(months*10, categories=months, ordered=True)
    assert set(when[TimeSplitter(0.25)(pd.DataFrame(dict(timestamp=when)))[1]])=={'Apr'}

def test_splitters_may_give_masks(df):
    "Masks of the frame's length, of any dtype, are the rows they mark; anything else that is no row number is refused"
    early = df.timestamp<df.timestamp.quantile(.7)
    want = rows_of(loaders(df, splitter=lambda o: (np.flatnonzero(early),np.flatnonzero(~early))).train_ds)
    for mask in (early, early.to_numpy(), early.tolist(), early.astype('boolean'), early.astype('bool[pyarrow]'), early.astype('boolean').array, torch.tensor(early.to_numpy())):
        flip = [not bool(o) for o in mask]
        dls = loaders(df, splitter=lambda o: (mask,flip))
        assert rows_of(dls.train_ds)==want and len(dls.valid_ds)==int((~early).sum())
    some = early.astype('boolean').where(df.index%9>0)
    dls = loaders(df, splitter=lambda o: (some,~some))
    assert len(dls.train_ds)+len(dls.valid_ds)==int((df.index%9>0).sum())
    with pytest.raises(ValueError, match='a mask of 900 rows for a frame of'): loaders(df[:200], splitter=lambda o: (early,~early))
    with pytest.raises(ValueError, match='rows 1 to 900 of a frame of 900'): loaders(df.set_index(df.index+1), splitter=lambda o: (o.index,[]))
    assert len(loaders(df, splitter=lambda o: (range(900),[])).valid_ds)==0
    for odd,err,msg in ((early,ValueError,'it gave 900'), (None,ValueError,'it gave 1'), (df,ValueError,'it gave 1'), (([1,2],),ValueError,'it gave 1'), (([0],[1],[2]),ValueError,'it gave 3'),
                        (([1.5],[2]),TypeError,'expected row numbers or a mask'), ((['a'],[2]),TypeError,'expected row numbers'), ((early,None),TypeError,"gives 'None' for a part"), (([[0,1]],[2]),TypeError,'expected row numbers')):
        with pytest.raises(err, match=msg): loaders(df, splitter=lambda o: odd)
    for same in (([0.,1,2],[3.]), iter([[0,1,2],[3]]), np.array([[0,1],[2,3]]), (pd.Series([0,1,2], dtype='Int64'),pd.Index([3])), (torch.arange(3),torch.tensor([3]))):
        assert 2<=len(loaders(df, splitter=lambda o: same).train_ds)<=3

def test_names_that_occur_twice(df):
    "A column of the frame's index does not disturb; two columns of one name are refused wherever they would be read"
    again = pd.concat([df, df[:5].assign(rating=1.)])
    want = rows_of(loaders(again, valid_pct=0, dups='mean').train_ds)
    for c in ('user','title','rating'): assert rows_of(loaders(again.set_index(c, drop=False), valid_pct=0, dups='mean').train_ds)==want
    for kind in (str,'category'): assert rows_of(loaders(again.assign(rating=again.rating.astype(kind)), valid_pct=0, dups='mean').train_ds)==want
    for dups in ('keep','mean'):
        with pytest.raises(TypeError, match='should hold numbers'): loaders(again.assign(rating='good'), dups=dups)
    twice = lambda c: pd.concat([df, df[[c]]], axis=1)
    for c,role in (('user','user'),('item','item'),('rating','rating')):
        with pytest.raises(ValueError, match=f"`{role}_name`='{c}' names 2 columns"): loaders(twice(c))
    with pytest.raises(ValueError, match="`weight_name`='w' names 2"): loaders(pd.concat([df.assign(w=1.), df[['user']].set_axis(['w'], axis=1)], axis=1), weight_name='w')
    for c in ('user','item','timestamp'):
        with pytest.raises(ValueError, match='names 2 columns'): SeqDataLoaders.from_df(twice(c), device='cpu')
    with pytest.raises(ValueError, match='names 2 columns'): TimeSplitter()(twice('timestamp'))
    for f in (LastNSplitter(),ColdUserSplitter()):
        with pytest.raises(ValueError, match='names 2 columns'): f(twice('user'))
    with pytest.raises(ValueError, match='names 2 columns'): fold_rows(twice('rating'), 3, 'stratified')
    learn = cf_learner(loaders(df), n_factors=4)
    with pytest.raises(ValueError, match='names 2 columns'): learn.predict(twice('item')[:3])
    with pytest.raises(ValueError, match='names 2 columns'): learn.fold_in(twice('rating')[:3].assign(user=999))
    assert len(loaders(twice('title')).train_ds)==len(loaders(df).train_ds)

def test_values_that_are_no_number_or_choice_at_all(df):
    "A frame or a list in the place of a number or a word is told in a line"
    from cfext.core import check_choice,check_pos
    for val in (df,df.user,df.user.to_numpy(),list(df.user),torch.arange(900),dict.fromkeys(df.title)):
        for f in (lambda: check_pos(val, 'k'), lambda: check_choice(val, 'how', ('a','b')), lambda: check_choice(val, 'how', dict(a=1))):
            with pytest.raises(ValueError, match=f'`(k|how)`=<an? {type(val).__name__}>') as e: f()
            assert len(str(e.value))<120

def test_rows_to_predict_that_are_no_pairs(df):
    learn = cf_learner(loaders(df), n_factors=4)
    for odd in ((1,2,3),[1],['ab'],[(1,2,3)],[(1,2),3]):
        with pytest.raises(ValueError, match=r'expected pairs \(user, item\)'): learn.predict(odd)
    assert len(learn.predict([(df.user[0],df.item[0])]*2)[2])==2

def test_text_is_no_order_of_time(df):
    "Numbers and ISO dates are read from text, other text is refused, whatever holds it; so for every splitter, and for folds"
    days = pd.Series(pd.date_range('2019-12-25', periods=900, freq='8h'))
    held = lambda t: [fold_rows(df.assign(timestamp=t), 3, 'past')[-1][1].tolist(), *(f(df.assign(timestamp=t))[1].tolist() for f in (TimeSplitter(.3),LastNSplitter(2)))]
    want,number = held(days.to_numpy()),(days.astype('int64')//10**9).to_numpy()
    for kind in (object,'string','category'):
        for text in (days.dt.strftime('%Y-%m-%d %H:%M'), days.dt.strftime('%Y-%m-%dT%H:%M:%S+0100'), pd.Series(number).astype(str), pd.Series(range(900)).astype(str)): assert held(text.astype(kind))==want
        for f in ('%d/%m/%Y %H:%M','%m/%d/%Y','%b %d %Y %H','%d%m%Y'):
            odd = df.assign(timestamp=days.dt.strftime(f).astype(kind))
            for split in (TimeSplitter(.3),LastNSplitter(2),lambda o: fold_rows(o, 3, 'time'),lambda o: fold_rows(o, 3, 'past')):
                with pytest.raises(ValueError, match=r"which is read as neither numbers nor dates like 2020-01-31: convert it with `pd.to_datetime\(df\['timestamp'\], format=...\)`"): split(odd)
    for t in (days, days.dt.tz_localize('UTC'), days.dt.date, days.astype(object), pd.Series(number, dtype='Int64'), days.dt.to_period('h'), days.astype('timestamp[ns][pyarrow]'),
              pd.Series(pd.Categorical(days.dt.strftime('%d/%m/%Y %H'), days.dt.strftime('%d/%m/%Y %H'), ordered=True))): assert held(t)[1]==want[1]
    for gap in (None,'',np.nan):
        with pytest.raises(ValueError, match='3 rows have no time'): TimeSplitter()(df.assign(timestamp=days.dt.strftime('%Y-%m-%d').astype(object).where(df.index>2, gap)))
    for t in (df.timestamp, days, days.dt.strftime('%Y-%m-%d')):
        for ordered in (False,True):
            with pytest.raises(ValueError, match='3 rows have no time'): TimeSplitter()(df.assign(timestamp=pd.Categorical([None]*3+t[3:].tolist(), ordered=ordered)))

def test_times_padded_with_zeros_and_in_utc(df, tmp_path):
    "Digits sort as numbers, whatever they begin with, unless they may be days; a mix of dates and datetimes sorts too"
    when = pd.Series(np.random.default_rng(0).permutation(900)*40_000)
    days = pd.to_datetime(when+1_577_000_000, unit='s')
    held = lambda t: [f(df.assign(timestamp=t))[1].tolist() for f in (TimeSplitter(.3),LastNSplitter(2))]
    want = held(when)
    for t in (when.map('{:08d}'.format), when.map('{:012d}'.format), (when//40_000).map('{:02d}'.format), (when//40_000).map('{:06d}'.format),
              days.dt.strftime('%Y-%m-%d %H:%M:%S UTC'), days.dt.strftime('%Y-%m-%d %H:%M:%S.%f UTC').str.replace('.000000', ''), days.astype(object).where(when%80_000>0, days.map(pd.Timestamp.isoformat))):
        for kind in (object,'string','category'): assert held(t.astype(kind))==want
    assert held(days.dt.strftime('%Y%m%d'))==held(days.dt.date)==held(days.dt.normalize())
    assert held(pd.Series([o if j%2 else o.date() for j,o in enumerate(days.dt.to_pydatetime())], dtype=object))==held(days.where(days.index%2==1, days.dt.normalize()))
    with pytest.raises(ValueError, match='3 rows have no time'): held(days.dt.date.where(df.index>2))
    for f in ('%d%m%Y','%m%d%Y','%d%m%y','%d.%m','%H:%M','%G-W%V','%Y-%m-%dT%H:%M:%S,123'):
        with pytest.raises(ValueError, match='is read as neither numbers nor dates like 2020-01-31'): held(days.dt.strftime(f))
    for pad in ('{:06d}','{:02d}'):
        df.assign(timestamp=(when//40_000).map(pad.format)).to_csv(tmp_path/'pad.csv', index=False)
        assert TimeSplitter(.3)(read_ratings(tmp_path/'pad.csv'))[1].tolist()==want[0]

def test_a_column_of_a_file_has_one_type(df, tmp_path):
    "However late a letter comes; an id with leading zeros is text, another id than the number, wherever it is read"
    late = pd.DataFrame(dict(user=[*map(str, range(300_000)),'x5'], item=range(300_001), rating=3))
    late.to_csv(tmp_path/'late.csv', index=False)
    assert set(map(type, read_ratings(tmp_path/'late.csv').user))=={str}
    pad = df.assign(user=df.user.map('{:03}'.format), item=df['item'].where(df['item']>5).astype('Int64'), day=pd.Series(pd.date_range('2020-01-01', periods=900)).dt.strftime('%d/%m/%Y'), stars=df.rating/10)
    pad.to_csv(tmp_path/'pad.csv', index=False)
    pad.to_csv(tmp_path/'pad.tsv.gz', index=False, sep='\t', quoting=1)
    for f in ('pad.csv','pad.tsv.gz'):
        got = read_ratings(tmp_path/f)
        assert got.user.tolist()==pad.user.tolist() and [got[c].dtype.kind for c in ('item','rating','timestamp','stars')]==['f','f','i','f']
        dls = CFDataLoaders.from_csv(tmp_path/f, item_name='title', device='cpu')
        assert set(dls.classes['user'].ids)<=set(pad.user) and dls.n_users-1==pad.user.nunique()
    assert read_ratings(tmp_path/'pad.csv', dtype=dict(user='int32')).user.dtype=='int32' and read_ratings(tmp_path/'pad.csv', dtype=dict(item=str)).user[0]==pad.user[0]
    assert set(read_ratings(tmp_path/'pad.csv', dtype=str).dtypes)=={pd.Series(['a'], dtype=str).dtype}
    assert CFDataLoaders.from_path(tmp_path/'pad.csv', item_name='title', dtype=dict(user=float), device='cpu').classes['user'].ids.dtype=='float64'
    for text,want in (('a,a,b\n01,1,2\n1,02,3\n',{'a':['01','1'],'a.1':['1','02'],'b':[2,3]}), ('a,b\n01,1,02\n1,2,3\n',{'a':[1,2],'b':['02','3']}), ('a,b\n0,0.5\n10,\n',{'a':[0,10]}), ('a,b\n01,\n2,\n',{'a':['01','2']}),
                      ('a,b\n1,06.0\n2,07.5\n',{'a':[1,2],'b':[6,7.5]}), ('a,b\n1,06\n2,7.5\n',{'b':[6,7.5]}), ('a,b,c\nx,-1,02139\ny,007,K1A\nz,3,0\n',{'b':['-1','007','3'],'c':['02139','K1A','0']}),
                      ('a,b\n1,02/01/2020\n2,08:15\n',{'a':[1,2]}), ('a;b\n1;3\n'*1+'2;3\n'*70_000+'5;'+'0'*30+'5',{'a':[1]+[2]*70_000+[5],'b':['3']*70_001+['0'*30+'5']}), ('a,b\r\n1,"02"\r\n2,"3"\r\n',{'b':['02','3']})):
        (tmp_path/'odd.csv').write_text(text)
        got = read_ratings(tmp_path/'odd.csv')
        assert {c: got[c].tolist() for c in want}==want

def test_the_separator_is_not_looked_for_in_names(tmp_path):
    "Quotes hide separators; a header of usual names is cut where they end, another where the first row is cut too"
    for sep in ',;|\t':
        for head in ('user{0}item{0}rating{0}"tags (a|b;c,d\te|f;g,h)"','"user"{0}"item"{0}"rating"{0}"a ,;|\t"','\ufeffuserId{0}movieId{0}Book-Rating{0}'+'ab'.join(',;|\t'.replace(sep, ''))*4,'cust{0}art{0}val{0}'+'a'.join(',;|\t'.replace(sep, ''))*5,'cust{0}art{0}val{0}x'):
            for nl in ('\n','\r\n','\r'):
                (tmp_path/'s.csv').write_bytes((head+''.join(f'{nl}{i%7}{{0}}{i%5}{{0}}{i%4}{{0}}"x, y"' for i in range(40))).format(sep).encode())
                df = read_ratings(tmp_path/'s.csv')
                assert df.shape==(40,4) and df.iloc[:,2].tolist()==[i%4 for i in range(40)]
        assert CFDataLoaders.from_csv(tmp_path/'s.csv', user_name='cust', item_name='art', rating_name='val', device='cpu').n_users==8
    (tmp_path/'s.csv').write_text('user;item;rating\n1;2;3,5\n2;2;4,5\n')
    assert read_ratings(tmp_path/'s.csv').shape==(2,3)
    (tmp_path/'s.csv').write_text('cust;art;val')
    assert list(read_ratings(tmp_path/'s.csv'))==['cust','art','val']

def test_files_that_need_a_word(df, tmp_path):
    "Other encodings, `;`, packed files; what cannot be read says which file, and the mend"
    cafe = df.assign(title='Café '+df.title)
    for f,enc,sep in (('l.csv','latin-1',';'),('u.txt','utf-16','\t'),('b.csv','utf-8-sig','|'),('w.csv.gz','cp1252',';')):
        cafe.to_csv(tmp_path/f, index=False, sep=sep, encoding=enc)
        kw = {} if enc=='utf-8-sig' else dict(encoding=enc)
        for make in (CFDataLoaders.from_csv,CFDataLoaders.from_path): assert rows_of(make(tmp_path/f, item_name='title', seed=3, device='cpu', **kw).train_ds)==rows_of(loaders(cafe, item_name='title').train_ds)
        if kw:
            for read in (read_ratings,CFDataLoaders.from_csv,CFDataLoaders.from_path):
                with pytest.raises(ValueError, match=f"{f} is not written in utf-8: name its encoding, such as 'latin-1'"): read(tmp_path/f)
    df.to_csv(tmp_path/'z.zip', index=False, sep=';')
    for f in (tmp_path/'z.zip',(tmp_path/'z.zip').as_uri()): assert rows_of(CFDataLoaders.from_csv(f, seed=3, device='cpu').train_ds)==rows_of(loaders(df).train_ds)
    df.to_csv(tmp_path/'r.csv.gz', index=False)
    packed = (tmp_path/'r.csv.gz').read_bytes()
    for f,raw,msg in (('e.csv',b'','e.csv is empty: expected a line of column names'), ('h.csv.gz',packed[:len(packed)//2],'h.csv.gz is no whole gzip file'), ('n.csv.gz',b'user,item','n.csv.gz is no whole gzip file'),
                      ('p.csv',b'user,item\n1,2\n1,2,3,4\n','p.csv is no table'), ('s.csv.gz',packed[:40]+b'xx'+packed[42:],'s.csv.gz is no whole gzip file')):
        (tmp_path/f).write_bytes(raw)
        for read in (read_ratings,CFDataLoaders.from_csv):
            with pytest.raises(ValueError, match=msg): read(tmp_path/f)
    with pytest.raises(ValueError, match="`encoding`='klingon' is not known"): read_ratings(tmp_path/'l.csv', encoding='klingon')
    for kw in (dict(encoding='latin-1'),dict(dtype=str)):
        with pytest.raises(ValueError, match='go with a single text file'): read_ratings(tmp_path, **kw)

def test_ratings_that_are_no_numbers(df):
    "Times and complex numbers are refused however they are stored; numbers of any width are read, without a warning"
    when,span = pd.to_datetime(df.timestamp, unit='s'),pd.to_timedelta(df.timestamp, unit='s')
    for odd in (when, when.dt.tz_localize('CET'), when.astype('timestamp[ns][pyarrow]'), when.astype('category'), when.dt.date, when.dt.to_period('D'), when.astype(object), span, span.astype('duration[ns][pyarrow]'), df.rating+1j, (df.rating+1j).astype(object)):
        for kw in (dict(),dict(rating_name='title',weight_name='w')):
            d = df.assign(rating=odd) if not kw else df.assign(title=df.rating, w=odd)
            with pytest.raises(TypeError, match="should hold numbers; it holds"): loaders(d, **kw)
    want = rows_of(loaders(df).train_ds)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for dtype in ('float32','float16','int8','Int64','Float32',decimal,'float[pyarrow]',str,object,'category'): assert rows_of(loaders(df.assign(rating=df.rating.astype(dtype))).train_ds)==want
    copy = (d := df.assign(rating=df.rating.astype('float32'))).copy(deep=True)
    dls = loaders(d)
    dls.train_ds.y.add_(1)
    dls.test_dl(d, with_labels=True).dataset.y.add_(1)
    pd.testing.assert_frame_equal(d, copy)
    for odd,n in ((1e300,1),(-1e39,1),(10**60,1)):
        with pytest.raises(ValueError, match=r"holds 1 numbers too large for float32, which ends at 3.4e38 \(first at row 3\)"): loaders(df.assign(rating=df.rating.astype(object).where(df.index!=3, odd)))

def test_ids_are_single_values(df):
    "What has parts or too few digits is refused at the door; Decimals are ids as they are"
    for role in ('user','item'):
        for f,kind in ((lambda o: (o,'a'),'tuple'),(lambda o: [o],'list'),(lambda o: frozenset([o]),'set')):
            with pytest.raises(TypeError, match=f"`{role}_name`='{role}' holds ids like .* expected single values"): loaders(df.assign(**{role: df[role].map(f)}))
        with pytest.raises(TypeError, match='holds float16'): loaders(df.assign(**{role: df[role].astype('float16')}))
    for dtype in (decimal,'float32'): assert loaders(df.assign(user=df.user.astype(dtype))).classes['user'].ids.tolist()==loaders(df).classes['user'].ids.tolist()

def test_many_ratings_of_0_are_pointed_at(df, tmp_path):
    "As in Book-Crossing; not for labels 0 and 1, shares, ratings on both sides of 0, or choices"
    books = df.assign(rating=df.rating.where(df.index%5<2, 0))
    with pytest.warns(UserWarning, match=r"`rating_name`='rating' is 0 in 60% of the rows; where 0 stands for 'not rated', leave them out, `df\[df\['rating'\]>0\]`") as ws: loaders(books)
    assert [w for w in ws if 'is 0 in' in str(w.message)][0].filename==__file__
    books.to_csv(tmp_path/'b.csv', index=False)
    for make in (CFDataLoaders.from_csv,CFDataLoaders.from_path):
        with pytest.warns(UserWarning, match='is 0 in|without a training row') as ws: make(tmp_path/'b.csv', splitter=lambda o: (np.flatnonzero(o.user>3),np.flatnonzero(o.user<=3)), device='cpu')
        assert len(ws)==2 and {w.filename for w in ws}=={__file__}
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*is 0 in')
        for d,kw in ((books[books.rating>0],{}),(books,dict(rating_name=None)),(books.assign(rating=(books.rating>0)*1.),{}),(books.assign(rating=books.rating/5),{}),(books.assign(rating=books.rating.where(books.index!=0, -1)),{}),(df.assign(rating=df.rating.where(df.index%5>0, 0)),{})): loaders(d, **kw)

def test_ratings_that_are_all_the_same_are_pointed_at():
    df = synth_ratings(30, 20, 200).assign(rating=1)
    with pytest.warns(UserWarning, match="`rating_name`='rating' is 1 in every row.*`rating_name=None`"): CFDataLoaders.from_df(df, valid_pct=0, device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        CFDataLoaders.from_df(df, valid_pct=0, rating_name=None, device='cpu')

def test_fastais_interpretation_finds_the_rows():
    from fastai.interpret import Interpretation
    df = synth_ratings(60, 40, 900, seed=3)
    dls = CFDataLoaders.from_df(df, splitter=ColdUserSplitter(.2, seed=0), device='cpu')
    learn = cf_learner(dls, n_factors=4, y_range=(.5,5.5), seed=0)
    with learn.no_bar():
        interp = Interpretation.from_learner(learn)
        loss,at,rows = interp.top_losses(5, items=True)
        want = df.iloc[ColdUserSplitter(.2, seed=0)(df)[1]][['user','item','rating']]
        assert (rows.to_numpy()==want.iloc[at.tolist()].to_numpy()).all() and '#na#' not in rows.user.tolist()
        learn.dls.unk = 'na'
        interp.plot_top_losses(2)
        interp.show_results([0,1])
