"The report, its protocols and counts, comparisons and metrics while training, against naive loops and a published figure"
import gzip,math,warnings
from types import SimpleNamespace

import numpy as np,pandas as pd,pytest,torch
from fastai.data.all import ColSplitter
from cfext import *
from cfext.metrics import list_measures

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def learn():
    dls = CFDataLoaders.from_df(synth_ratings(60, 90, 1200), item_name='title', seed=3, device='cpu', bs=32)
    torch.manual_seed(0) # of the ids that are dropped in training
    l = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), seed=0)
    with l.no_bar(),l.no_logging(): l.fit_one_cycle(2, 0.03)
    return l

def naive(learn, k, seen=True, cands=None, x=None, dls=None):
    "Recall, NDCG and AUC over users, from their definitions, all items ranked but seen ones"
    dls = learn.dls
    tr,va = (ds.x.tolist() for ds in (dls.train_ds, dls.valid_ds))
    va = va if x is None else x
    res = []
    for u in sorted({a for a,_ in va if a}):
        had = {i for a,i in tr if a==u} if seen else set()
        s = learn.model.score_items(torch.tensor([u]))[0].tolist()
        items = [i for i in range(1, dls.n_items) if i not in had and (cands is None or i in cands)]
        top = sorted(items, key=lambda i: (-s[i], i))[:k]
        rel = {i for a,i in va if a==u and i and i not in had}
        n_rel = len(rel)+sum(a==u and i==0 for a,i in va)
        if not n_rel: continue
        hit = [i in rel for i in top]
        ideal = sum(1/math.log2(j+2) for j in range(min(n_rel, k)))
        res.append((sum(hit)/n_rel, sum(h/math.log2(j+2) for j,h in enumerate(hit))/ideal))
    return np.mean(res, 0)

def test_the_whole_catalogue_against_a_loop(learn):
    for seen in (True,False):
        rep = learn.evaluate(k=7, exclude_seen=seen)
        np.testing.assert_allclose(rep.iloc[0][['recall@7','NDCG@7']].to_numpy(float), naive(learn, 7, seen), rtol=1e-5)
    assert 'all 90 items ranked but those seen before' in learn.evaluate(k=7).note.replace(str(learn.dls.n_items-1), '90')

def test_some_items_only(learn):
    codes = [3,9,4,40,41,55,60]
    titles = learn.dls.classes['title'].decode(codes)
    rep = learn.evaluate(k=3, candidates=titles)
    np.testing.assert_allclose(rep.iloc[0][['recall@3 (of 7)','NDCG@3 (of 7)']].to_numpy(float), naive(learn, 3, cands=set(codes)), rtol=1e-5)
    with pytest.raises(UnknownIdError): learn.evaluate(candidates=['Nowhere'])

def test_sampled_and_given_candidates_agree(learn):
    dls = learn.dls
    held = HeldOut(dls, dls.valid_ds.x)
    rows,codes = draw_candidates(dls, held, 8, seed=4)
    rel = set(map(tuple, held.targets.tolist()))
    drawn = [(r,c) for r,c in zip(rows.tolist(), codes.tolist()) if (r,c) not in rel]
    assert len(drawn)==8*len(held.users) and len(set(drawn))==len(drawn)
    had = set(map(tuple, dls.train_ds.x.tolist()))
    assert not any((held.users[r].item(),c) in had or c==0 for r,c in drawn)
    given = {}
    for r,c in drawn: given.setdefault(dls.classes['user'].decode(held.users[r:r+1])[0], []).append(dls.classes['title'].decode([c])[0])
    a,b = learn.evaluate(k=4, n_sampled=8, seed=4),learn.evaluate(k=4, candidates=given)
    assert a.columns[-1]=='NDCG@4 (8 sampled)' and b.columns[-1]=='NDCG@4 (candidates)'
    np.testing.assert_allclose(a.iloc[:,-2:].dropna(), b.iloc[:,-2:].dropna(), rtol=1e-6)
    assert a.iloc[0,-1]>1.3*learn.evaluate(k=4)['NDCG@4'].iloc[0]
    with pytest.raises(ValueError, match='two ways'): learn.evaluate(n_sampled=5, candidates=given)
    with pytest.raises(ValueError, match='`n_sampled`=0'): learn.evaluate(n_sampled=0)
    with pytest.raises(ValueError, match='fewer items left'): learn.evaluate(n_sampled=1000)

