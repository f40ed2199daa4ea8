"Ensembles: greedy selection against a naive one, folds that go on after a kill, members that do not fit"
import json,os,signal,subprocess,sys,time
from pathlib import Path

import numpy as np,pandas as pd,pytest,torch
from sklearn.linear_model import Ridge
from fastai.losses import MSELossFlat
from cfext import *
from cfext.blend import *
from cfext.blend import _metric
from cfext.folds import *
from cfext.ensemble import *
from conftest import root

pytestmark = pytest.mark.usefixtures('quiet')

def make(df, splitter, seed, model='dot', epochs=1):
    dls = CFDataLoaders.from_df(df, item_name='title', splitter=splitter, seed=seed, bs=101, device='cpu')
    learn = cf_learner(dls, model, n_factors=4, y_range=(0.5,5.5), seed=seed)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, 0.05, wd=0.1)
    return learn

@pytest.fixture(scope='module')
def df(): return synth_ratings(60, 40, 1000)

# greedy selection

def naive_greedy(P, y, error, n):
    "Caruana's selection in the slowest way: every ensemble is averaged from its members again"
    picks,errors = [],[]
    for _ in range(n):
        trials = [error(np.mean([P[j] for j in picks+[c]], axis=0), y) for c in range(len(P))]
        picks.append(trials.index(min(trials)))
        errors.append(min(trials))
    return picks[:errors.index(min(errors))+1]

@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('name', ['rmse','mae'])
def test_greedy_picks_are_those_of_the_naive_selection(seed, name):
    rng = np.random.default_rng(seed)
    n,m = rng.integers(20, 120),rng.integers(2, 9)
    y = rng.normal(size=n)
    P = [y*rng.uniform(0.5, 1.2)+rng.normal(0, rng.uniform(0.3, 2), n)+rng.normal(0, 0.3) for _ in range(m)]
    error = dict(rmse=lambda p,y: ((p-y)**2).mean()**0.5, mae=lambda p,y: np.abs(p-y).mean())[name]
    picks = naive_greedy(P, y, error, 30)
    assert greedy_picks(P, lambda p: -error(p, y), 30) == picks
    blend = greedy_blend(P, y, name, n_steps=30, n_boot=3, cv=2)
    np.testing.assert_allclose(list(blend.weights.values()), np.bincount(picks, minlength=m)/len(picks))

@pytest.mark.parametrize('seed', range(4))
def test_greedy_picks_of_a_ranking_metric(seed):
    rng = np.random.default_rng(seed)
    n,m = rng.integers(60, 150),rng.integers(2, 7)
    users,y = rng.integers(0, 9, n),rng.integers(0, 5, n)
    P = [y*rng.uniform(0.1, 1)+rng.normal(0, rng.uniform(0.5, 2), n) for _ in range(m)]
    def ndcg(p, y):
        res = []
        for u in np.unique(users):
            dcg = lambda by: sum(y[users==u][j]/np.log2(r+2) for r,j in enumerate(np.argsort(-by[users==u], kind='stable')[:10]))
            if dcg(y): res.append(dcg(p)/dcg(y))
        return np.mean(res)
    picks = naive_greedy(P, y, lambda p,y: -round(ndcg(p, y), 12), 15)
    blend = greedy_blend(P, y, lambda p,y,g: round(grouped_ndcg(p, y, g), 12), groups=users, n_steps=15, n_boot=3, cv=2)
    assert blend.larger is True
    np.testing.assert_allclose(list(blend.weights.values()), np.bincount(picks, minlength=m)/len(picks))

def test_greedy_on_classes_and_on_a_metric_to_be_made_large():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 90)
    P = [np.exp(rng.normal(size=(90,3))+s*np.eye(3)[y]) for s in (0.2,2.,1.)]
    P = [p/p.sum(1, keepdims=True) for p in P]
    acc = lambda p,y: (p.argmax(1)==y).mean()
    blend = greedy_blend(P, y, acc, n_boot=20)
    assert blend.larger is True and blend.best=='m1' and blend.predict(P).shape==(90,3)
    picks = naive_greedy(P, y, lambda p,y: -acc(p, y), 50)
    np.testing.assert_allclose(list(blend.weights.values()), np.bincount(picks, minlength=3)/len(picks))

def test_bagged_selection_is_the_mean_of_selections_and_repeats():
    rng = np.random.default_rng(2)
    y = rng.normal(size=80)
    P = [y+rng.normal(0, s, 80) for s in (0.5,0.6,0.7,0.8,0.9)]
    a,b = (greedy_blend(P, y, n_bags=6, n_boot=3, seed=4).weights for _ in range(2))
    assert a==b and abs(sum(a.values())-1)<1e-9 and sum(w>0 for w in a.values())>2

def test_state_of_the_generators_is_left_alone(df):
    np.random.seed(3); torch.manual_seed(3)
    before = np.random.get_state()[1].copy(),torch.get_rng_state()
    fit_folds(make, df, k=2)
    greedy_blend([df.rating+1, df.rating*0.9], df.rating, n_boot=3, n_bags=3)
    assert (np.random.get_state()[1]==before[0]).all() and torch.equal(torch.get_rng_state(), before[1])

# what a blend is worth

def test_gain_of_noise_is_not_found():
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    P = [rng.normal(size=300)*0.01 for _ in range(30)]
    for blend in (greedy_blend(P, y, n_boot=50), stack(P, y, 'ridge', n_boot=50), stack(P, y, 'nnls', n_boot=50)):
        assert blend.interval[0] <= 0.01 and blend.gain < 0.01, 'noise looks like a gain: it was measured on the rows of the fit'

def test_gain_across_parts_by_hand():
    rng = np.random.default_rng(0)
    y = rng.normal(size=60)
    P = [y+rng.normal(0, 1, 60), y+rng.normal(0, 1.1, 60)]
    blend = stack(P, y, Ridge(1.), cv=3, seed=5, n_boot=5)
    order,across,base = np.random.default_rng(5).permutation(60),np.zeros(60),np.zeros(60)
    for part in np.array_split(order, 3):
        rest = np.setdiff1d(np.arange(60), part)
        across[part] = Ridge(1.).fit(np.stack(P, 1)[rest], y[rest]).predict(np.stack(P, 1)[part])
        base[part] = P[int(np.argmin([((p-y)[rest]**2).mean() for p in P]))][part]
    gain = ((base-y)**2).mean()**0.5 - ((across-y)**2).mean()**0.5
    assert abs(blend.gain-gain)<1e-9 and abs(blend.score-((across-y)**2).mean()**0.5)<1e-9

