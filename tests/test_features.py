"""EmbeddingFeatures: scikit-learn's contract, values against the model, leakage, real downstream models, bad input"""
import pickle,subprocess,sys,warnings
from functools import partial

import joblib
import numpy as np,pandas as pd,pytest,torch
from fastai.collab import CollabDataLoaders,collab_learner
from fastai.tabular.all import Categorify,FillMissing,Learner,MSELossFlat,Module,Normalize,RegressionBlock,TabularDataLoaders,set_seed,tabular_learner
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GroupKFold,TimeSeriesSplit,cross_val_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator

from cfext.core import UnknownIdError
from cfext.data import CFDataLoaders
from cfext.features import EmbeddingFeatures
from cfext.tables import EmbTable,align_tables,emb_columns,group_dists,read_embs
from cfext.graph import LightGCN
from cfext.learner import cf_learner
from cfext.negatives import CosineProduct
from cfext.sides import SideProduct
from cfext.sources import synth_ratings

warnings.filterwarnings('ignore', message='X does not have valid feature names')

def quiet(learn, n, lr, **kwargs):
    if n:
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, lr, **kwargs)
    return learn

def sales(n, seed, n_stores=30):
    rng = np.random.default_rng(seed)
    fx = np.random.default_rng(0).normal(size=n_stores)
    df = pd.DataFrame(dict(store=rng.choice([f's{i:02}' for i in range(n_stores)], n), day=rng.integers(1, 8, n), promo=rng.random(n)))
    y = fx[df.store.str[1:].astype(int)] + np.sin(df.day) + .5*df.promo + rng.normal(scale=.3, size=n)
    return df.assign(y=y.astype('float32'))

def fit_net(df, seed=1, epochs=4, cats=('store','day'), procs=(Categorify,Normalize), szs=None, bs=64, lr=1e-2):
    set_seed(seed)
    dls = TabularDataLoaders.from_df(df.reset_index(drop=True), procs=list(procs), cat_names=list(cats), cont_names=['promo'], y_names='y',
                                     y_block=RegressionBlock(), valid_idx=[0], bs=bs, device='cpu')
    return quiet(tabular_learner(dls, layers=[32], emb_szs=szs or dict(store=4, day=3), n_out=1), epochs, lr)

def means(df, target='target', width=3, seed=0):
    "A recipe without a network: category means beside noise, turned at random, so that each fit has its own axes"
    cols = [c for c in df.columns if c!=target]
    y = pd.Series(np.asarray(df[target] if target in df else np.zeros(len(df)), dtype=float))
    rng,res = np.random.default_rng(len(df)+seed),{}
    for c in cols:
        g = y.groupby(df[c].to_numpy()).agg(['mean','size'])
        a = np.zeros((len(g)+1,width), 'float32')
        a[1:,0] = g['mean']-y.mean()
        q,_ = np.linalg.qr(rng.normal(size=(width,width)))
        n_na = int(df[c].isna().sum())
        res[c] = EmbTable(g.index, (a@q).astype('float32'), counts=np.r_[n_na,g['size']])
    return res

@pytest.fixture(scope='module')
def train(): return sales(1500, 1)
@pytest.fixture(scope='module')
def test(): return sales(400, 2)
@pytest.fixture(scope='module')
def learn(train): return fit_net(train)
@pytest.fixture(scope='module')
def dot():
    df = synth_ratings(n_users=80, n_items=50, n_ratings=1500, seed=1)
    dls = CFDataLoaders.from_df(df, user_name='user', item_name='item', rating_name='rating', bs=64, seed=1)
    return df,quiet(cf_learner(dls, n_factors=5, y_range=(0,5.5)), 2, 1e-2)

# ------------------------------------------------------------------ scikit-learn's contract

# fit_transform is out of fold, so it is not fit().transform(); and frames are matched by name, so another column order is no error
not_ours = dict(check_transformer_general='out of fold by design', check_transformer_data_not_an_array='out of fold by design')