def test_every_measure_and_intervals(learn):
    ms = (*list_measures,'AUC','coverage','gini','novelty','popularity lift','diversity')
    rep = learn.evaluate(k=5, measures=ms, interval=0.9, baselines=dict(again=learn.model))
    for m in ms: assert np.isfinite(rep[f'{m}@5'].iloc[0])
    assert rep['NDCG@5 low'].iloc[0]<rep['NDCG@5'].iloc[0]<rep['NDCG@5 high'].iloc[0]
    lists = [c for c in rep.columns if '@' in c]
    pd.testing.assert_series_equal(rep.loc['again',lists], rep.iloc[0][lists], check_names=False)
    assert rep['coverage@5']['popularity']<rep['coverage@5'].iloc[0] and rep['popularity lift@5']['popularity']>0
    with pytest.raises(ValueError, match="`measures`='recal'"): learn.evaluate(measures=('recal',))
    with pytest.raises(ValueError, match='whole catalogue'): learn.evaluate(measures=('AUC',), n_sampled=9)

def test_auc_is_the_share_of_pairs_in_order(learn):
    dls,k = learn.dls,learn.dls.n_items-1
    held = HeldOut(dls, dls.valid_ds.x)
    got = judge(learn, held, k, ('AUC',))[0]['AUC']
    for r in (0,5,17):
        u = held.users[r].item()
        s = learn.model.score_items(held.users[r:r+1])[0].detach()
        had = {i for a,i in dls.train_ds.x.tolist() if a==u}
        rel = {i for a,i in held.targets.tolist() if a==r and i<dls.n_items}
        rest = [i for i in range(1, dls.n_items) if i not in had|rel]
        lost = sum(a==r and i>=dls.n_items for a,i in held.targets.tolist())
        won = sum(float(s[a]>s[b]) for a in rel for b in rest)
        assert got[r].item()==pytest.approx(won/((len(rel)+lost)*len(rest)), abs=1e-5)

def awkward():
    "Loaders whose held-out rows hold every awkward case"
    rows = [(u,i,0) for u in range(1, 6) for i in range(u, u+6)]+[(6,i,0) for i in range(1, 12)]
    rows += [(1,10,1),(1,3,1),(2,50,1),(2,51,1),(99,4,1),(98,50,1),(6,1,1),(6,2,1),(3,9,1)]
    df = pd.DataFrame(rows, columns=['user','item','is_valid']).assign(rating=3.)
    return CFDataLoaders.from_df(df, splitter=ColSplitter('is_valid'), device='cpu')

def test_awkward_rows_are_counted():
    dls = awkward()
    l = cf_learner(dls, n_factors=3, seed=0)
    rep = l.evaluate(k=4)
    assert rep.counts.to_dict()==dict(held_out_rows=9, rows_of_unknown_users=2, rows_of_unknown_items=2, rows_seen_before=3, users_judged=3,
                                      users_without_held_out_rows=3, short_lists=0, empty_lists=0, lists_cut_in_a_tie=0)
    np.testing.assert_allclose(rep.iloc[0][['recall@4','NDCG@4']].to_numpy(float), naive(l, 4), rtol=1e-5)
    both = l.evaluate(k=4, exclude_seen=False)
    assert both.counts.rows_seen_before==0 and both.counts.users_judged==4
    assert '2 rows of unknown users; 2 rows of unknown items; 3 rows seen before' in repr(rep) and rep.note in rep._repr_html_()
    assert isinstance(rep.round(2), Report) and rep.round(2).note==rep.note