def test_bootstrap_of_groups_draws_them_whole():
    y,g = np.zeros(12),np.repeat([0,1,2], 4)
    p = np.repeat([1.,2.,3.], 4)
    sizes = []
    def spy(p, y, g):
        sizes.append(sorted(np.bincount(g)[np.bincount(g)>0].tolist()))
        return float(p.mean())
    bootstrap_gain(spy, p, p, y, g, n_boot=9)
    assert all(s==[4,4,4] for s in sizes)

def test_ndcg_against_a_loop():
    rng = np.random.default_rng(0)
    g,y,p = rng.integers(0, 7, 50),rng.integers(0, 4, 50),rng.normal(size=50)
    res = []
    for u in range(7):
        dcg = lambda by: sum(y[g==u][j]/np.log2(r+2) for r,j in enumerate(np.argsort(-by[g==u], kind='stable')[:3]))
        if dcg(y.astype(float)): res.append(dcg(p)/dcg(y.astype(float)))
    assert abs(grouped_ndcg(p, y, g, k=3)-np.mean(res))<1e-12

# bad input of blends

@pytest.mark.parametrize('preds,msg', [
    ([], 'nothing to blend'), ({'a':[1,2,3]}, "member 'a' has 3 predictions for 4 targets"), ({'a':[1,2,3,4.], 'b':[1,2,np.nan,4]}, "member 'b' predicts NaN in 1 of 4 rows"),
    ({'a':[1,2,3,4.], 'b':np.ones((4,3))}, "member 'b' predicts shape"), ({'a':pd.Series([1.,2,3,4], index=[0,1,2,9])}, "member 'a' has no prediction for 1 of 4 rows"),
    ({'a':pd.Series([1.,2,3,4], index=[0,0,1,2])}, 'cannot align')])
def test_members_that_do_not_fit(preds, msg):
    for f in (greedy_blend,stack):
        with pytest.raises(ValueError, match=msg): f(preds, pd.Series([1.,2,3,5]))

def test_rows_in_another_order_are_aligned():
    rng = np.random.default_rng(0)
    y = pd.Series(rng.normal(size=40), index=[f'r{j}' for j in range(40)])
    p = y+rng.normal(0, 0.5, 40)
    q = y+rng.normal(0, 0.5, 40)
    a,b = greedy_blend(dict(p=p, q=q), y, n_boot=3),greedy_blend(dict(p=p.sample(frac=1, random_state=1), q=q[::-1]), y, n_boot=3)
    assert a.weights==b.weights and a.gain==b.gain

def test_blends_say_what_was_wrong():
    rng = np.random.default_rng(0)
    y = rng.normal(size=40)
    P,C,acc = {n: y+rng.normal(size=40) for n in 'ab'},[rng.random((40,3)) for _ in range(2)],lambda p,y: (p.argmax(1)==y).mean()
    cases = [("targets are such as 'a'; expected numbers", lambda f: f(P, np.array(['a','b']*20))), ('targets run from 0 to 39; expected the numbers of 3 classes, 0 to 2', lambda f: f(C, np.arange(40), metric=acc)),
             ("targets are such as 'x'; expected the numbers of 3 classes", lambda f: f(C, np.array(['x','y']*20), metric=acc)), ("'rmse' is for one number a row; these are of 3 classes: pass a function", lambda f: f(C, np.arange(40)%3)),
             ('`cv`=5 parts of 3 rows: pass fewer', lambda f: f({n:p[:3] for n,p in P.items()}, y[:3])), ('`groups` holds 3 for 40 rows', lambda f: f(P, y, metric='ndcg', groups=np.arange(3))),
             ("the metric gives inf for member 'b'", lambda f: f({**P, 'b':np.where(y>0, np.inf, y)}, y)), (r'the metric gives an array of shape \(40,\), expected a number', lambda f: f(P, y, metric=lambda p,y: (p-y)**2)),
             ("`metric`=3 should be one of 'rmse', 'mae', 'ndcg' or a function", lambda f: f(P, y, metric=3)), ("member 'm1' holds object, expected numbers", lambda f: f([P['a'],np.array(['x']*40, dtype=object)], y)),
             (r"member 'm0' is of shape \(40, 2, 2\); expected \(n,\) or \(n,c\)", lambda f: f([rng.random((40,2,2))]*2, y)), (r"member 'm0' is of shape \(\)", lambda f: f([1.,2.], y))]
    for msg,call in cases:
        for f in (greedy_blend,stack):
            with pytest.raises((ValueError,TypeError), match=msg): call(f)
    for pct in (3,-1,0):
        with pytest.raises(ValueError, match=f'`bag_pct`={pct} should be'): greedy_blend(P, y, n_bags=3, bag_pct=pct)

def test_metric_of_the_wrong_direction():
    y = np.arange(9.)
    with pytest.raises(ValueError, match='pass `larger=False`'): greedy_blend([y+1, y*2], y, 'mae', larger=True)
    with pytest.raises(ValueError, match='does not tell which direction'): greedy_blend([y+1, y*2], y, lambda p,y: 1.)
    with pytest.raises(ValueError, match="`metric`='auc' is not one of"): greedy_blend([y+1, y*2], y, 'auc')
    with pytest.raises(ValueError, match='`cv`=10 parts of 9 rows'): greedy_blend([y+1, y*2], y, cv=10)
    with pytest.raises(ValueError, match='targets are missing'): greedy_blend([y+1], np.where(y==3, np.nan, y))

# folds

@pytest.mark.parametrize('by', ['random','time','user','stratified'])
def test_every_row_is_predicted_once_in_the_callers_order(df, by):
    shuffled = df.sample(frac=1, random_state=2)
    frame = shuffled.copy()
    folds = fit_folds(make, shuffled, k=3, by=by)
    pd.testing.assert_frame_equal(shuffled, frame)
    assert folds.oof.index.equals(shuffled.index) and not folds.oof.isna().any()
    for j,(tr,va) in enumerate(folds.rows):
        some = shuffled.iloc[va[:5]]
        np.testing.assert_allclose(folds.oof.loc[some.index], predict_rows(folds.learners[j], some)[:,0], rtol=1e-5)
        assert not np.intersect1d(tr, va).size and len(tr)+len(va)==len(df)

def test_past_bags_published_folds_and_seeds(df):
    past = fit_folds(make, df, k=4, by='past')
    first = np.argsort(df.timestamp.to_numpy(), kind='stable')[:250]
    assert past.oof.isna().to_numpy().nonzero()[0].tolist()==sorted(first) and len(past.learners)==3
    bags = fit_folds(make, df, k=3, by='bag')
    assert all(abs(len(va)/len(df)-np.exp(-1))<0.01 for _,va in bags.rows)
    given = np.where(np.arange(len(df))%5==0, 0, -1)
    seeds = fit_folds(make, df, by=given, n_seeds=3)
    each = [predict_rows(l, df[given==0])[:,0].numpy() for l in seeds.learners]
    np.testing.assert_allclose(seeds.oof[given==0], np.mean(each, 0), rtol=1e-5)
    assert len(each)==3 and seeds.oof[given==-1].isna().all() and not np.allclose(each[0], each[1])

