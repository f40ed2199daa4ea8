"Side features: against a loop, what is missing, ids that come later, on real cold films"
import numpy as np,pandas as pd,pytest,torch
from cfext import *

films = pd.DataFrame(dict(item=[3,1,2,5], tags=[['x','y'],['y'],[],None], genre=pd.Categorical(['a','b',None,'a']), year=[1990,2000,np.nan,1995], kind=[1,2,1,1]))

def test_encoding_against_a_loop():
    spec = fit_sides(films, 'item', cats=['kind'])
    ids = pd.Index([1,2,3,4,5])
    (codes,weights,nums),miss = encode_sides(spec, films, 'item', ids)
    names = [None,*(f'{c["name"]}={v}' for c in spec if 'levels' in c for v in c['levels'])]
    got = [{names[c]:round(w, 3) for c,w in zip(*o) if w} for o in zip(codes.tolist(), weights.tolist())]
    assert got==[{'tags=y':1., 'genre=b':1., 'kind=2':1.}, {'kind=1':1.}, {'tags=x':.5, 'tags=y':.5, 'genre=a':1., 'kind=1':1.}, {}, {'genre=a':1., 'kind=1':1.}]
    year = films.year.dropna()
    want = [(2000-year.mean())/year.std(ddof=0), 0, (1990-year.mean())/year.std(ddof=0), 0, 0]
    assert nums.shape==(5,1) and nums[:,0].tolist()==pytest.approx(want, abs=1e-6)
    assert miss=={'ids without a row':1, 'empty cells':4, 'unknown levels':0}
    assert (codes[weights==0]==0).all() and codes.dtype==torch.long
    _,miss = encode_sides(spec, films.assign(genre='z', kind=9), 'item', ids)
    assert miss['unknown levels']==8

@pytest.mark.parametrize('kind', ['text','numbers','lists','tuples','sets','arrays','separated','category','mixed'])
def test_encoding_of_any_cells_is_that_of_one_cell_at_a_time(kind):
    rng = np.random.default_rng(0)
    bags = [list(rng.choice(list('abcde'), rng.integers(0, 4))) for _ in range(60)]
    cells = dict(text=[b[0] if b else None for b in bags], numbers=[len(b) if b else np.nan for b in bags], lists=[b or None for b in bags], tuples=[tuple(b) for b in bags],
                 sets=[set(b) for b in bags], arrays=[np.array(b) for b in bags], separated=['|'.join(b) or None for b in bags],
                 category=pd.Categorical([b[0] if b else None for b in bags]))
    cells['mixed'] = [*cells["text"][:30],*range(30)]
    df = pd.DataFrame(dict(item=rng.permutation(60))).assign(f=pd.Series(cells[kind], dtype='category' if kind=='category' else None))
    kw = dict(cats=['f'] if kind=='numbers' else (), sep={'f':'|'} if kind=='separated' else None)
    few = fit_sides(df[:25], 'item', **kw) # fewer levels and slots than there are later
    ids = pd.Index(rng.permutation(70))
    (codes,weights,_),miss = encode_sides(few, df, 'item', ids)
    one = [encode_sides(few, df, 'item', ids[j:j+1]) for j in range(70)]
    assert torch.equal(codes, torch.cat([o[0][0] for o in one])) and torch.equal(weights, torch.cat([o[0][1] for o in one]))
    assert miss=={k: sum(o[1][k] for o in one) for k in miss} and miss['ids without a row']==10
    place,back = {v:j for j,v in enumerate(few[0]['levels'], 1)},df.set_index('item').f
    for i,c,w in zip(ids, codes.tolist(), weights.tolist()):
        o = back.get(i)
        bag = [] if o is None or np.ndim(o)==0 and not isinstance(o, set) and pd.isna(o) else o.split('|') if kind=='separated' else list(o) if kind in ('lists','tuples','sets','arrays') else [o]
        want = [place[v] for v in bag if v in place][:few[0]['slots']]
        assert [v for v in c if v]==want and [v for v in w if v]==[pytest.approx(1/max(len(want), 1))]*len(want)