def test_users_who_have_seen_everything_and_users_without_rows():
    df = pd.DataFrame([(1,i) for i in range(1, 6)]+[(2,1),(2,2),(3,3),(3,4)], columns=['user','item']).assign(rating=1.)
    dls = CFDataLoaders.from_df(df, valid_pct=0, device='cpu')
    l = cf_learner(dls, n_factors=3, seed=0)
    rep = l.evaluate(k=2, split=pd.DataFrame(dict(user=[1,2], item=[77,3], rating=4.)))
    assert (rep.counts.empty_lists, rep.counts.users_judged, rep.counts.users_without_held_out_rows)==(1,2,1)
    rep = l.evaluate(k=2, split=pd.DataFrame(dict(user=[55], item=[1])))
    assert rep.counts.users_judged==0 and 'NDCG@2' not in rep
    rep = l.evaluate(k=50, split=pd.DataFrame(dict(user=[2], item=[3])), measures=('precision','recall'))
    assert rep.counts.short_lists==1 and rep['precision@50'].iloc[0]==pytest.approx(1/50) and rep['recall@50'].iloc[0]==1

def test_equal_scores_are_counted_and_nan_scores_an_error(learn):
    flat = SimpleNamespace(model=Popularity(learn.dls), dls=learn.dls)
    flat.model.count.fill_(1.)
    _,counts = judge(flat, HeldOut(learn.dls, learn.dls.valid_ds.x), 5)
    assert counts['lists_cut_in_a_tie']>50
    flat.model.count[4] = float('nan')
    with pytest.raises(NaNScores, match='has training diverged'): judge(flat, HeldOut(learn.dls, learn.dls.valid_ds.x), 5)

def test_a_frame_of_later_rows(learn):
    dls = learn.dls
    rows = dls.valid_ds.frame((dls.valid_ds.x, dls.valid_ds.y))
    rows = rows[(rows.user!='#na#')&(rows.title!='#na#')]
    rep = learn.evaluate(k=5, split=rows, exclude_seen=False)
    np.testing.assert_allclose(rep.iloc[0,2:].to_numpy(float), learn.evaluate(k=5, exclude_seen=False).iloc[0,2:].to_numpy(float), rtol=0.02)
    assert learn.evaluate(k=5, split=rows).counts.rows_seen_before==len(rows)
    assert 'RMSE' not in learn.evaluate(k=5, split=rows.drop(columns='rating'))
    with pytest.raises(ValueError, match='is not a column'): learn.evaluate(split=rows.drop(columns='title'))

@pytest.mark.parametrize('make', [lambda d: EASE(d, 20.), ItemKNN, lambda d: IALS(d, 3), Popularity])
def test_scores_that_are_no_ratings_get_no_error_of_ratings(learn, make, tmp_path):
    model = make(learn.dls)
    rep = evaluate(model, k=5, dls=learn.dls)
    assert not {'RMSE','MAE'}&set(rep) and 'mean rating' not in rep.index and rep['NDCG@5'].notna().all()
    cf_learner(learn.dls, model).save_bundle(tmp_path)
    assert 'RMSE' not in load_bundle(tmp_path, device='cpu').evaluate(k=5)
    beside = learn.evaluate(k=5, baselines={'other':model})
    assert beside.RMSE.notna().sum()==5 and np.isnan(beside.RMSE['other']) and 'nan' not in (repr(beside)+beside._repr_html_()).lower()

def test_a_loss_that_ranks_leaves_errors_of_ratings_out(learn):
    l = cf_learner(learn.dls, n_factors=3, loss_func=BPRLoss(), seed=0)
    assert 'RMSE' not in l.evaluate(k=5) and 'RMSE' in cf_learner(learn.dls, n_factors=3, seed=0).evaluate(k=5)
    bare = evaluate(l.model, k=5, dls=learn.dls, loss_func=BPRLoss())
    pd.testing.assert_frame_equal(bare, l.evaluate(k=5))
    assert 'RMSE' in evaluate(l.model, k=5, dls=learn.dls), 'nobody said that it ranks'