script = '''
import sys,time
from pathlib import Path
from test_ensemble import *
out,stop = Path(sys.argv[1]),sys.argv[2]=='stop'
def logged(df, splitter, seed):
    with open(out/'log', 'a') as f: f.write(f'{seed} ')
    if stop and seed==2:
        (out/'waiting').touch()
        time.sleep(600)
    return make(df, splitter, seed)
fit_folds(logged, synth_ratings(60, 40, 1000), k=5, path=out/'folds').oof.to_frame().to_pickle(out/'oof')
'''

def test_killed_in_the_third_fold(df, tmp_path):
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join([str(root), str(root/'tests')]), 'OMP_NUM_THREADS':'1'}
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', script, tmp_path, 'stop'], env=env)
    end = time.time()+120
    while not (tmp_path/'waiting').exists() and p.poll() is None and time.time()<end: time.sleep(0.2)
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL and (tmp_path/'log').read_text()=='0 1 2 '
    trained = []
    def logged(df, splitter, seed):
        trained.append(seed)
        return make(df, splitter, seed)
    again = fit_folds(logged, df, k=5, path=tmp_path/'folds')
    assert trained==[2,3,4]
    pd.testing.assert_series_equal(again.oof, fit_folds(make, df, k=5).oof)
    assert len(again.learners)==5
    np.testing.assert_allclose(predict_rows(again.learners[0], df.iloc[again.rows[0][1]])[:,0], again.oof.iloc[again.rows[0][1]], rtol=1e-6)

def test_fold_numbers_of_ones_own(df):
    n = len(df)
    for by,msg in ((np.full(n, np.nan),'should hold whole numbers of folds'), (np.array(['a']*n),'it holds <U1, such as'), (np.arange(n)%3/2,'whole numbers'), (np.full(n, -1),'holds no row out')):
        with pytest.raises(ValueError, match=msg): fold_rows(df, by=by)
    for by in (np.arange(n)%3, np.arange(n)%3*1., pd.Series(np.arange(n)%3)): assert len(fold_rows(df, by=by))==3

def test_folds_by_time_cut_between_times(df):
    "Rows of one time are never on both sides of a cut"
    day = df.assign(timestamp=np.random.default_rng(0).permutation(len(df))%23)
    for by in ('time','past'):
        rows = fold_rows(day, 4, by)
        assert len(rows)==(4 if by=='time' else 3)
        for tr,va in rows: assert not set(day.timestamp.iloc[tr]) & set(day.timestamp.iloc[va]) and abs(len(va)-len(df)/4)<=len(df)/23+1
    for tr,va in fold_rows(day, 4, 'past'): assert day.timestamp.iloc[tr].max()<day.timestamp.iloc[va].min()
    sizes = lambda count, k: [len(va) for _,va in fold_rows(pd.DataFrame(dict(timestamp=np.repeat(np.arange(len(count)), count)[::-1])), k, 'time')]
    one = [1]*300
    for count,k,want in ((one,4,[75]*4), ([300,*one],5,[300,75,75,75,75]), ([*one,300],5,[75,75,75,75,300]), ([*one[:150],300,*one[150:]],5,[75,75,300,75,75]), ([10,300,200,90],4,[10,300,200,90]), ([1]*14,4,[4,3,4,3]), ([540,*[1]*60],4,[540,20,20,20])):
        assert sizes(count, k)==want
    rng = np.random.default_rng(0)
    for _ in range(200):
        count,k = rng.integers(1, 9, rng.integers(2, 30))**rng.integers(1, 5),rng.integers(2, 9)
        if k>len(count):
            with pytest.raises(ValueError, match=f'`k`={k} folds of ({len(count)} different times|{count.sum()} rows)'): sizes(count, k)
        else: assert min(got := sizes(count, k))>0 and len(got)==k and set(np.cumsum(got))<=set(np.cumsum(count))

def test_spoiled_folds(df, tmp_path):
    a = fit_folds(make, df, k=2, path=tmp_path)
    (tmp_path/'fold1-seed0.npy').write_bytes(b'half')
    with pytest.warns(UserWarning, match='is not readable; this fold is trained again'): b = fit_folds(make, df, k=2, path=tmp_path)
    pd.testing.assert_series_equal(a.oof, b.oof)
    for change in (dict(k=3), dict(seed=1), dict(tag='other')):
        with pytest.raises(ValueError, match='holds folds of another'): fit_folds(make, df, path=tmp_path, **{'k':2, **change})
    with pytest.raises(ValueError, match='holds folds of another frame'): fit_folds(make, df.assign(rating=df.rating+1), k=2, path=tmp_path)
    for text in ('{"frame": ', '3', '["k"]'):
        (tmp_path/'folds.json').write_text(text)
        with pytest.raises(ValueError, match='folds.json is not readable .* delete that folder'): fit_folds(make, df, k=2, path=tmp_path)