@pytest.mark.parametrize('cv', [None,3])
@pytest.mark.parametrize('form', ['aligned','free'])
def test_check_estimator(cv, form):
    "All of scikit-learn's checks; `not_ours` says which do not apply"
    ef = EmbeddingFeatures(means, cv=cv, form=form, n_groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        res = check_estimator(ef, on_fail=None, expected_failed_checks=not_ours if cv else {})
    bad = [(o['check_name'],str(o['exception'])[:300]) for o in res if o['status']=='failed']
    assert not bad, bad
    assert sum(o['status']=='passed' for o in res)>40

@pytest.mark.parametrize('check', ['check_set_output_transform','check_set_output_transform_pandas','check_global_output_transform_pandas',
    'check_transformer_get_feature_names_out','check_transformer_get_feature_names_out_pandas'])
def test_names_and_containers_of_sklearn(check):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        getattr(estimator_checks, check)('EmbeddingFeatures', EmbeddingFeatures(means, cv=3))

def test_names_containers_and_index(learn, train, test):
    ef = EmbeddingFeatures(learn).fit(train)
    names = ['promo',*(f'store_{i}' for i in range(4)),*(f'day_{i}' for i in range(3))]
    assert ef.get_feature_names_out().tolist()==names and ef.get_feature_names_out(ef.feature_names_in_).tolist()==names
    out = ef.transform(test.set_index(test.index+7))
    assert list(out.columns)==names and out.index[0]==7 and (out.dtypes.iloc[1:]==np.float32).all() and out.promo.dtype==test.promo.dtype
    added = EmbeddingFeatures(learn, output='add').fit_transform(train)
    assert list(added.columns)==['store','day',*names] and added.store.equals(train.store)
    only = EmbeddingFeatures(learn, output='only', cols=['day'], cv=None).fit_transform(train)
    assert list(only.columns)==names[-3:] and only.shape==(1500,3)
    arr = EmbeddingFeatures(means).fit_transform(np.random.default_rng(0).integers(0, 5, (30,2)), np.arange(30.))
    assert isinstance(arr, np.ndarray) and arr.dtype==np.float32 and arr.shape==(30,6)
    pdo = EmbeddingFeatures(means).set_output(transform='pandas').fit_transform(np.random.default_rng(0).integers(0, 5, (30,2)), np.arange(30.))
    assert list(pdo.columns)==[f'x{i}_{j}' for i in range(2) for j in range(3)]

def test_in_pipeline_and_column_transformer(train, test):
    X,y,T = train.drop(columns='y'),train.y,test.drop(columns='y')
    recipe = partial(fit_net, epochs=3, bs=128, lr=3e-2)
    pipe = make_pipeline(EmbeddingFeatures(recipe, cv=3), LinearRegression()).fit(X, y)
    assert pipe.score(T, test.y)>.6
    def fit_cats(df): return fit_net(df.assign(promo=0.), epochs=1, bs=128)
    ct = ColumnTransformer([('emb', EmbeddingFeatures(fit_cats, cv=3), ['store','day']), ('hot', OneHotEncoder(), ['day'])], remainder='passthrough')
    out = ct.fit_transform(X, y)
    assert out.shape==(1500, 4+3+7+1) and ct.get_feature_names_out()[0]=='emb__store_0'
    assert ct.transform(T).shape==(400, 15)

def test_cross_validation_in_processes(train):
    X,y = train[['store','day']],train.y
    pipe = make_pipeline(EmbeddingFeatures(partial(means, target='y')), LinearRegression())
    one,two = (cross_val_score(pipe, X, y, cv=2, n_jobs=n) for n in (1,2))
    assert np.array_equal(one, two) and one.mean()>.5

def test_clone_and_joblib(learn, train, test, tmp_path):
    ef = EmbeddingFeatures(learn, unk='na', form='free').fit(train)
    twin = clone(ef)
    assert twin.source is learn and twin.get_params()['unk']=='na' and not hasattr(twin, 'tables_')
    joblib.dump(ef, tmp_path/'ef.joblib')
    back = joblib.load(tmp_path/'ef.joblib')
    assert not isinstance(back.source, Learner) and (tmp_path/'ef.joblib').stat().st_size<40_000
    pd.testing.assert_frame_equal(back.transform(test), ef.transform(test))
    pd.testing.assert_frame_equal(clone(back).fit(train).transform(test), ef.transform(test))
    assert pickle.loads(pickle.dumps(EmbeddingFeatures(fit_net))).source is fit_net

def test_nothing_of_the_callers_changes(learn, train, test):
    before,state,mode = train.copy(),{k:v.clone() for k,v in learn.model.state_dict().items()},learn.model.training
    torch.manual_seed(3); np.random.seed(3)
    a = torch.rand(1),np.random.rand()
    torch.manual_seed(3); np.random.seed(3)
    EmbeddingFeatures(learn, form='free').fit(train).transform(test)
    EmbeddingFeatures(partial(means, target='y'), cv=3, cols=['store','day']).fit_transform(train)
    assert (torch.rand(1),np.random.rand())==a
    pd.testing.assert_frame_equal(train, before)
    assert learn.model.training==mode and all(torch.equal(v, state[k]) for k,v in learn.model.state_dict().items())

# ------------------------------------------------------------------ values

def test_tabular_values(learn, test):
    F = EmbeddingFeatures(learn, output='only').fit(test).transform(test)
    dl = learn.dls.test_dl(test)
    codes = torch.cat([b[0] for b in dl])
    want = torch.cat([e(codes[:,i]) for i,e in enumerate(learn.model.embeds)], 1).detach().numpy()
    assert np.array_equal(F.to_numpy(), want)

def test_dot_values_and_score(dot):
    df,learn = dot
    ef = EmbeddingFeatures(learn, output='only').fit(df)
    F = ef.transform(df)
    assert list(F.columns)==[*(f'user_{i}' for i in range(5)),'user_bias',*(f'item_{i}' for i in range(5)),'item_bias','user_item_score']
    i = 17
    u = learn.dls.classes['user'].encode([df.user.iloc[i]])[0]
    assert np.array_equal(F.iloc[i,:5], learn.model.user_factors[u].detach().numpy())
    want = np.asarray(learn.predict(df[['user','item']])[2]).ravel()
    got = 5.5/(1+np.exp(-(F.user_item_score.to_numpy()+float(learn.model.offset))))
    assert np.allclose(got, want, atol=1e-5)
    assert EmbeddingFeatures(learn, form='free', n_groups=3).fit(df).get_feature_names_out().tolist()[-1]=='user_item_score'

@pytest.mark.parametrize('unk', ['mean','na'])
@pytest.mark.parametrize('model', ['CosineProduct','LightGCN','LightGCN unit','SideProduct'])
def test_the_score_is_the_models_own(dot, model, unk):
    "Cosines and computed factors too, for known and unknown users"
    df,learn = dot
    make = dict(CosineProduct=CosineProduct.from_dls, LightGCN=partial(LightGCN.from_dls, n_layers=2), SideProduct=partial(SideProduct.from_dls, items=df.drop_duplicates('item')[['item','genre']]))
    make['LightGCN unit'] = partial(make['LightGCN'], unit=True)
    l = quiet(cf_learner(learn.dls, make[model](learn.dls, n_factors=5), seed=1), 1, 1e-2)
    new = df.head(20)[['user','item']].assign(user=lambda d: d.user.where(d.index%3>0, 999))
    F = EmbeddingFeatures(l, output='only', unk=unk).fit(df[['user','item','rating']]).transform(new)
    assert F.columns[-1]=='user_item_score' and np.allclose(F.user_item_score, l.predict(new, unk=unk)[2][:,0], atol=1e-5)

@pytest.mark.parametrize('use_nn', [False,True])
def test_fastai_collab(use_nn):
    df = synth_ratings(n_users=40, n_items=30, n_ratings=500, seed=1)[['user','item','rating']]
    dls = CollabDataLoaders.from_df(df, bs=32, seed=1, device='cpu')
    learn = collab_learner(dls, n_factors=4, y_range=(0,5.5), use_nn=use_nn, layers=[10] if use_nn else None)
    ef = EmbeddingFeatures(learn, output='only').fit(df)
    F,m = ef.transform(df),learn.model
    u = list(dls.classes['user']).index(df.user.iloc[3])
    emb = m.embeds[0].weight if use_nn else m.u_weight.weight
    assert np.array_equal(F.iloc[3,:emb.shape[1]], emb[u].detach().numpy())
    assert ('user_item_score' in F)==(not use_nn)

def test_cfext_network(dot):
    df,_ = dot
    dls = CFDataLoaders.from_df(df, user_name='user', item_name='item', rating_name='rating', bs=64, seed=1)
    ef = EmbeddingFeatures(cf_learner(dls, model='nn', y_range=(0,5.5)), output='only').fit(df)
    assert not any('score' in n or 'bias' in n for n in ef.get_feature_names_out())

def test_a_module_of_ones_own(dot):
    df,learn = dot
    class Own(Module):
        def __init__(self, n_users, n_items):
            self.user_factors,self.item_factors = torch.nn.Embedding(n_users, 3),torch.nn.Embedding(n_items, 3)
        def forward(self, x): return (self.user_factors(x[:,0])*self.item_factors(x[:,1])).sum(1, keepdim=True)
    own = Learner(learn.dls, Own(learn.dls.n_users, learn.dls.n_items), loss_func=MSELossFlat())
    F = EmbeddingFeatures(own, output='only').fit(df).transform(df)
    assert F.shape==(len(df),7) and np.allclose(F.user_item_score, (F.iloc[:,:3].to_numpy()*F.iloc[:,3:6].to_numpy()).sum(1), atol=1e-6)

def test_exported_learner(learn, train, test, tmp_path):
    from fastai.learner import load_learner
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.export(tmp_path/'l.pkl')
        loaded = load_learner(tmp_path/'l.pkl')
    pd.testing.assert_frame_equal(EmbeddingFeatures(loaded).fit(train).transform(test), EmbeddingFeatures(learn).fit(train).transform(test))

# ------------------------------------------------------------------ by value, never by code

def test_dtypes_between_fit_and_transform(learn, train, test):
    ef = EmbeddingFeatures(learn, output='only').fit(train)
    want = ef.transform(test).to_numpy()
    odd = pd.CategoricalDtype(['zzz','s09',*sorted(set(test.store)-{'s09'}, reverse=True)])
    for f in (lambda d: d.assign(store=d.store.astype('category')), lambda d: d.assign(store=d.store.astype(odd)),
              lambda d: d.assign(store=d.store.astype(object)), lambda d: d.assign(day=d.day.astype('int8')),
              lambda d: d.assign(day=d.day.astype(float)), lambda d: d.assign(day=d.day.astype('Int64')),
              lambda d: d.assign(day=d.day.astype(object)), lambda d: d.assign(day=pd.Categorical(d.day, [7,6,5,4,3,2,1,0])),
              lambda d: d[['promo','y','day','store']]):
        assert np.array_equal(ef.transform(f(test)).to_numpy(), want)
    with pytest.raises(TypeError, match=r"column 'day' holds \w+ \('1'\), but its embedding is keyed by int"):
        ef.transform(test.assign(day='1'))

def test_learner_on_categories(train, test):
    "fastai gives a listed category a row even if no training row has it: nothing has trained that row"
    dt = pd.CategoricalDtype([*sorted(set(train.store)),'never'])
    learn = fit_net(train.assign(store=train.store.astype(dt)), epochs=1)
    ef = EmbeddingFeatures(learn, output='only').fit(train)
    assert 'never' in ef.tables_['store'].keys
    t = ef.tables_['store'].encode(['s03','never'])
    assert t[0]>0 and t[1]==-1
    F = ef.transform(test)
    assert np.array_equal(F.iloc[0,:4], learn.model.embeds[0].weight[list(learn.dls.classes['store']).index(test.store.iloc[0])].detach())

def test_unknown_and_missing(learn, train, test):
    new = test[:5].assign(store=['s01','nowhere',None,'s02','elsewhere'])
    na,mean = (EmbeddingFeatures(learn, output='only', unk=u).fit(train).transform(new).to_numpy()[:,:4] for u in ('na','mean'))
    w = learn.model.embeds[0].weight.detach().numpy()
    assert np.array_equal(na[1], w[0]) and np.array_equal(na[2], w[0])
    assert np.allclose(mean[1], w[1:].mean(0), atol=1e-6) and np.array_equal(mean[1], mean[2]) and np.array_equal(na[0], mean[0])
    with pytest.raises(UnknownIdError, match="3 store ids not seen in training: 'nowhere'"):
        EmbeddingFeatures(learn, unk='raise').fit(train).transform(new)
    gaps = train.assign(store=train.store.where(np.arange(len(train))%10!=3))
    learned = fit_net(gaps, epochs=1)
    got = EmbeddingFeatures(learned, output='only', unk='mean').fit(gaps).transform(new).to_numpy()[:,:4]
    assert np.array_equal(got[2], learned.model.embeds[0].weight[0].detach().numpy())  # missing was trained on, so it has a meaning
    assert not np.array_equal(got[1], got[2])

@pytest.mark.parametrize('form', ['aligned','free'])
def test_tables_of_a_diverged_fit_are_refused(train, form):
    X,y,good = train[['store','day']],train.y,means(train[['store','day','y']], target='y')
    def diverged(df, bias=False):
        t = means(df, target='y')
        factors,b = t['store'].factors.copy(),np.zeros(len(t['store'].factors), 'float32')
        (b if bias else factors)[3] = np.nan if bias else np.inf
        return {**t, 'store':EmbTable(t['store'].keys, factors, b, t['store'].counts)}
    for source in (diverged, partial(diverged, bias=True), diverged(train[['store','day','y']])):
        with pytest.raises(ValueError, match="embedding of 'store' holds NaN or infinite numbers in 1 of 31 rows: has the learner's training diverged"):
            EmbeddingFeatures(source, form=form, cv=None).fit(X.assign(y=y))
    EmbeddingFeatures(good, form=form, cv=None).fit(X)

def test_flags_of_fill_missing(train):
    gaps = train.assign(promo=train.promo.where(np.arange(len(train))%7!=3))
    learn = fit_net(gaps, epochs=1, procs=(Categorify,FillMissing,Normalize), szs=dict(store=4, day=3, promo_na=1))
    assert 'promo_na' in read_embs(learn)
    assert list(EmbeddingFeatures(learn, cv=None).fit(gaps).tables_)==['store','day']

# ------------------------------------------------------------------ out of fold

def test_each_row_from_models_that_never_saw_it(train):
    seen = []
    def spy(df):
        seen.append(set(df.row))
        return means(df[['store','day','y']], target='y')
    X = train.assign(row=np.arange(len(train)))
    F = EmbeddingFeatures(spy, cv=4, output='only').fit_transform(X.drop(columns='y'), X.y)
    assert [len(s) for s in seen]==[1500,1125,1125,1125,1125]
    ref = means(train[['store','day','y']], target='y')
    done = np.zeros(len(X), bool)
    for s in seen[1:]:
        held = np.array(sorted(set(range(1500))-s))
        tables,_ = align_tables(means(X.iloc[sorted(s)][['store','day','y']].reset_index(drop=True), target='y'), ref)
        for c in ('store','day'):
            t = tables[c]
            assert np.array_equal(F.iloc[held][[f'{c}_{i}' for i in range(3)]], t.factors[t.encode(X[c].iloc[held])])
        done[held] = True
    assert done.all()

def test_folds_of_ones_own(train):
    X,y = train[['store','day']],train.y
    groups = train.store.str[1:].astype(int)//10
    F = EmbeddingFeatures(partial(means, target='y'), cv=list(GroupKFold(3).split(X, y, groups)), output='only').fit_transform(X, y)
    store = F[[f'store_{i}' for i in range(3)]]
    assert len(store.drop_duplicates())==3  # a store is never in its own training rows: each fold's unknown
    with pytest.raises(ValueError, match='250 of 1500 rows out never or more than once|rows out never'):
        EmbeddingFeatures(partial(means, target='y'), cv=TimeSeriesSplit(5)).fit_transform(X, y)
    with pytest.raises(ValueError, match=r'GroupKFold asks for groups, .* cv=list\(GroupKFold\(...\).split\(X, y, groups\)\)'):
        EmbeddingFeatures(partial(means, target='y'), cv=GroupKFold(3)).fit_transform(X, y)
    with pytest.raises(ValueError, match='cv=5 folds need at least 5 rows, got n_samples=3: lower `cv`'):
        EmbeddingFeatures(partial(means, target='y')).fit_transform(X[:3], y[:3])
    with pytest.raises(ValueError, match='`cv` gives no folds'): EmbeddingFeatures(partial(means, target='y'), cv=[]).fit_transform(X, y)
    with pytest.raises(ValueError, match="`cv`=1 should be a whole number of at least 2"):
        EmbeddingFeatures(partial(means, target='y'), cv=1).fit_transform(X, y)

@pytest.mark.parametrize('unk', ['mean','na','raise'])
@pytest.mark.parametrize('form', ['aligned','free'])
def test_fold_without_a_category(train, unk, form):
    X = train[['store','day','y']].copy()
    X.loc[5,'store'] = 'only once'
    F = EmbeddingFeatures(partial(means, target='y'), cv=3, unk=unk, form=form, cols=['store','day']).fit_transform(X)
    assert np.isfinite(F.to_numpy(dtype=float)).all()

def test_category_columns_in_folds(train):
    cat = train.assign(store=train.store.astype('category'), day=train.day.astype('category'))
    kw = dict(cv=3, output='only')
    recipe = partial(fit_net, epochs=1)
    a,b = (EmbeddingFeatures(recipe, **kw).fit_transform(d) for d in (train,cat))
    assert np.allclose(a, b, atol=1e-5)

@pytest.mark.parametrize('form', ['aligned','free'])
def test_same_distribution_tabular(form):
    train,new = sales(3000, 3),sales(3000, 4)
    seeds = iter(range(10))
    ef = EmbeddingFeatures(lambda df: fit_net(df, seed=next(seeds), epochs=4, bs=128, lr=2e-2), cv=3, form=form, output='only', n_groups=4)
    agree(ef.fit_transform(train), ef.transform(new))
    assert (ef.agreement_.to_numpy()>.8).all()

@pytest.mark.parametrize('form', ['aligned','free'])
def test_same_distribution_dot(form):
    df = synth_ratings(n_users=300, n_items=120, n_ratings=16000, n_factors=3, seed=2)
    def recipe(d):
        dls = CFDataLoaders.from_df(d, user_name='user', item_name='item', rating_name='rating', bs=128, seed=1, valid_pct=.01)
        torch.manual_seed(len(d))
        return quiet(cf_learner(dls, n_factors=3, y_range=(0,5.5)), 5, 2e-2, wd=.05)
    old = df.sample(frac=.8, random_state=1)
    ef = EmbeddingFeatures(recipe, cv=3, form=form, output='only', n_groups=4)
    agree(ef.fit_transform(old[['user','item','rating']]), ef.transform(df.drop(old.index)[['user','item']]), tol=.2)

def agree(oof, new, tol=.25):
    "Means and spreads differ by less than `tol` of the spread; that of a vector is the mean over its axes, some of which are mostly noise"
    assert list(oof.columns)==list(new.columns)
    rms = (new.std()**2).groupby(new.columns.str.replace(r'_\d+$', '', regex=True)).transform('mean')**.5
    gap,spread = (oof.mean()-new.mean()).abs()/rms,(oof.std()-new.std()).abs()/rms
    assert (gap<tol).all() and (spread<tol).all(), pd.DataFrame(dict(gap=gap, spread=spread)).to_string()

# ------------------------------------------------------------------ leakage

def fit_by_heart(df):
    "A network that learns its rows by heart, on whole batches"
    learn = fit_net(df, epochs=0, cats=('store',), procs=(Categorify,), szs=dict(store=4))
    cats,conts,ys = (torch.cat(o) for o in zip(*learn.dls.train.new(shuffle=False, drop_last=False)))
    opt = torch.optim.Adam(learn.model.parameters(), .03)
    learn.model.train()
    for _ in range(120):
        opt.zero_grad()
        (learn.model(cats, conts)-ys).square().mean().backward()
        opt.step()
    return learn

@pytest.mark.parametrize('form', ['aligned','free'])
def test_noise_leaks_in_sample_and_not_out_of_fold(form):
    "A target of pure noise, 300 ids of two rows: chance is R2 = 0; naive features cheat on the training rows and lose on new ones"
    def noise(seed): return pd.DataFrame(dict(store=np.arange(600)%300, promo=0., y=np.random.default_rng(seed).normal(size=600).astype('float32')))
    seen,new = noise(1),noise(2)
    def r2s(cv, model):
        ef = EmbeddingFeatures(fit_by_heart, cv=cv, form=form, output='only')
        F = ef.fit_transform(seen)
        return cross_val_score(model, F, seen.y, cv=5).mean(),model.fit(F, seen.y).score(ef.transform(new), new.y)
    rf = RandomForestRegressor(30, min_samples_leaf=20, random_state=1)
    cheat,lost = r2s(None, rf)
    honest,kept = r2s(3, rf)
    assert cheat>.2 and lost<-.15, (cheat,lost)
    assert honest<.05 and -.12<kept<.05, (honest,kept)

# ------------------------------------------------------------------ alignment and the free form

def test_alignment_undoes_turn_scale_and_shift():
    rng = np.random.default_rng(0)
    ref = dict(a=EmbTable(pd.Index(range(20)), rng.normal(size=(21,4)).astype('float32'), counts=np.r_[0,rng.integers(1, 9, 20)]))
    q,_ = np.linalg.qr(rng.normal(size=(4,4)))
    keys = pd.Index(rng.permutation(20))
    rows = np.r_[0,keys.to_numpy()+1]
    moved = dict(a=EmbTable(keys, (ref['a'].factors[rows]@q*2.5-3).astype('float32'), counts=ref['a'].counts[rows]))
    back,agreement = align_tables(moved, ref)
    assert np.allclose(back['a'].factors, ref['a'].factors, atol=1e-4) and abs(agreement['a']-1)<1e-6

def test_alignment_keeps_dot_products(dot):
    tables = read_embs(dot[1])
    q,_ = np.linalg.qr(np.random.default_rng(0).normal(size=(5,5)))
    from dataclasses import replace
    moved = {c: replace(t, factors=(t.factors@q).astype('float32'), bias=t.bias+(1 if c=='user' else -1)) for c,t in tables.items()}
    back,_ = align_tables(moved, tables)
    u,i = (back[c].factors for c in ('user','item'))
    assert np.allclose(u@i.T, tables['user'].factors@tables['item'].factors.T, atol=1e-5)
    assert np.allclose(back['user'].bias, tables['user'].bias, atol=1e-5)

def test_alignment_ignores_untrained_rows_and_pads_widths():
    rng = np.random.default_rng(0)
    ref = dict(a=EmbTable(pd.Index(range(20)), rng.normal(size=(21,4)).astype('float32')))
    f = ref['a'].factors.copy()
    f[3] = 1e6
    counts = np.r_[0,np.ones(20, int)]; counts[3] = 0
    back,_ = align_tables(dict(a=EmbTable(ref['a'].keys, f, counts=counts)), ref)
    assert np.allclose(np.delete(back['a'].factors, 3, 0), np.delete(ref['a'].factors, 3, 0), atol=1e-4)
    for d in (3,6):
        wide = np.zeros((21,d), 'float32'); wide[:,:min(d,4)] = ref['a'].factors[:,:min(d,4)]
        back,agreement = align_tables(dict(a=EmbTable(ref['a'].keys, wide)), ref)
        assert back['a'].factors.shape==(21,4) and agreement['a']>.7
    with pytest.raises(ValueError, match="column 'a': the two fits have no category in common"):
        align_tables(dict(a=EmbTable(pd.Index(range(30,50)), f)), ref)

def test_free_form_knows_no_rotation():
    rng = np.random.default_rng(0)
    a,g = rng.normal(size=(13,4)).astype('float32'),rng.integers(0, 3, 12)
    q,_ = np.linalg.qr(rng.normal(size=(4,4)))
    cols = [emb_columns(EmbTable(pd.Index(range(11)), f[:12], counts=np.r_[0,np.ones(11,int)]).with_unk(), 'a', 'free', g) for f in (a,(a@q).astype('float32'))]
    assert np.allclose(cols[0], cols[1], atol=1e-5) and list(cols[0].columns)==['a_norm','a_dist0','a_dist1','a_dist2']

def test_own_group_is_told_by_no_distance():
    rng = np.random.default_rng(0)
    a,ref,g = rng.normal(size=(9,3)),rng.normal(size=(8,3)),np.array([0,0,0,1,1,1,1,2])
    d,own = group_dists(a, g, ref),group_dists(a, g)
    for r in range(8):
        for k in range(3):
            others = [i for i in range(8) if g[i]==k and i!=r] if (g==k).sum()>1 else [i for i in range(8) if i!=r]
            assert np.isclose(d[r,k], np.linalg.norm(a[r]-ref[others].mean(0)), atol=1e-5)
            assert np.isclose(own[r,k], np.linalg.norm(a[r]-a[others].mean(0)), atol=1e-5)

# ------------------------------------------------------------------ export, memory, models

def test_export(train, tmp_path):
    df = train.rename(columns={'store':'a/b'})
    ef = EmbeddingFeatures(partial(means, target='y'), cols=['a/b','day']).fit(df[['a/b','day','y']])
    for unk in ('mean','raise'):
        ef.set_params(unk=unk).fit(df[['a/b','day','y']])
        paths = ef.export(tmp_path)
        assert paths['a/b'].name=='a_b.parquet' and sorted(p.name for p in tmp_path.glob('*.parquet'))==['a_b.parquet','day.parquet']
        got,want = pd.read_parquet(paths['day']),ef.table('day')
        assert len(got)==7+(unk=='mean') and list(got.columns)==['day','day_rows','day_0','day_1','day_2']
        assert pd.api.types.is_integer_dtype(got.day.dtype) and got.day_0.dtype==np.float32 and got.day_rows[:7].sum()==1500
        assert np.array_equal(got.iloc[:7,2:].to_numpy('float32'), want.iloc[:,1:].to_numpy())
    z = np.load(ef.export(tmp_path, fmt='npz')['a/b'])
    assert z['keys'].tolist()==sorted(set(train.store)) and z['features'].dtype==np.float32 and z['features'].shape==(30,3)
    mixed = EmbeddingFeatures(dict(a=EmbTable(pd.Index([1,'x'], dtype=object), np.zeros((3,2), 'float32')))).fit(pd.DataFrame(dict(a=[1,'x'])))
    with pytest.raises(TypeError, match="has keys that are neither numbers nor text"): mixed.export(tmp_path, fmt='npz')
    assert not (tmp_path/'a.npz').exists()

def test_memory_is_the_output(learn, train):
    import tracemalloc
    n = 400_000
    X = pd.DataFrame(dict(store=np.resize(train.store.to_numpy(dtype=object), n), day=np.resize(train.day.to_numpy(), n)))
    ef = EmbeddingFeatures(learn, output='only').fit(train[['store','day','promo']])
    ef._columns,ef.n_features_in_ = ['store','day'],2
    ef.transform(X[:10])
    tracemalloc.start()
    out = ef.transform(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = out.to_numpy().nbytes
    assert size==n*7*4 and peak<size+24e6, (peak,size)

def downstream():
    yield 'forest',lambda: RandomForestRegressor(30, random_state=1)
    yield 'knn',lambda: KNeighborsRegressor(10, weights='distance')
    for name,cls,kw in (('lightgbm','LGBMRegressor',dict(n_estimators=60, verbose=-1)), ('xgboost','XGBRegressor',dict(n_estimators=60)),
                        ('catboost','CatBoostRegressor',dict(iterations=60, verbose=False, allow_writing_files=False))):
        yield name,lambda name=name,cls=cls,kw=kw: getattr(pytest.importorskip(name), cls)(**kw)

@pytest.mark.parametrize('name,model', downstream(), ids=[n for n,_ in downstream()])
def test_real_models(name, model, train, test):
    model = model()
    pipe = make_pipeline(EmbeddingFeatures(partial(fit_net, epochs=3, bs=128, lr=3e-2), cv=3), model).fit(train.drop(columns='y'), train.y)
    assert pipe.score(test.drop(columns='y'), test.y)>.7

# ------------------------------------------------------------------ bad input

def test_bad_input(learn, train, test):
    ef = EmbeddingFeatures(learn).fit(train)
    for X,msg in ((test.drop(columns='day'), r"columns \['day'\] were there at fit and are missing"),
                  (test.assign(town=1), r"columns \['town'\] were not there at fit"),
                  (test[:0], 'minimum of 1 is required'),
                  (pd.concat([test,test[['day']]], axis=1), 'column names are not unique')):
        with pytest.raises(ValueError, match=msg): ef.transform(X)
    assert len(ef.transform(test.drop(columns='y')))==len(test)  # the target may be there or not
    for kw,msg in ((dict(form='x'), "`form`='x' is not one of 'aligned', 'free'"), (dict(output='x'), "`output`='x'"), (dict(unk='x'), "`unk`='x'"),
                   (dict(n_groups=0), '`n_groups`=0'), (dict(cols=['town']), r"`cols`=\['town'\] have no embedding in the learner")):
        with pytest.raises(ValueError, match=msg): EmbeddingFeatures(learn, **kw).fit(train)
    with pytest.raises(ValueError, match="`cols`='day' is not a column of the frame"): EmbeddingFeatures(learn).fit(train.drop(columns='day'))
    with pytest.raises(ValueError, match='X has 1500 rows and y has 3'): EmbeddingFeatures(fit_net).fit(train, [1,2,3])
    with pytest.raises(ValueError, match='of one dimension'): EmbeddingFeatures(fit_net).fit(train, np.zeros((1500,2)))
    with pytest.raises(ValueError, match=r"\['store_0'\] are columns already"): EmbeddingFeatures(learn).fit(train.assign(store_0=1))
    with pytest.raises(ValueError, match='`source` is None'): EmbeddingFeatures().fit(train)
    with pytest.raises(TypeError, match='one; got int'): EmbeddingFeatures(3).fit(train)
    with pytest.raises(ValueError, match='Linear has no embedding'):
        EmbeddingFeatures(Learner(learn.dls, torch.nn.Linear(2,1), loss_func=MSELossFlat())).fit(train)
    with pytest.warns(UserWarning, match='pass a recipe'): EmbeddingFeatures(learn).fit_transform(train)

def _tab(df):
    dls = TabularDataLoaders.from_df(df.copy(), cat_names=['k'], cont_names=['p'], y_names='y', procs=[Categorify,Normalize], y_block=RegressionBlock(), valid_idx=range(40), device='cpu')
    learn = tabular_learner(dls, layers=[8])
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.1)
    return learn

def test_an_empty_cell_has_a_row_of_its_own_where_it_was_trained(tmp_path):
    "The file's empty key is what `transform` gives an empty cell; the unknown stands beside"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(k=pd.Series(rng.choice(list('abc'), 400).astype(object)).where(rng.random(400)>.3), p=rng.random(400)))
    df['y'] = (df.k.isna()*3+rng.random(400)).astype('float32')
    ef = EmbeddingFeatures(_tab(df), cv=None, output='only').fit(df)
    empty,new = (ef.transform(df[:1].assign(k=v)).to_numpy()[0] for v in (None,'new'))
    assert not np.allclose(empty, new)
    pq,npz = pd.read_parquet(ef.export(tmp_path)['k']),np.load(ef.export(tmp_path, fmt='npz')['k'])
    np.testing.assert_allclose(pq[pq.k.isna()].iloc[:,2:].to_numpy(float)[0], empty, rtol=1e-6)
    np.testing.assert_allclose(pq.attrs['unknown'], new, rtol=1e-6)
    np.testing.assert_allclose(npz['empty'], empty)
    np.testing.assert_allclose(npz['unknown'], new)
    assert pq[pq.k.isna()].k_rows.item()==df.k[40:].isna().sum()