def test_compare_is_the_paired_test_of_what_evaluate_says(learn):
    pop = Popularity(learn.dls)
    res = learn.compare(pop, k=5, measures=('recall','AUC'), seed=3)
    rep = learn.evaluate(k=5, measures=('recall','AUC'))
    assert res.this['recall@5']==pytest.approx(rep['recall@5'].iloc[0]) and res.other['AUC@5']==pytest.approx(rep['AUC@5']['popularity'])
    held = HeldOut(learn.dls, learn.dls.valid_ds.x)
    a,b = (judge(o, held, 5)[0]['recall'] for o in (learn, SimpleNamespace(model=pop, dls=learn.dls)))
    want = paired_test(a, b, seed=3)
    assert res.loc['recall@5',['difference','low','high','p']].tolist()==pytest.approx([want[o] for o in ('mean','low','high','p')])
    other = cf_learner(CFDataLoaders.from_df(synth_ratings(60, 90, 1200), item_name='title', seed=4, device='cpu'), n_factors=3)
    with pytest.raises(ValueError, match='other ids or other validation rows'): learn.compare(other)
    bare = cf_learner(learn.dls.new_empty(), n_factors=3, seed=0)
    later = learn.dls.valid_ds.items
    with pytest.raises(ValueError, match='without its rows.*exclude_seen=False'): learn.compare(bare, 5, later)
    assert learn.compare(bare, 5, later, exclude_seen=False, n_boot=20).users.iloc[0]>0
    with pytest.raises(ValueError, match='saved without its rows'): bare.dls.positives(4)
    twin = cf_learner(learn.dls, n_factors=3, y_range=(0.5,5.5), seed=9)
    assert learn.compare(twin, k=5).users.tolist()==[len(held.users)]*2

def test_models_without_a_learner_and_baselines_of_other_loaders(learn):
    ease = EASE(learn.dls, 50.)
    rep,own = evaluate(ease, k=5, dls=learn.dls),learn.evaluate(k=5, baselines=dict(EASE=ease))
    assert rep['NDCG@5'].iloc[0]==own['NDCG@5']['EASE'] and rep.index[0]=='EASE'
    rows = learn.dls.valid_ds.frame((learn.dls.valid_ds.x[:50],))
    pd.testing.assert_frame_equal(evaluate(learn, rows, 4, False, n_sampled=7), learn.evaluate(4, rows, exclude_seen=False, n_sampled=7))
    with pytest.raises(ValueError, match='EASE is no learner'): evaluate(ease)
    few = CFDataLoaders.from_df(synth_ratings(30, 90, 600), item_name='title', seed=3, device='cpu')
    with pytest.raises(ValueError, match=r"`baselines`\['pop'\] knows 30 users"): learn.evaluate(baselines=dict(pop=Popularity(few)))
    with pytest.raises(TypeError, match='`baselines` should be {name: model}'): learn.evaluate(baselines=[ease])

def test_metrics_of_a_part_of_the_users_and_of_nan(learn):
    l = cf_learner(learn.dls, n_factors=3, seed=0, metrics=list_metrics('NDCG', k=5, n_users=20, seed=2))
    val = l.validate()[1]
    held = HeldOut(l.dls, l.dls.valid_ds.x, n_users=20, seed=2)
    assert len(held.users)==20 and val==pytest.approx(judge(l, held, 5)[0]['NDCG'].nanmean().item())
    with torch.no_grad(): l.model.item_bias[2] = float('nan')
    assert math.isnan(l.validate()[1])