def test_folds_that_cannot_be(df):
    with pytest.raises(ValueError, match='`k`=1001 folds of 1000 rows'): fit_folds(make, df, k=1001)
    with pytest.raises(ValueError, match='would train on a constant target'): fit_folds(make, df.assign(rating=1.), k=2)
    with pytest.raises(ValueError, match='should be a whole number of at least 2'): fit_folds(make, df, k=1)
    with pytest.raises(TypeError, match='should return a Learner, got NoneType'): fit_folds(lambda *a: None, df, k=2)
    with pytest.raises(ValueError, match='the splitter of this fold is for 1000 rows, it got 500'): fit_folds(lambda df,s,seed: make(df[:500], s, seed), df, k=2)
    with pytest.raises(ValueError, match='pass `splitter` to its loaders'): fit_folds(lambda df,s,seed: make(df, lambda o: (np.arange(len(o)),[]), seed), df, k=2)
    odd = df.assign(rating=np.where(np.arange(len(df))<250, 3., df.rating))
    with pytest.warns(UserWarning, match='holds out a constant target'): fit_folds(make, odd, by=np.arange(1000)//250)

# ensembles

@pytest.fixture(scope='module')
def members(df): return [make(df, lambda o: fold_rows(o, 4)[0], s, m) for s,m in ((0,'dot'),(1,'nn'),(2,DotProduct))]

def test_merged_is_the_members_merged(df, members):
    some = df.sample(7, random_state=0)
    each = torch.stack([m.predict(some)[2] for m in members])
    w = np.array([0.5,0.2,0.3])
    assert torch.allclose(Ensemble(members).predict(some)[1], each.mean(0), atol=1e-6)
    frame,p,sd = Ensemble(members, w.tolist()).predict(some)
    assert torch.allclose(p, (each*torch.tensor(w)[:,None,None].float()).sum(0), atol=1e-6) and p.shape==(7,1)
    assert torch.allclose(Ensemble(members).predict(some)[2], each.std(0, correction=0), atol=1e-5)
    assert torch.allclose(Ensemble(members, method='gmean').predict(some)[1], each.log().mean(0).exp(), atol=1e-5)
    assert frame.title.tolist()==some.title.tolist() and frame.columns.tolist()==['user','title','pred','spread']
    one = torch.cat([Ensemble(members).predict(r)[1] for _,r in some.iterrows()])
    assert torch.allclose(one, Ensemble(members).predict(some)[1], atol=1e-6)

def test_lists_are_those_of_the_mean_scores(df, members):
    ens,user = Ensemble(members),int(df.user.iloc[0])
    recs = ens.recommend(user, k=5)
    unseen = [t for t in df.title.unique() if t not in set(df.title[df.user==user]) and all(t in set(m.dls.classes['title'].ids) for m in members)]
    scores = ens.predict(pd.DataFrame(dict(user=user, title=unseen)))[1][:,0]
    best = scores.topk(5)
    assert recs.title.tolist()==[unseen[j] for j in best.indices]
    np.testing.assert_allclose(recs.score, best.values, rtol=1e-5)

def test_members_of_different_ids(df):
    halves = [make(df[df.user<=40], None, 0), make(df[df.user>20], None, 1)]
    ens = Ensemble(halves)
    assert ens.recommend([5,60], k=3).user.tolist()==[5]*3+[60]*3
    with pytest.raises(UnknownIdError): ens.predict((60, df.title.iloc[0]))
    with pytest.raises(ValueError, match='holds out'): ens.get_preds()

def test_aligned_by_id_or_refused(df, members):
    tr,va = fold_rows(df, 4)[0]
    back = make(df[::-1].reset_index(drop=True), lambda o: (len(df)-1-tr, len(df)-1-va), 5)
    p,y = Ensemble([members[0], back]).get_preds()
    assert torch.allclose(p, (members[0].predict(df.iloc[np.sort(va)])[2]+back.predict(df.iloc[np.sort(va)])[2])/2, atol=1e-6)
    other = make(df.assign(rating=6-df.rating), lambda o: (tr,va), 5)
    with pytest.raises(ValueError, match="member 'm1' has other targets than member 'm0' for the same rows"): Ensemble([members[0], other]).get_preds()

def test_bad_ensembles(df, members, tmp_path):
    with pytest.raises(ValueError, match='at least one member'): Ensemble([])
    with pytest.raises(TypeError, match="member 'm0' should be a Learner"): Ensemble([3])
    with pytest.raises(ValueError, match='sum to 1.2'): Ensemble(members, [0.4,0.4,0.4])
    with pytest.raises(ValueError, match='2 `weights` for 3 members'): Ensemble(members, [0.5,0.5])
    with pytest.raises(ValueError, match='should be at least 0'): Ensemble(members, [1.5,-0.5,0.])
    with pytest.raises(ValueError, match='the members are'): Ensemble(members, dict(a=1.))
    with pytest.raises(ValueError, match="`clip`="): Ensemble(members, clip=(5,1))
    with pytest.raises(BundleError, match="member 'm1': .*holds no bundle"): Ensemble([members[0], tmp_path])
    lost = make(df, lambda o: fold_rows(o, 4)[0], 1)
    with torch.no_grad(): lost.model.item_bias[5] = float('nan')
    with pytest.raises(ValueError, match="member 'lost' predicts NaN"): Ensemble(dict(ok=members[0], lost=lost)).predict(df)
    with pytest.raises(ValueError, match="was trained on 750 of these 1000 rows"): Ensemble(members).fit_weights(df)

def test_in_turn_takes_the_default_device(df, members, monkeypatch):
    import cfext.ensemble as e
    monkeypatch.setattr(e, 'default_device', lambda: torch.device('cpu'))
    torch.testing.assert_close(Ensemble(members, in_turn=True).get_preds(df)[0], Ensemble(members).get_preds(df)[0])

def test_in_turn_leaves_models_where_they_were(df, members):
    ens = Ensemble(members, device='cpu', in_turn=True)
    assert torch.equal(ens.predict(df[:5])[1], Ensemble(members).predict(df[:5])[1])
    assert ens.recommend(1, k=3).equals(Ensemble(members).recommend(1, k=3))

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_in_turn_on_a_gpu(df, members):
    ens = Ensemble(members, device='cuda', in_turn=True)
    assert torch.allclose(ens.predict(df[:5])[1], Ensemble(members).predict(df[:5])[1], atol=1e-5)
    assert all(p.device.type=='cpu' for m in members for p in m.model.parameters())

def test_bundles(df, members, tmp_path):
    ens = Ensemble(dict(zip('abc', members)), [0.5,0.2,0.3], clip=(1,5))
    ens.save_bundle(tmp_path/'e')
    assert torch.equal(load_ensemble(tmp_path/'e', device='cpu').predict(df[:9])[1], ens.predict(df[:9])[1])
    ens.save_bundle(tmp_path/'e')
    assert len([o for o in (tmp_path/'e').iterdir()])==4, 'an older ensemble is cleared away'
    (tmp_path/'e'/'ensemble.json').write_text('{"kind"')
    with pytest.raises(BundleError, match='is not readable as JSON'): load_ensemble(tmp_path/'e')
    ens.save_bundle(tmp_path/'e')
    with pytest.raises(BundleError, match='holds an ensemble: read it with load_ensemble'): Ensemble([members[0], tmp_path/'e'])
    what = json.loads((tmp_path/'e'/'ensemble.json').read_text())
    (tmp_path/'e'/'ensemble.json').write_text(json.dumps({k:v for k,v in what.items() if k!='weights'}))
    with pytest.raises(BundleError, match='lacks weights; save the ensemble again'): load_ensemble(tmp_path/'e')

# members of other kinds

def tabular(df, rows, seed):
    from fastai.tabular.all import Categorify,TabularDataLoaders,tabular_learner
    torch.manual_seed(seed)
    frame = df[['user','title','genre','rating']].astype({'user':str, 'rating':'float32'})
    dls = TabularDataLoaders.from_df(frame, procs=[Categorify], cat_names=['user','title','genre'], y_names='rating', valid_idx=rows[1], bs=101, device='cpu')
    learn = tabular_learner(dls, layers=[8], y_range=(0.5,5.5), loss_func=MSELossFlat())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.02)
    return learn