def test_bad_input():
    with pytest.raises(ValueError, match="'year' holds 1 infinite"): fit_sides(films.assign(year=[1,2,3,np.inf]), 'item')
    with pytest.raises(ValueError, match='`cats`=.sort. is not a column'): fit_sides(films, 'item', cats=['sort'])
    for c,arg in (('year','feature'),('item','id_name')):
        with pytest.raises(ValueError, match=f"`{arg}`='{c}' names 2 columns"): fit_sides(pd.concat([films,films[[c]]], axis=1), 'item')
    spec = fit_sides(films, 'item')
    with pytest.raises(ValueError, match="1 ids have more than one row of features .first: 3."): encode_sides(spec, pd.concat([films,films[:1]]), 'item', pd.Index([3]))
    with pytest.raises(ValueError, match='is not a column'): encode_sides(spec, films.drop(columns='year'), 'item', pd.Index([3]))
    assert fit_sides(films.assign(year=5.), 'item')[2]['sd']==1 and fit_sides(films.assign(year=np.nan), 'item')[2]['mean']==0
    with pytest.raises(ValueError, match='`id_p`=1'): SideProduct(5, 5, id_p=1)
    with pytest.raises(ValueError, match='4 rows of features for 6 items'): SideProduct(5, 7, item_spec=spec).set_sides('item', encode_sides(spec, films, 'item', pd.Index(films.item))[0])

def made(**kw):
    df = synth_ratings(60, 40, 1000)
    its = df[['title','genre']].drop_duplicates().reset_index(drop=True)
    cold = its.title[::5]
    dls = CFDataLoaders.from_df(df[~df.title.isin(cold)], item_name='title', rating_name=None, seed=3, device='cpu', bs=32)
    learn = cf_learner(dls, SideProduct, n_factors=4, config=dict(items=its, **kw), loss_func=BPRLoss(), cbs=Negatives(3, seed=0), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.02)
    return learn,its,cold

def test_missing_rows_are_counted_and_zeros():
    learn,its,cold = made()
    some = its[~its.title.isin(learn.dls.classes['title'].ids[:4])].assign(genre=lambda d: d.genre.where(d.index>8))
    with pytest.warns(UserWarning, match='features of 32 items, zeros for 4 ids without a row, . empty cells'):
        m = SideProduct.from_dls(learn.dls, items=some, n_factors=4)
    assert (m.item_weights[:5]==0).all() and m.item_weights[5:].sum()>0

@pytest.mark.parametrize('layers', [(), (6,5)])
def test_ids_that_come_later(layers, tmp_path):
    learn,its,cold = made(layers=layers)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    later = learn.add_ids(its)
    assert len(later.dls.classes['title'])==len(its)+1 and len(learn.dls.classes['title'])==len(its)+1-len(cold)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    old = learn.dls.classes['title'].ids
    a,b = (l.recommend([7,3], k=9, candidates=old) for l in (learn,later))
    pd.testing.assert_frame_equal(a, b)
    same = its.set_index('title').genre
    tables = later.model.eval().item_factors
    code = dict(zip(later.dls.classes['title'].ids, range(1, 99)))
    for g,ts in cold.groupby(same[cold].values): assert torch.allclose(tables[code[ts.iloc[0]]], tables[[code[t] for t in ts]])
    later.save_bundle(tmp_path)
    again = load_bundle(tmp_path, device='cpu')
    pd.testing.assert_frame_equal(again.recommend(k=40), later.recommend(k=40))
    with later.no_bar(),later.no_logging(): later.fit(1, 0.01)
    assert again.add_ids(pd.DataFrame(dict(title=['A New One'], genre=['Drama']))).recommend([7], k=1, candidates=['A New One']).title.item()=='A New One'

def test_users_that_come_later():
    df = synth_ratings(60, 40, 1000)
    who = pd.DataFrame(dict(user=range(1, 61), age=np.arange(60.)))
    dls = CFDataLoaders.from_df(df[df.user<50], item_name='title', seed=3, device='cpu', bs=32)
    learn = cf_learner(dls, SideProduct, n_factors=4, y_range=(0.5,5.5), config=dict(users=who), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.02)
    later = learn.add_ids(who, 'user')
    assert later.predict(df[df.user>=50])[2].isfinite().all() and set(later.recommend([55,60], k=2).user)=={55,60}
    with pytest.raises(KeyError): learn.recommend([55])