def test_metrics_may_rank_what_was_seen(learn):
    vals = []
    for seen in (True,False):
        l = cf_learner(learn.dls, n_factors=3, seed=0, metrics=list_metrics('MAP','recall', k=12, exclude_seen=seen))
        vals.append(l.validate()[1:])
        assert list(vals[-1])==pytest.approx(l.evaluate(k=12, measures=('MAP','recall'), exclude_seen=seen)[['MAP@12','recall@12']].iloc[0].tolist(), rel=1e-5)
    assert vals[0]!=vals[1]

def test_popularity_on_the_ncf_split_scores_what_was_published(data_dir):
    base = data_dir('ncf-ml-1m')
    cols = dict(sep='\t', header=None, usecols=[0,1], names=['user','item'])
    train,test = pd.read_csv(base/'ml-1m.train.rating.gz', **cols),pd.read_csv(base/'ml-1m.test.rating', **cols)
    with gzip.open(base/'ml-1m.test.negative.gz', 'rt') as f: negs = {u: list(map(int, l.split('\t')[1:])) for u,l in enumerate(f)}
    both = pd.concat([train,test], ignore_index=True)
    dls = CFDataLoaders.from_df(both, rating_name=None, device='cpu', bs=8192, splitter=lambda d: (np.arange(len(train)), np.arange(len(train), len(both))))
    rep = cf_learner(dls, Popularity(dls)).evaluate(candidates=negs, measures=('hit rate','NDCG'))
    hr,ndcg = rep.loc['popularity', ['hit rate@10 (candidates)','NDCG@10 (candidates)']]
    assert abs(hr-.4531)<.002 and abs(ndcg-.2542)<.002, (hr, ndcg)
    assert rep.counts.users_judged==6040

def test_measures_agree_with_torchmetrics():
    r = pytest.importorskip('torchmetrics.retrieval')
    rng = np.random.default_rng(0)
    n,m,k = 40,25,6
    s,rel = torch.tensor(rng.permuted(np.tile(np.arange(m), (n,1)), axis=1)).float(),torch.tensor(rng.random((n,m))<0.2)
    hits = hit_matrix(top_places(s, k)[1], rel.nonzero())
    idx = torch.arange(n).repeat_interleave(m)
    for name,cls in dict(recall=r.RetrievalRecall, precision=r.RetrievalPrecision, NDCG=r.RetrievalNormalizedDCG, MRR=r.RetrievalMRR).items():
        metric = cls(top_k=k, empty_target_action='skip')
        metric.update(s.reshape(-1), rel.reshape(-1), indexes=idx)
        assert list_measures[name](*hits).nanmean().item()==pytest.approx(metric.compute().item(), abs=1e-6), name

def test_users_without_a_candidate_are_left_out_and_counted(learn):
    "A right answer alone would be first in any list"
    dls = learn.dls
    held,user,ids = HeldOut(dls, dls.valid_ds.x),dls.user_name,dls.classes
    u,v,w = ids[user].decode(held.users[:3])
    titles,own = list(ids['title'].ids),list(ids['title'].decode(held.targets[(held.targets[:,0]==1)&(held.targets[:,1]<dls.n_items),1]))
    seen = ids['title'].decode(dls.train_ds.x[dls.train_ds.x[:,0]==held.users[2],1])
    given = {u:titles[:60], v:[*own,'Nowhere','Nowhere else'], w:list(seen)}
    rep = learn.evaluate(k=5, candidates=given)
    assert rep.counts.users_judged==1 and rep.counts.users_without_candidates==len(held.users)-1 and rep.counts.unknown_candidates==2
    assert '2 unknown candidates' in rep.note
    right = held.targets[(held.targets[:,0]==0)&(held.targets[:,1]<dls.n_items),1]
    codes = torch.cat([known_codes(dls, titles[:60]), right]).unique()
    assert rep['NDCG@5 (candidates)'].iloc[0]==pytest.approx(judge(learn, held, 5, candidates=codes)[0]['NDCG'][0].item())
    frame = pd.DataFrame([(a,i) for a,o in given.items() for i in o], columns=[user,'title'])
    pd.testing.assert_frame_equal(rep, learn.evaluate(k=5, candidates=frame))
    assert learn.evaluate(candidates={}).counts.users_judged==0