def test_a_dot_product_and_a_tabular_model(df, members):
    rows = tuple(np.sort(r) for r in fold_rows(df, 4)[0])
    tab = tabular(df, rows, 0)
    text = df.assign(user=df.user.astype(str))
    dot = make(text, lambda o: rows, 1)
    ens = Ensemble(dict(dot=dot, tab=tab), [0.6,0.4])
    p,y = ens.get_preds()
    with tab.no_bar(),dot.no_bar(): a,b = dot.get_preds(),tab.get_preds()
    assert p.shape==(250,1) and torch.allclose(p, 0.6*a[0]+0.4*b[0], atol=1e-6) and torch.equal(y, b[1])
    some = text[['user','title','genre','rating']].astype({'rating':'float32'}).iloc[rows[1][:9]]
    frame,q,sd = ens.predict(some)
    assert torch.allclose(q, p[:9], atol=1e-6) and frame.columns.tolist()==['user','title','pred','spread'] and sd.shape==(9,1)
    assert abs(ens.validate()[0]-((p-y)**2).mean())<1e-5 and abs(ens.validate(some)[0]-((q-y[:9])**2).mean())<1e-5
    back = Ensemble(dict(tab=tab, dot=dot), [0.4,0.6])
    assert torch.allclose(back.predict(some)[1], q, atol=1e-6) and abs(back.validate(some)[0]-ens.validate(some)[0])<1e-5
    with pytest.raises(TypeError, match="lists need members that score every item; member 'tab'"): ens.recommend('1')
    with pytest.raises(TypeError, match="member 'tab' is a TabularLearner, which has no safe form"): ens.save_bundle('nowhere')

def test_fastais_dot_product_is_a_member(df, members):
    "It predicts (n,) where others predict (n,1)"
    from fastai.collab import CollabDataLoaders,collab_learner
    theirs = collab_learner(CollabDataLoaders.from_df(df, item_name='title', rating_name='rating', seed=1, device='cpu'), n_factors=3, y_range=(.5,5.5))
    with theirs.no_bar(),theirs.no_logging(): theirs.fit(1, .02)
    some = df[['user','title','rating']][:9]
    for both in ([members[0],theirs], [theirs,members[0]]):
        ens = Ensemble(both)
        _,q,sd = ens.predict(some)
        with theirs.no_bar(): own = theirs.get_preds(dl=theirs.dls.test_dl(some))[0].reshape(-1, 1)
        assert q.shape==sd.shape==(9,1) and torch.allclose(q, (own+members[0].predict(some)[2])/2, atol=1e-6)
        assert abs(ens.validate(some)[0]-((q[:,0]-torch.tensor(some.rating.to_numpy()))**2).mean())<1e-5
    p,y = Ensemble([theirs]).get_preds()
    assert p.shape==y.shape==(len(theirs.dls.valid_ds),1) and abs(Ensemble([theirs]).validate()[0]-((p-y)**2).mean())<1e-5

def test_weights_where_users_rate_items_again(df):
    "Held-out rows whose pair has other rows in training, and several of one pair"
    again = pd.concat([df.iloc[:300], df.iloc[:300].assign(rating=lambda d: (d.rating%5)+1), df.iloc[:300].assign(rating=1.)], ignore_index=True)
    rows = fold_rows(again, 4)[0]
    a,b,c = make(again, lambda o: rows, 1),make(again, lambda o: rows, 2),make(again, lambda o: (rows[0],rows[1][::-1]), 3)
    for ms in ([a,b],[a,c]):
        ens = Ensemble(ms)
        for f in (ens.fit_weights,ens.fit_stack): assert set(f(n_boot=5).names)=={'m0','m1'}
    p,y = Ensemble([a,c], [0.,1.]).get_preds()
    assert torch.allclose(p, c.predict(again.iloc[rows[1]])[2], atol=1e-6) and torch.equal(y[:,0], torch.tensor(again.rating.to_numpy()[rows[1]]).float())
    other = make(again, lambda o: (rows[1],rows[0]), 1)
    with pytest.raises(ValueError, match="member 'm1' holds out"): Ensemble([a,other]).get_preds()

def test_nan_names_the_member_in_lists_too(df):
    dls = CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu')
    good,bad = (cf_learner(dls, n_factors=3, seed=j) for j in range(2))
    with torch.no_grad(): bad.model.item_bias[3] = float('nan')
    for method in ('mean','rank'):
        with pytest.raises(ValueError, match="member 'odd' predicts NaN"): Ensemble(dict(good=good, odd=bad), method=method).recommend(7, k=3)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    from PIL import Image
    path,rng = tmp_path_factory.mktemp('pictures'),np.random.default_rng(0)
    for j in range(24):
        f = path/('valid' if j%3==0 else 'train')/('dark' if j%2 else 'light')/f'{j}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.integers(0, 90, (8,8,3))+(0 if j%2 else 120)).astype('uint8')).save(f)
    return path

def vision(path, seed, vocab=None):
    from fastai.vision.all import ImageDataLoaders,Learner,accuracy
    torch.manual_seed(seed)
    dls = ImageDataLoaders.from_folder(path, bs=4, device='cpu', num_workers=0, vocab=vocab)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)), metrics=accuracy)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    return learn

def test_vision_models(pictures):
    a,b = vision(pictures, 0),vision(pictures, 1)
    ens = Ensemble([a,b])
    p,y = ens.get_preds()
    with a.no_bar(),b.no_bar(): pa,pb = a.get_preds()[0],b.get_preds()[0]
    assert ens.kind=='softmax' and torch.allclose(p, (pa+pb)/2, atol=1e-6) and p.shape==(8,2)
    loss,acc = ens.validate()
    assert abs(loss+p[torch.arange(8),y].log().mean())<1e-5, 'the loss is of probabilities, not of their softmax'
    assert abs(acc-(p.argmax(1)==y).float().mean())<1e-6
    g = Ensemble([a,b], method='gmean').get_preds()[0]
    assert torch.allclose(g, (pa*pb).sqrt()/(pa*pb).sqrt().sum(1, keepdim=True), atol=1e-5)
    files = sorted((pictures/'valid').rglob('*.png'))[:3]
    frame,q,sd = ens.predict(files)
    assert frame.columns.tolist()==['pred','prob','spread'] and set(frame.pred)<={'dark','light'} and q.shape==(3,2)
    np.testing.assert_allclose(frame.prob, q.max(1).values, rtol=1e-6)
    other = vision(pictures, 2, vocab=['light','dark'])
    if list(other.dls.vocab)!=list(a.dls.vocab):
        with pytest.raises(ValueError, match='has another classes'): Ensemble([a, other])