def test_float_categories_are_found_though_fastai_makes_them_shorter():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(k=rng.choice([.1,.2,.3,2.5], 400), p=rng.random(400)))
    df['y'] = (df.k*3).astype('float32')
    ef = EmbeddingFeatures(_tab(df), cv=None, output='only', unk='raise').fit(df)
    assert len(np.unique(ef.transform(df).to_numpy(), axis=0))==4

def test_names_of_columns_that_are_numbers():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(k=rng.choice(list('abc'), 400), p=rng.random(400), y=rng.random(400).astype('float32')))
    ef = EmbeddingFeatures(_tab(df), cv=None, cols='k').fit(df.rename(columns=dict(p='p')))
    assert list(ef.transform(df).columns)==list(ef.get_feature_names_out())
    X = df[['k','p']].assign(**{'7':1.}).rename(columns={'7':7})
    ef = EmbeddingFeatures(_tab(df), cv=None).fit(X)
    assert list(ef.transform(X).columns)==list(ef.get_feature_names_out()) and '7' in ef.transform(X)

def test_cells_of_another_kind_are_told():
    "Numbers in text among numbers are unknown cells, but no newcomers"
    for keys,cells,n in ((pd.Index([7,8,9]), [7,'8','9',None], 2), (pd.Index(['7','8']), ['7',8,7.], 2)):
        t = EmbTable(keys, np.zeros((len(keys)+1,2), np.float32))
        for dtype in (object,'category'):
            with pytest.warns(UserWarning, match=rf"column 'store' holds {n} unknown cells such as .*: the known ids are \w+, these are .*: convert them with .astype"): t.encode(pd.Series(cells, dtype=dtype), 'store')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert t.encode([keys[0],'x',None] if keys.dtype!=np.int64 else [keys[0],10,None]).tolist()==[1,-1,-1]