def test_candidates_as_recommend_takes_them(learn):
    titles,us = (learn.dls.classes[n].ids for n in ('title','user'))
    some,own = titles[:15].tolist(),{u: titles[j%5:j%5+20].tolist() for j,u in enumerate(us)}
    want = learn.evaluate(k=5, candidates=some)
    assert 'recall@5 (of 15)' in want
    for given in (iter(some), set(some), some+some[:4]): pd.testing.assert_frame_equal(pd.DataFrame(learn.evaluate(k=5, candidates=given)), pd.DataFrame(want))
    once = learn.evaluate(k=5, candidates={u: iter(v) for u,v in own.items()})
    pd.testing.assert_frame_equal(pd.DataFrame(once), pd.DataFrame(learn.evaluate(k=5, candidates=own)))
    assert 'recall@5 (of 1)' in learn.evaluate(k=5, candidates=some[0])
    with pytest.raises(ValueError, match='`candidates` is empty: there is nothing to rank'): learn.evaluate(candidates=[])
    with pytest.raises(TypeError, match='got a function'): learn.evaluate(candidates=lambda us: us)

def test_baselines_do_not_take_the_models_place(learn):
    for n in ('popularity',type(learn.model).__name__):
        with pytest.raises(ValueError, match='a row of that name already'): learn.evaluate(baselines={n:EASE(learn.dls)})
    with pytest.raises(TypeError, match=r"should be a model such as EASE\(dls\), not EASE"): learn.evaluate(baselines=dict(EASE=EASE))

def test_reports_answer_for_unknown_users_as_predictions_do():
    df = synth_ratings(60, 40, 1000, seed=3)
    tr,va = ColdUserSplitter(.3, seed=0)(df)
    late = df.iloc[va]
    learn = cf_learner(CFDataLoaders.from_df(df.iloc[tr], seed=0, unk='mean', device='cpu'), n_factors=4, y_range=(.5,5.5), seed=0)
    with learn.no_bar(),learn.no_logging():
        learn.fit(2, 0.03)
        want = ((learn.predict(late)[2][:,0]-torch.tensor(late.rating.to_numpy()))**2).mean()
        assert learn.validate(dl=learn.dls.test_dl(late, with_labels=True))[0]==pytest.approx(want.item(), rel=1e-4)
        assert learn.evaluate(split=late, bar=False).RMSE.iloc[0]==pytest.approx(want.sqrt().item(), rel=1e-4)
        assert learn.evaluate(bar=False).RMSE.iloc[0]**2==pytest.approx(learn.validate()[0], rel=1e-4)

def test_a_learner_without_rows_is_not_put_beside_what_needs_them(tmp_path):
    df = synth_ratings(60, 40, 1000, seed=3)
    learn = cf_learner(CFDataLoaders.from_df(df.iloc[:900], seed=0, device='cpu'), n_factors=4, y_range=(.5,5.5), seed=0)
    bare = load_bundle(learn.save_bundle(tmp_path/'b', history=False), device='cpu')
    for kw in ({}, dict(exclude_seen=False), dict(n_sampled=5)):
        rep = bare.evaluate(split=df.iloc[900:], bar=False, **kw)
        assert list(rep.index)==['DotProductBias'] and 'the learner has no rows: nothing counts as seen' in rep.note

def test_a_learner_beside_an_ensemble():
    df = synth_ratings(60, 40, 1000, seed=3)
    dls = CFDataLoaders.from_df(df, seed=0, device='cpu')
    learns = [cf_learner(dls, n_factors=4, seed=s) for s in (0,1)]
    got = learns[0].compare(Ensemble(learns), 5, n_boot=50)
    assert got.loc['NDCG@5','other']==pytest.approx(Ensemble(learns).evaluate(5, bar=False)['NDCG@5'].iloc[0])