def sequences(df, seed, **kw):
    dls = SeqDataLoaders.from_df(df, item_name='title', max_len=6, bs=16, seed=seed, device='cpu')
    learn = seq_learner(dls, 'gru4rec', config=dict(n_factors=5, n_hidden=6), seed=seed)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    return learn

def test_sequences_and_lists_with_ratings(df):
    a,b = sequences(df, 0),sequences(df, 1)
    ens = Ensemble([a,b])
    p,y = ens.get_preds()
    ds = a.dls.valid.dataset
    x,t = ds.cut(range(len(ds)))
    by_hand = (a.next_scores(x).softmax(1)+b.next_scores(x).softmax(1))/2
    assert torch.allclose(p, by_hand, atol=1e-6) and torch.equal(y, t.amax(1)) and torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
    assert abs(ens.validate()[0]+p[torch.arange(len(p)),y].log().mean())<1e-5
    hist = [df.title[df.user==u].tolist()[:4] for u in (1,2)]
    frame,q,_ = ens.predict(hist)
    assert torch.allclose(q[0], torch.stack([m.next_scores(m._encode(hist[0], 'h')[None])[0].softmax(0) for m in (a,b)]).mean(0), atol=1e-6)
    assert frame.pred.tolist()==a.dls.vocab.decode(q.argmax(1)).tolist()
    recs = ens.recommend([1,2], k=4)
    u = int(a.dls.classes['user'].encode([1])[0])
    s = torch.stack([m.next_scores(torch.as_tensor(m.dls.hist[u][-6:]).long()[None])[0].softmax(0) for m in (a,b)]).mean(0)
    s[torch.as_tensor(a.dls.hist[u]).long()] = -1
    assert recs.title[recs.user==1].tolist()==a.dls.vocab.decode(s.topk(4).indices).tolist()
    dot = make(df, None, 3)
    with pytest.raises(ValueError, match="pass method='rank'"): Ensemble([a, dot]).recommend(1)
    with pytest.raises(ValueError, match='predicts what comes next, the other does not'): Ensemble([a, dot]).get_preds()
    both = Ensemble([a, dot], method='rank').recommend([1,2], k=4)
    assert both.user.tolist()==[1]*4+[2]*4 and not set(both.title[both.user==1]) & set(df.title[df.user==1])
    few = sequences(df[df.title!=df.title.iloc[0]], 2)
    with pytest.raises(ValueError, match='has another classes'): Ensemble([a, few])

def test_a_folder_that_only_looks_like_a_member_is_left_alone(members, tmp_path):
    (tmp_path/'members-2024').mkdir()
    (tmp_path/'members-2024'/'names.txt').write_text('everybody')
    for _ in range(2): Ensemble(members).save_bundle(tmp_path)
    assert (tmp_path/'members-2024'/'names.txt').exists() and len(list(tmp_path.iterdir()))==len(members)+2

def test_an_ensemble_that_is_replaced_while_it_is_read(df, members, tmp_path, monkeypatch):
    import cfext.ensemble as E
    real,calls = E.load_bundle,[]
    Ensemble(members[:2]).save_bundle(tmp_path)
    def _inner(*args, **kwargs):
        calls.append(args)
        if len(calls)==2: Ensemble(members).save_bundle(tmp_path)
        return real(*args, **kwargs)
    monkeypatch.setattr(E, 'load_bundle', _inner)
    again = load_ensemble(tmp_path, device='cpu')
    assert len(again)==len(members)==len(calls)-2 and torch.equal(again.predict(df[:5])[1], Ensemble(members).predict(df[:5])[1])

def test_learners_and_bundles_and_pretrained(df, members, tmp_path):
    members[0].save_bundle(tmp_path/'a')
    ens = Ensemble([tmp_path/'a', str(tmp_path/'a'), members[1]], device='cpu')
    assert torch.allclose(ens.predict(df[:5])[1], (2*members[0].predict(df[:5])[2]+members[1].predict(df[:5])[2])/3, atol=1e-6)
    (tmp_path/'a'/'bundle.json').write_text('{')
    with pytest.raises(BundleError, match="member 'm0': .*not readable as JSON"): Ensemble([tmp_path/'a', members[1]])

@pytest.mark.parametrize('method', ['mean','gmean','rank','median','max'])
def test_every_way_to_merge(df, members, method):
    some = df[:6]
    each = torch.stack([m.predict(some)[2] for m in members])
    ranks = torch.tensor(np.stack([pd.Series(e[:,0].numpy()).rank().to_numpy()/6 for e in each]))[...,None].float()
    want = dict(mean=each.mean(0), gmean=each.log().mean(0).exp(), rank=ranks.mean(0), median=each.median(0).values, max=each.max(0).values)[method]
    assert torch.allclose(Ensemble(members, method=method).get_preds(some)[0], want, atol=1e-5)
    if method in ('mean','gmean','rank'):
        w = torch.tensor([0.2,0.5,0.3])[:,None,None]
        want = dict(mean=(each*w).sum(0), gmean=(each.log()*w).sum(0).exp(), rank=(ranks*w).sum(0))[method]
        assert torch.allclose(Ensemble(members, [0.2,0.5,0.3], method).get_preds(some)[0], want, atol=1e-5)

def test_ranks_are_no_ratings(df, members):
    ens = Ensemble(members, method='rank')
    for f in (lambda: ens.predict(df[:6]), ens.validate, lambda: ens.validate(df)):
        with pytest.raises(ValueError, match="method='rank' gives ranks, .*`recommend` and `evaluate`.*method='mean'"): f()
    assert len(ens.recommend(7, k=4))==4

def test_ratings_and_clicks_make_lists_together(df, members):
    "By ranks, whichever comes first; held-out rows are compared by their pairs"
    dls = CFDataLoaders.from_df(df, item_name='title', rating_name=None, splitter=lambda o: fold_rows(o, 4)[0], device='cpu')
    clicks = cf_learner(dls, n_factors=4, loss_func=BPRLoss(), seed=1)
    with clicks.no_bar(),clicks.no_logging(): clicks.fit(1)
    with pytest.raises(ValueError, match=r"another target \(\[\]\).*by method='rank'"): Ensemble([members[0],clicks])
    for ms in ([members[0],clicks],[clicks,members[0]]):
        ens = Ensemble(ms, method='rank')
        ranks = [pd.Series(l.model.score_items(l.dls.classes['user'].encode([7]).astype(int))[0,1:].detach().numpy(), l.dls.classes['title'].ids).rank() for l in ms]
        total = ranks[0].add(ranks[1], fill_value=0)
        got = ens.recommend(7, k=5, exclude_seen=False).title
        both = total[ranks[0].index.intersection(ranks[1].index)]
        assert both[got].tolist()==pytest.approx(both.nlargest(5).tolist())
        rep = ens.evaluate(5)
        assert 0<rep.loc['MergedModel','NDCG@5']<=1 and 'popularity' in rep.index
        with pytest.raises(ValueError, match='ranks'): ens.predict(df[:3])