def test_ml100k_films_that_nobody_rated(data_dir, quiet):
    "A fifth of the films has no training row: lists of these alone, by genre and year, against lots and against the newest first"
    df = read_ratings(data_dir('ml-100k'))[['user','item','title','genres']]
    its = df.drop_duplicates('item').assign(year=lambda d: d.title.str.extract(r'\((\d{4})\)')[0].astype(float))[['item','genres','year']]
    cold = pd.Series(np.random.default_rng(0).choice(its.item, len(its)//5, replace=False))
    dls = CFDataLoaders.from_df(df[~df.item.isin(cold)], rating_name=None, valid_pct=0, device='cpu', bs=1024, seed=0)
    learn = cf_learner(dls, SideProduct, n_factors=16, config=dict(items=its, sep={'genres':'|'}, id_p=0.5), loss_func=BPRLoss(), cbs=Negatives(4, seed=0), seed=0, unk_p=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(4, 0.01, wd=0.1)
    later = learn.add_ids(its)
    late = df[df.item.isin(cold)]
    c,us = later.dls.classes,late.user.unique()
    row,item = torch.from_numpy(pd.Index(us).get_indexer(late.user)).long(),torch.from_numpy(c['item'].encode(late.item)).long()
    cands = torch.from_numpy(c['item'].encode(cold)).long()
    recs,_ = top_items(later, torch.from_numpy(c['user'].encode(us)).long(), 10, candidates=cands)
    lots = cands[torch.rand(len(us), len(cands), generator=torch.Generator().manual_seed(0)).argsort(1)[:,:10]]
    newest = cands[torch.from_numpy(np.argsort(-its.set_index('item').year[cold].fillna(0).to_numpy(), kind='stable').copy())][:10].expand(len(us), -1)
    ndcg = [ndcg_at_k(*hit_matrix(r, torch.stack([row,item], 1))).nanmean().item() for r in (recs,lots,newest)]
    assert ndcg[0]>1.5*max(ndcg[1:]), ndcg

def test_what_a_bundle_cannot_hold_is_refused_at_once_and_negatives_stay():
    df = synth_ratings(60, 40, 1200)
    sides = df.drop_duplicates('title')[['title','genre']]
    for vals in (pd.to_datetime(['2001-01-01']*len(sides)), [('a','b',pd.Timestamp(0))]*len(sides)):
        with pytest.raises(TypeError, match="feature 'out' holds Timestamp such as .*: give text, or a number such as a date's year"): fit_sides(sides.assign(out=vals), 'title')
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None, seed=1, device='cpu')
    learn = cf_learner(dls, SideProduct, n_factors=3, loss_func=BPRLoss(), config=dict(items=sides), cbs=Negatives(5, 'popularity'), seed=1)
    later = learn.add_ids(sides[:1].assign(title='new'))
    assert (later.negatives.n_neg,later.negatives.how)==(5,'popularity')
    with pytest.raises(ValueError, match='holds 1 missing ids'): learn.add_ids(sides[:1].assign(title=None))

def test_whole_numbers_beside_missing_cells_stay_whole():
    f = pd.Categorical([1,2,None])
    for kw in (dict(sep={'f':'|'}), {}):
        spec = fit_sides(pd.DataFrame(dict(id=[1,2,3], f=pd.Categorical([1,2,1]))), 'id', **kw)
        (codes,_,_),miss = encode_sides(spec, pd.DataFrame(dict(id=[4,5,6], f=f)), 'id', pd.Index([4,5,6]))
        assert codes[:,0].tolist()==[1,2,0] and miss['unknown levels']==0
        assert fit_sides(pd.DataFrame(dict(id=[4,5,6], f=f)), 'id', **kw)[0]['levels']==(['1','2'] if kw else [1,2])