def test_stack_of_members(df, members):
    ens = Ensemble(members, clip=(1,5))
    b = ens.fit_stack(how='nnls', n_boot=5)
    P = [p[:,0].numpy() for p in ens.member_preds()]
    y = ens.get_preds()[1][:,0].numpy()
    want = stack({f'm{j}': np.clip(p, 1, 5) for j,p in enumerate(P)}, y, 'nnls', n_boot=5)
    assert b.weights==want.weights and b.gain==want.gain and ens.weights.tolist()==[1/3]*3
    for f in (ens.fit_stack,ens.fit_weights):
        with pytest.raises(ValueError, match="member 'm0' was trained on 750 of these 1000 rows"): f(df)

# what demanding users found

def test_grouped_measures_take_any_index_and_decimals():
    "By place, not by label; the interval of the NDCG is that of a draw of whole groups"
    from decimal import Decimal
    rng = np.random.default_rng(0)
    y,g = rng.integers(0, 5, 400).astype(float),np.repeat(np.arange(40), 10)
    p,q = y+rng.normal(0, 1, 400),y+rng.normal(0, 2, 400)
    ix = pd.Index(rng.permutation(4000)[:400])
    S = lambda a: pd.Series(a, ix)
    assert grouped_ndcg(S(p), S(y), S(g))==grouped_ndcg(p, y, g)<=1
    m = _metric('ndcg', g)
    fast = bootstrap_gain(m, S(p), S(q), S(y), S(g), True, 50, seed=3)
    slow = bootstrap_gain(_metric(lambda a,b,c: grouped_ndcg(a, b, c), g), p, q, y, g, True, 50, seed=3)
    assert fast==pytest.approx(slow) and fast[0]>0
    exact = [Decimal(str(v)) for v in y]
    a,b = (greedy_blend(dict(a=p, b=q), t, n_boot=20) for t in (pd.Series(exact), y))
    assert a.weights==b.weights
    assert greedy_blend(dict(a=y), y, n_boot=5).larger is False and greedy_blend(dict(a=y), y, 'ndcg', groups=g, n_boot=5).larger is True

def test_a_resumed_run_is_of_the_same_target_columns_and_seeds(df, tmp_path):
    rows = df.assign(other=5.5-df.rating)
    def mk(d, splitter, seed): return make(d, splitter, seed)
    fit_folds(mk, rows, 2, path=tmp_path)
    with pytest.raises(ValueError, match='another rating'): fit_folds(mk, rows, 2, path=tmp_path, rating_name='other')
    with pytest.raises(ValueError, match='another columns'): fit_folds(mk, rows.rename(columns=dict(other='more')), 2, path=tmp_path)
    with pytest.raises(ValueError, match='another n_seeds'): fit_folds(mk, rows, 2, path=tmp_path, n_seeds=2)
    (tmp_path/'fold0-seed0'/'bundle.json').unlink()
    with pytest.raises(ValueError, match='Delete fold0-seed0.npy to train it again'): fit_folds(mk, rows, 2, path=tmp_path).learners

def test_lists_of_an_ensemble_leave_out_what_positives_set_aside(df):
    learn = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu').positives(4), n_factors=3, loss_func=BPRLoss(), seed=1)
    for o in (learn, Ensemble([learn])): assert not len(o.recommend(None, k=5).merge(df, on=['user','title']))
    with pytest.raises(ValueError, match='fitted by BPRLoss, which judges no predictions: use `evaluate`'): Ensemble([learn]).validate()
    pd.testing.assert_frame_equal(Ensemble([learn]).evaluate(k=5).reset_index(drop=True), learn.evaluate(k=5).reset_index(drop=True))
    a,b = (o.evaluate(k=5, split=df[:200], exclude_seen=False) for o in (Ensemble([learn]), learn))
    assert a.counts.equals(b.counts) and a.counts['rows_rated_lower'] and np.allclose(a.iloc[0], b.iloc[0])

def test_evaluate_is_that_of_a_learner_and_of_the_mean(df):
    "Of one member it is the member's; of two it is that of the mean of their predictions"
    dls = CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu')
    a,b = (cf_learner(dls, n_factors=3, y_range=(0.5,5.5), seed=s) for s in (1,2))
    for l in (a,b):
        with l.no_bar(),l.no_logging(): l.fit(2, 0.05)
    one,own = Ensemble([a]).evaluate(k=5),a.evaluate(k=5)
    np.testing.assert_allclose(one.to_numpy(float), own.to_numpy(float), rtol=1e-5)
    assert one.counts.equals(own.counts)
    both = Ensemble([a,b])
    p,t = both.get_preds()
    assert both.evaluate(k=5).RMSE.iloc[0]==pytest.approx(((p-t)**2).mean().sqrt().item(), rel=1e-5)
    other = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=2, device='cpu'), n_factors=3)
    with pytest.raises(ValueError, match='pass `split`'): Ensemble([a,other]).evaluate()
    imp = CFDataLoaders.from_df(df, item_name='title', rating_name=None, seed=1, device='cpu')
    ranks = Ensemble([cf_learner(imp, Popularity), cf_learner(imp, EASE)], method='rank')
    assert len(ranks.recommend([7], k=2))==2 and 'RMSE' not in ranks.evaluate(k=5)

def test_an_ensemble_of_one_is_judged_as_its_member():
    "Loss with weights of rows, metrics of every kind, and reports on later rows beside the same baselines"
    from fastai.metrics import ExplainedVariance,PearsonCorrCoef,R2Score,mae,rmse
    df = synth_ratings(60, 40, 1100, seed=3).assign(w=lambda o: o.index%5+1.)
    old,late = df.iloc[:1000],df.iloc[1000:]
    for kw in ({}, dict(weight_name='w')):
        dls = CFDataLoaders.from_df(pd.concat([old, old.head(30)]), seed=5, device='cpu', **kw)
        learn = cf_learner(dls, n_factors=4, y_range=(.5,5.5), seed=0, metrics=[mae, R2Score(), rmse, *list_metrics(k=3), ExplainedVariance(), PearsonCorrCoef()])
        with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.02)
        ens = Ensemble([learn])
        with learn.no_bar(): assert list(ens.validate())==pytest.approx(list(learn.validate()), rel=1e-4)
        assert ens.validate(late)[1]==pytest.approx((learn.predict(late)[2][:,0]-torch.tensor(late.rating.to_numpy())).abs().mean().item(), rel=1e-4)
        assert isinstance(learn.model, DotProductBias) and len(learn.metrics)==7
        for split in ('valid', late):
            a,b = learn.evaluate(4, split, bar=False),ens.evaluate(4, split, bar=False)
            pd.testing.assert_frame_equal(pd.DataFrame(a).reset_index(drop=True), pd.DataFrame(b).reset_index(drop=True), rtol=1e-4)
            assert (a.counts.sort_index()==b.counts.sort_index()).all()

def test_a_validation_leaves_the_members_records_and_needs_none_of_their_callbacks():
    df = synth_ratings(60, 40, 1000, seed=3)
    late = synth_ratings(80, 40, 1200, seed=5).tail(90)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=5, device='cpu', unk='mean'), n_factors=4, y_range=(.5,5.5), seed=0, cbs=TTA([*identity_views(), *noise_views(n=1)]))
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.02)
    values = [list(o) for o in learn.recorder.values]
    ens = Ensemble([learn])
    ens.validate()
    with pytest.warns(UserWarning, match="answered by unk='mean'"): got,pred = ens.validate(late)[0],ens.predict(late)[1][:,0]
    assert got==pytest.approx(((pred-torch.tensor(late.rating.to_numpy()))**2).mean().item(), rel=1e-4)
    assert [list(o) for o in learn.recorder.values]==values

def test_metrics_of_lists_keep_no_other_members(tmp_path):
    "An export of the first member would hold the rows and models of all"
    df = synth_ratings(60, 40, 1000, seed=3)
    learns = [cf_learner(CFDataLoaders.from_df(df, seed=5, device='cpu'), n_factors=4, seed=s, path=tmp_path, metrics=list_metrics(k=3)) for s in (0,1)]
    def size():
        learns[0].export('one.pkl')
        return (tmp_path/'one.pkl').stat().st_size
    before = size()
    assert len(Ensemble(learns).validate())==3 and size()<1.2*before

def test_members_without_validation_rows_are_named(tmp_path):
    df = synth_ratings(60, 40, 1000, seed=3)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=5, device='cpu'), n_factors=4, seed=0)
    ens = Ensemble([load_bundle(learn.save_bundle(tmp_path/'b', history=False), device='cpu')])
    for f in (ens.validate, ens.get_preds, ens.fit_weights):
        with pytest.raises(ValueError, match="member 'm0' has no validation rows: pass `rows`"): f()
    assert len(ens.validate(df.head(9)))==1

def test_classifiers_of_texts_are_judged_row_by_row():
    "Their loaders sort rows by length, and their callbacks look into the model"
    from fastai.text.all import AWD_LSTM,TextDataLoaders,accuracy,awd_lstm_clas_config,text_classifier_learner
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(list('abcdefgh'), rng.integers(3, 30))) for _ in range(90)]))
    df['label'] = np.where(df.text.str.count('a')>2, 'many', 'few')
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', seed=1, bs=16, device='cpu')
    torch.manual_seed(0)
    small = {**awd_lstm_clas_config, 'n_hid':12, 'emb_sz':8, 'n_layers':1}
    learns = [text_classifier_learner(dls, AWD_LSTM, config=small, pretrained=False, metrics=accuracy) for _ in range(2)]
    with learns[0].no_bar(),learns[0].no_logging(): learns[0].fit(1, 0.05)
    ens = Ensemble(learns)
    for rows in (None, df.head(25)):
        p = ens.get_preds(rows)[0]
        y = ens.get_preds()[1] if rows is None else torch.tensor([list(dls.vocab[1]).index(o) for o in rows.label])
        want = [float(-p[torch.arange(len(p)),y].log().mean()), float((p.argmax(1)==y).float().mean())]
        assert list(ens.validate(rows))==pytest.approx(want, rel=1e-4)

def test_reports_of_several_members_stand_beside_the_means_of_their_rows():
    df = synth_ratings(60, 40, 1100, seed=3)
    old,late = df.iloc[:1000],df.iloc[1000:]
    learns = [cf_learner(CFDataLoaders.from_df(o, valid_pct=0, device='cpu'), n_factors=4, y_range=(.5,5.5), seed=0) for o in (old.iloc[:600],old.iloc[400:])]
    whole = cf_learner(CFDataLoaders.from_df(old, valid_pct=0, device='cpu'), n_factors=4)
    got,want = (o.evaluate(4, late, bar=False).iloc[1:] for o in (Ensemble(learns), whole))
    pd.testing.assert_frame_equal(pd.DataFrame(got), pd.DataFrame(want), rtol=1e-4)

def test_unknown_users_of_members_that_answer_by_the_mean():
    df = synth_ratings(30, 20, 250)
    learns = [cf_learner(CFDataLoaders.from_df(df, seed=1, device='cpu', unk='mean'), n_factors=4, seed=s) for s in (0,1)]
    with pytest.warns(UserWarning, match='unknown user'): got = Ensemble(learns).recommend([1,'nobody'], 20, exclude_seen=False)
    with pytest.warns(UserWarning, match='unknown user'): want = [l.recommend(['nobody'], 20, exclude_seen=False).set_index('item').score for l in learns]
    got = got[got.user=='nobody'].set_index('item').score
    assert np.allclose(got, sum(want)[got.index]/2, atol=1e-5)

def test_weights_of_classifiers_from_a_frame_of_labels():
    from fastai.tabular.all import Categorify,Normalize,TabularDataLoaders,tabular_learner
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=rng.choice(list('abc'), 300), v=rng.normal(size=300)))
    df['label'] = np.where(df.v+(df.kind=='a')>0.3, 'yes', 'no')
    dls = TabularDataLoaders.from_df(df.head(200), procs=[Categorify,Normalize], cat_names=['kind'], cont_names=['v'], y_names='label', valid_idx=list(range(150, 200)), bs=50, device='cpu')
    torch.manual_seed(0)
    learns = [tabular_learner(dls, layers=[4]) for _ in range(2)]
    with learns[1].no_bar(),learns[1].no_logging(): learns[1].fit(3, 0.02)
    late = df.iloc[200:].reset_index(drop=True)
    ens,acc = Ensemble(learns),lambda p,y: (p.argmax(1)==y).mean()
    preds,y = dict(zip(ens.members, ens.member_preds(late))),np.array([list(dls.vocab).index(o) for o in late.label])
    assert ens.fit_weights(late, metric=acc).weights==greedy_blend(preds, y, metric=acc).weights
