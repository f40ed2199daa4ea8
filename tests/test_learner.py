"The learner: what fails in fastai's works, the lesson's code runs, planted factors are found"
import sys,warnings
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import cloudpickle,numpy as np,pandas as pd,pytest,torch
from scipy.linalg import orthogonal_procrustes
from torch import nn
from fastai.collab import CollabDataLoaders,EmbeddingDotBias,collab_learner
from fastai.tabular.all import (Callback,CSVLogger,DataLoaders,EarlyStoppingCallback,Embedding,GradientClip,Learner,MSELossFlat,Module,ProgressCallback,SaveModelCallback,
    get_emb_sz,load_learner,mae,rmse,sigmoid_range)
from cfext import *

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def df(): return synth_ratings(60, 40, 1000)

def loaders(df, **kw): return CFDataLoaders.from_df(df, **{'item_name':'title', 'seed':3, 'device':'cpu', 'bs':32, **kw})
def fitted(dls, n=1, lr=0.02, **kw):
    learn = cf_learner(dls, **{'n_factors':4, 'y_range':(0.5,5.5), 'seed':0, **kw})
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(n, lr, wd=0.1)
    return learn

@pytest.mark.parametrize('model', ['dot','nn',DotProduct,EmbeddingNet,CollabNN,EmbeddingDotBias])
def test_models_by_name_and_class(df, model):
    dls = loaders(df)
    if model is EmbeddingDotBias: model = EmbeddingDotBias.from_classes(4, dls.classes, y_range=(0.5,5.5))
    learn = fitted(dls, model=model)
    df_,dec,pred = learn.predict(df[:5])
    assert pred.shape==(5,1) and torch.isfinite(pred).all() and list(df_)==['user','title','pred']
    assert len(learn.recommend([1,2,3], k=4))==12
    assert len(learn.similar_items(df.title[:2].unique(), k=3))==3*df.title[:2].nunique()

def test_predict_one_is_predict_many(df):
    learn = fitted(loaders(df))
    known = df[df.title.isin(learn.dls.classes['title'].items)]
    many = learn.predict(known)[2]
    for i in (0,7,20): assert torch.allclose(learn.predict(tuple(known.iloc[i][['user','title']]))[2], many[i], atol=1e-6)
    assert learn.predict(known[:0])[2].shape==(0,1)
    shuffled = known.sample(frac=1, random_state=0)[['rating','title','user']]
    assert torch.allclose(learn.predict(shuffled)[2], many[known.index.get_indexer(shuffled.index)], atol=1e-6)

def test_get_preds_on_one_row_and_metrics(df):
    learn = fitted(loaders(df), metrics=[rmse,mae])
    p,t = learn.get_preds(dl=learn.dls.test_dl(df[:1], with_labels=True, unk='na'))
    assert p.shape==t.shape==(1,1)
    preds,targs = learn.get_preds()
    loss,r,m = learn.validate()
    assert preds.shape==targs.shape and abs(((preds-targs)**2).mean()-loss)<1e-5 and abs(loss**0.5-r)<1e-5 and abs((preds-targs).abs().mean()-m)<1e-5
    p0,t0 = learn.get_preds(ds_idx=0)
    assert torch.equal(t0, learn.dls.train_ds.y), 'training predictions come in the order of the rows'

def test_lr_find_show_results_summary(df):
    learn = fitted(loaders(df))
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    assert learn.lr_find(show_plot=False, num_it=20).valley>0
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    learn.show_results()
    assert 'Total params' in str(learn.summary())

def test_any_fastai_callback(df, tmp_path):
    dls = loaders(df, path=tmp_path)
    learn = cf_learner(dls, n_factors=4, y_range=(0.5,5.5), cbs=[CSVLogger(), GradientClip(), SaveModelCallback(), EarlyStoppingCallback(patience=9)])
    with learn.no_bar(): learn.fit_one_cycle(2, 0.01)
    assert len(learn.csv_logger.read_log())==2 and (tmp_path/'models'/'model.pth').exists()
    with learn.no_bar(),learn.no_logging(): learn.fit_flat_cos(1); learn.fit_sgdr(1, 1)

def test_fit_without_validation_rows(df):
    learn = fitted(loaders(df, valid_pct=0))
    with pytest.raises(ValueError, match='no validation rows'): learn.evaluate()
    assert len(learn.recommend(k=2))==2*(learn.dls.n_users-1)

def test_fastais_loaders_are_taken_over(df):
    theirs = CollabDataLoaders.from_df(df, item_name='title', rating_name='rating', seed=3, bs=32, device='cpu')
    learn = fitted(theirs)
    assert isinstance(learn.dls, CFDataLoaders) and learn.dls.train.bs==32
    assert torch.isfinite(learn.predict(df[:9], unk='na')[2]).all()
    truth = dict(zip(zip(df.user, df.title), df.rating))
    f = learn.dls.valid_ds.frame((learn.dls.valid_ds.x, learn.dls.valid_ds.y))
    f = f[(f.user!='#na#')&(f.title!='#na#')]
    assert all((u,t) in truth for u,t in zip(f.user, f.title)) and len(f)>150
    with pytest.raises(TypeError, match='should be CFDataLoaders or'): cf_learner(DataLoaders())

def test_the_tutorials_code_runs(df):
    "The code of fastai's tutorial on collaborative filtering, on our loaders"
    ratings = df[['user','item','rating']].rename(columns=dict(item='movie')).merge(df[['item','title']].drop_duplicates().rename(columns=dict(item='movie')))
    dls = CFDataLoaders.from_df(ratings, item_name='title', bs=64)
    dls.show_batch()
    learn = collab_learner(dls, n_factors=50, y_range=(0, 5.5))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3, wd=0.1)
    learn.model
    g = ratings.groupby('title')['rating'].count()
    top_movies = g.sort_values(ascending=False).index.values[:30]
    movie_bias = learn.model.bias(top_movies, is_item=True)
    assert movie_bias.shape==(30,)
    mean_ratings = ratings.groupby('title')['rating'].mean()
    movie_ratings = [(b, i, mean_ratings.loc[i]) for i,b in zip(top_movies, movie_bias)]
    sorted(movie_ratings, key=lambda x: x[0])[:15]
    movie_w = learn.model.weight(top_movies, is_item=True)
    movie_pca = movie_w.pca(3)
    assert movie_w.shape==(30,50) and movie_pca.shape==(30,3)
    embs = get_emb_sz(dls)
    learn = collab_learner(dls, use_nn=True, emb_szs={'user':8,'title':4}, y_range=(0,5.5), layers=[10,5])
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3)
    assert embs[0][0]==len(dls.classes['user'])
    assert len(collab_learner(dls, n_factors=5, y_range=(0,5.5)).get_preds(dl=dls.test_dl(ratings[:7], unk='na'))[0])==7
    n_users,n_movies = len(dls.classes['user']),len(dls.classes['title'])
    class DP(Module):
        def __init__(self, n_users, n_movies, n_factors, y_range=(0,5.5)):
            self.user_factors,self.movie_factors,self.y_range = Embedding(n_users, n_factors),Embedding(n_movies, n_factors),y_range
        def forward(self, x): return sigmoid_range((self.user_factors(x[:,0])*self.movie_factors(x[:,1])).sum(dim=1), *self.y_range)
    x,y = dls.one_batch()
    learn = Learner(dls, DP(n_users, n_movies, 5), loss_func=MSELossFlat())
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(1, 5e-3)

def test_callers_objects_are_unchanged(df):
    config,cbs = dict(mean=3.),[]
    a,b = deepcopy(config),list(cbs)
    cf_learner(loaders(df), y_range=(0.5,5.5), config=config, cbs=cbs)
    assert config==a and cbs==b
    torch.manual_seed(5)
    ref = torch.rand(1)
    torch.manual_seed(5)
    cf_learner(loaders(df), seed=1)
    assert torch.equal(torch.rand(1), ref), 'a seed of its own leaves the global generator alone'

def test_seed_repeats_a_fit(df):
    def run():
        torch.manual_seed(11)
        return fitted(loaders(df), n=2).validate()[0]
    assert run()==run()

def ends(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}
def agree(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('kw', [{}, dict(fast=False), dict(model='nn', loss_func=nn.L1Loss()), dict(y_range=None, loss_func=BPRLoss())], ids=['written out','fastai','lean','ranking'])
def test_seed_of_the_learner_repeats_a_fit(df, kw):
    "Whatever torch's global generator is at; and without a seed, it decides"
    def run(at, seed=0):
        torch.manual_seed(at)
        learn = fitted(loaders(df), unk_p=0.1, **{**kw, 'seed':seed})
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
        return ends(learn)
    assert agree(run(1), run(2)) and not agree(run(1), run(1, seed=1))
    assert agree(run(1, None), run(1, None)) and not agree(run(1, None), run(2, None))

def test_id_dropout_draws_by_its_seed(df):
    a,b,free = IdDropout(0.3, seed=7),IdDropout(0.3, seed=7),IdDropout(0.3)
    outer = torch.get_rng_state()
    m = a.mask((500,2), 'cpu')
    assert torch.equal(torch.get_rng_state(), outer) and m.dtype==torch.bool and m.shape==(500,2) and 0.25<m.float().mean()<0.35
    assert torch.equal(torch.cat([b.mask((n,2), 'cpu') for n in (7,193,300)]), m), 'the same draws however the rows are cut'
    again = a.mask((500,2), 'cpu')
    assert not torch.equal(again, m), 'a second fit has masks of its own'
    c = deepcopy(b)
    assert torch.equal(c.mask((500,2), 'cpu'), again) and torch.equal(b.mask((500,2), 'cpu'), again), 'a copy goes on where it was copied'
    torch.manual_seed(5)
    m = free.mask((500,2), 'cpu')
    torch.manual_seed(5)
    assert torch.equal(free.mask((500,2), 'cpu'), m) and torch.equal(m, (torch.manual_seed(5), torch.rand(500, 2)<0.3)[1])

def test_a_learner_with_a_seed_is_copied_and_exported(df, tmp_path):
    learn = fitted(loaders(df), unk_p=0.1)
    twin = deepcopy(learn)
    for l in (learn,twin):
        with l.no_bar(),l.no_logging(): l.fit(1, 0.01)
    assert agree(ends(learn), ends(twin))
    learn.path = tmp_path
    learn.export('l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        back = load_learner(tmp_path/'l.pkl')
    assert back.id_dropout.seed==0 and agree(ends(learn), ends(back))

def test_row_weights(df):
    "Rows with weight 0 might as well not be there; a constant weight changes nothing"
    half = df.user%2==0
    d = df.assign(w=half.astype(float), two=2.)
    odd = fitted(loaders(d, weight_name='w', valid_pct=0, bs=1000), unk_p=0)
    learn = cf_learner(loaders(d, valid_pct=0, bs=1000), n_factors=4, y_range=(0.5,5.5), unk_p=0, seed=0)
    w2 = cf_learner(loaders(d, valid_pct=0, bs=1000, weight_name='two'), n_factors=4, y_range=(0.5,5.5), unk_p=0, seed=0)
    for l in (learn,w2):
        with l.no_bar(),l.no_logging(): l.fit(1, 0.01)
    assert torch.allclose(learn.model.item_factors, w2.model.item_factors, atol=1e-6)
    start = cf_learner(loaders(d, valid_pct=0), n_factors=4, y_range=(0.5,5.5), unk_p=0, seed=0).model.user_factors
    idle = torch.from_numpy(odd.dls.classes['user'].encode(d.user[~half].unique())).long()
    used = torch.from_numpy(odd.dls.classes['user'].encode(d.user[half].unique())).long()
    moved = (odd.model.user_factors-start).abs().sum(1)
    assert moved[used].min()>moved[idle].max()

def test_weighted_loss_is_the_weighted_mean(df):
    d = df.assign(w=np.linspace(0, 3, len(df)))
    learn = cf_learner(loaders(d, weight_name='w', valid_pct=0, bs=64), n_factors=4, unk_p=0, seed=0)
    losses = []
    class Grab(Callback):
        def after_loss(self): losses.append(self.learn.loss_grad.detach()*len(self.y))
    learn.add_cb(Grab())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0., wd=0.)
    ds,seen = learn.dls.train_ds,sum(losses)
    se = (learn.get_preds(ds_idx=0)[0]-ds.y)[:,0]**2
    assert abs(seen/len(ds) - (se*ds.w).sum()/ds.w.sum()) < 1e-4

def test_ratings_outside_y_range_are_counted(df):
    with pytest.warns(UserWarning, match=f'{(df.rating>4.5).sum()} of 1,000 ratings lie outside `y_range`'): cf_learner(loaders(df), y_range=(0.5,4.5))

def test_bad_models(df):
    dls = loaders(df)
    for kw,msg in ((dict(model='dott'), "`model`='dott'"), (dict(model=nn.Embedding(60,3)), r'expected \(3,1\)'), (dict(y_range=(5,1)), r'`y_range`=\(5, 1\)'),
                   (dict(model='nn', emb_szs=[(3,2),(4,2)]), '`emb_szs`'), (dict(unk_p=2), '`p`=2'),
                   *((dict(y_range=y), r'`y_range`=.* should be \(low, high\) with low < high, a little beyond the ratings') for y in (5, 'ab', (None,5), (5,))),
                   *((dict(n_factors=n, model=m), '`n_factors`=.* should be a whole number of at least 1') for n in (0,-1,2.5,None) for m in ('dot',DotProduct,LightGCN)),
                   (dict(model='nn', emb_szs=5), r'`emb_szs`=5 should be \(\('), (dict(model='nn', emb_szs={'user':0}), r"`emb_szs\['user'\]`=0 should be a whole number of at least 1"),
                   (dict(model='nn', emb_szs=((61,0),(41,0))), '`emb_szs`=')):
        with pytest.raises(ValueError, match=msg): cf_learner(dls, **kw)

def test_unknown_users_meet_the_policy(df):
    learn = fitted(loaders(df), n=3, unk_p=0.1)
    t = learn.dls.classes['title'][1]
    with pytest.raises(UnknownIdError): learn.predict((999,t))
    row0 = learn.model.user_factors[0].clone()
    na,mean = (learn.predict((999,t), unk=u)[2] for u in ('na','mean'))
    assert torch.equal(learn.model.user_factors[0], row0)
    U,b = learn.model.user_factors[1:].mean(0),learn.model.user_bias[1:].mean()
    assert torch.allclose(mean[0,0], sigmoid_range(U@learn.model.item_factors[1]+b+learn.model.item_bias[1,0], 0.5, 5.5), atol=1e-5)
    assert not torch.equal(na, mean)
    same = learn.predict((df.user[0],t), unk='mean')[2]
    assert torch.allclose(same, learn.predict((df.user[0],t))[2], atol=1e-6), 'known ids are not touched by the policy'

@pytest.mark.parametrize('model', ['dot',LightGCN])
def test_policies_for_unknown_users_from_threads(df, model):
    "Some ask for the mean while others ask for the trained row"
    learn = fitted(loaders(df), n=2, unk_p=.1, model=model)
    learn.remove_cbs(ProgressCallback)
    t = learn.dls.classes['title'][1]
    ask = lambda unk: (learn.recommend([999], k=3, unk=unk).score.tolist(), learn.predict((999,t), unk=unk)[2].tolist())
    policies,old = ('na','mean'),sys.getswitchinterval()
    want,cbs = [ask(o) for o in policies],list(learn.cbs)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as ex: got = list(ex.map(ask, policies*40))
    finally: sys.setswitchinterval(old)
    assert want[0]!=want[1] and got==want*40 and [ask(o) for o in policies]==want
    assert {id(o) for o in learn.cbs}=={id(o) for o in cbs} and all(cb.learn is learn for cb in cbs)

def test_columns_in_place_of_pairs(df):
    learn = fitted(loaders(df))
    u,t = df.user.to_numpy()[:2],df.title.to_numpy()[:2]
    for cols in ((u,t), (torch.tensor(u),t), (pd.Index(u),pd.Index(t))):
        with pytest.raises(ValueError, match=r'expected pairs \(user, title\), got a tuple of .*: pass a frame, or list\(zip'): learn.predict(cols)
    assert torch.equal(learn.predict(list(zip(u, t)))[2], learn.predict(df[:2])[2])

def test_predictions_beside_training(df):
    "They switch no mode, move no tensor, and do not wait for a lock that a training thread holds"
    learn = fitted(loaders(df), model='nn')
    learn.remove_cbs(ProgressCallback)
    learn.model.train()
    want,p = learn.predict(df[:5])[2],learn.model.layers[0].weight if hasattr(learn.model, 'layers') else next(learn.model.parameters())
    assert all(m.training for m in learn.model.modules())
    modes,go = [],True
    class Look(Callback):
        def after_pred(self):
            if self.training: modes.append(self.learn.model.training)
    def ask():
        while go: assert learn.predict(df[:5])[2].isfinite().all()
    with ThreadPoolExecutor(2) as ex:
        jobs = [ex.submit(ask) for _ in range(2)]
        try:
            with learn.no_bar(),learn.no_logging(): learn.fit(3, 1e-3, cbs=Look())
        finally: go = False
        for j in jobs: j.result(60)
    assert len(modes)==3*len(learn.dls.train) and all(modes)
    with learn.lock: assert learn.predict(df[:5])[2].shape==want.shape

def test_callbacks_that_have_a_say_in_predictions_are_asked(df):
    "On the learner itself; beside a model with a mean row as copies, with what they leave out of a pickle"
    class Say(Callback):
        def __init__(self): self.out,self.n = open,0
        def __getstate__(self): return {}
        def after_pred(self):
            assert self.out is open
            self.n,self.learn.pred = self.n+1,self.pred+1
    learn = fitted(loaders(df))
    new = (9999,df.title[0])
    want,mean = learn.predict(df[:5])[2],learn.predict(new, unk='mean')[2]
    learn.add_cb(Say())
    torch.testing.assert_close(learn.predict(df[:5])[2], want+1)
    torch.testing.assert_close(learn.predict(new, unk='mean')[2], mean+1)
    assert learn.cbs[-1].learn is learn and learn.cbs[-1].n==1

@pytest.mark.parametrize('make', [lambda d: cf_learner(d, seed=1), lambda d: cf_learner(d, 'nn', seed=1), lambda d: cf_learner(d.positives(4), DotProduct, loss_func=BPRLoss(), seed=1),
                                  lambda d: cf_learner(d.positives(4), DotProduct, loss_func=BCELoss(), seed=1), lambda d: cf_learner(d, LightGCN, seed=1), lambda d: cf_learner(d.positives(4), EASE(d.positives(4)))],
                         ids=['dot','nn','bpr','bce','lightgcn','ease'])
def test_predictions_are_those_of_fastais_loop(df, make):
    "Row by row as at once, without a loop of anybody"
    learn = make(loaders(df))
    learn.remove_cbs(ProgressCallback)
    rows = df[:50]
    got = learn.predict(rows)[2]
    with learn.no_bar(): want = learn.get_preds(dl=learn.dls.test_dl(rows))[0]
    torch.testing.assert_close(got, want.reshape(50, 1))
    torch.testing.assert_close(torch.cat([learn.predict(rows[i:i+1])[2] for i in range(3)]), got[:3])

def test_predictions_of_a_loaded_learner_build_nothing_anew(df, tmp_path, monkeypatch):
    made = []
    for model,loss in ((DotProduct,BPRLoss()), (LightGCN,BPRLoss())):
        cf_learner(loaders(df).positives(4), model, loss_func=loss, seed=1).save_bundle(tmp_path/model.__name__)
        learn = load_bundle(tmp_path/model.__name__)
        learn.predict(df[:1])
        monkeypatch.setattr('cfext.negatives.NegativeSampler.__init__', lambda self, *a, **k: made.append('sampler'))
        monkeypatch.setattr(LightGCN, 'build', lambda self, *a: made.append('tables'))
        for _ in range(3): learn.predict(df[:1])
        monkeypatch.undo()
    assert made==[]

class Plain(nn.Module):
    def __init__(self, n_users, n_items):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.user_factors,self.item_factors = (nn.Parameter(torch.randn(n, 3, generator=g)) for n in (n_users, n_items))
        self.drop = nn.Dropout(.5)
    def forward(self, x): return self.drop((self.user_factors[x[:,0]]*self.item_factors[x[:,1]]).sum(1, keepdim=True))

def test_predictions_of_compiled_scripted_and_odd_models(df):
    class Held(Plain):
        "Tables that are no parameters, a method kept as an attribute"
        def __init__(self, *n):
            super().__init__(*n)
            u = self.user_factors.detach().clone()
            del self.user_factors
            self.user_factors,self.f = u,self._f
        def _f(self, x): return super().forward(x)
        def forward(self, x): return self.f(x)
    class View(Plain):
        "Tables that are made each time"
        def __init__(self, *n):
            super().__init__(*n)
            self.W = nn.Parameter(self.user_factors.detach().clone())
            del self.user_factors
        @property
        def user_factors(self): return self.W[:]
    dls,x = loaders(df),(9999,df.title[0])
    sizes = dls.n_users,dls.n_items
    plain = cf_learner(dls, Plain(*sizes), unk_p=0)
    rows,mean = plain.predict(df[:5])[2],plain.predict(x, unk='mean')[2]
    for m in (torch.compile(Plain(*sizes), backend='eager'), Held(*sizes), View(*sizes), torch.jit.script(Plain(*sizes))):
        learn = CFLearner(dls, m, loss_func=MSELossFlat())
        torch.testing.assert_close(learn.predict(df[:5])[2], rows)
        if isinstance(m, (View,torch.jit.ScriptModule)):
            with pytest.raises(ValueError, match='no row of them can be replaced'): learn.predict(x, unk='mean')
        else: torch.testing.assert_close(learn.predict(x, unk='mean')[2], mean)

def test_known_ids_keep_their_digits_beside_a_missing_one():
    u = 2**60+1
    learn = cf_learner(CFDataLoaders.from_df(pd.DataFrame(dict(user=[u,u,2,2], item=[1,2,1,2], rating=[1.,2,3,4])), valid_pct=0, device='cpu'))
    assert learn.predict(pd.DataFrame(dict(user=pd.array([u,None], dtype='Int64'), item=[1,1])), unk='na')[0].user[0]==u

def test_planted_factors_are_found():
    "Item factors recover the planted ones up to a linear map's rotation (Procrustes), biases follow the planted biases"
    df,truth = synth_ratings(400, 120, 24_000, n_factors=3, noise=0.3, step=None, seed=1, with_truth=True)
    dls = CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu', bs=256)
    learn = cf_learner(dls, n_factors=3, y_range=(0,6), seed=1)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(25, 0.03, wd=0.02)
    codes = dls.classes['title'].encode(truth['titles'])
    known = codes>0
    Q,T = learn.model.item_factors.detach().numpy()[codes[known]],truth['item_factors'][known]
    Q,T = Q-Q.mean(0),T-T.mean(0)
    Q,T = Q/np.linalg.norm(Q),T/np.linalg.norm(T)
    R,scale = orthogonal_procrustes(Q, T)
    rng = np.random.default_rng(0)
    N = rng.normal(size=Q.shape); N /= np.linalg.norm(N)
    chance = orthogonal_procrustes(N, T)[1]
    assert scale**2>0.8 and chance**2<0.2, (scale, chance)
    # what the item's own constant effect on the mean user is: its bias and its factors along the mean user
    eff = truth['item_bias']+truth['item_factors']@truth['user_factors'].mean(0)
    ours = learn.model.item_bias.detach().numpy()[codes[known],0]+learn.model.item_factors.detach().numpy()[codes[known]]@learn.model.user_factors[1:].detach().numpy().mean(0)
    assert np.corrcoef(eff[known], ours)[0,1]>0.9

def test_export_still_works(df, tmp_path):
    learn = fitted(loaders(df, path=tmp_path))
    p = learn.predict(df[:5], unk='na')[2]
    learn.export('m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'m.pkl')
    assert torch.allclose(again.predict(df[:5], unk='na')[2], p)

@pytest.mark.parametrize('fast', [None,False])
@pytest.mark.parametrize('loss_func', [None,BPRLoss()])
def test_losses_of_weighted_rows_are_one_a_row(df, fast, loss_func):
    from fastai.interpret import Interpretation
    learn = fitted(loaders(df.assign(w=1.+df.user%3), weight_name='w', unk='na'), fast=fast, loss_func=loss_func)
    with learn.no_bar():
        p,y,loss = learn.get_preds(with_loss=True)
        assert loss.shape==y[:,0].shape and loss.mean().item()==pytest.approx(learn.validate()[0], rel=1e-5)
        w = learn.dls.valid_ds.w/learn.dls.train_ds.w.mean()
        if loss_func is None: assert torch.allclose(loss, ((p-y)**2)[:,0]*w, atol=1e-6)
        top,at = Interpretation.from_learner(learn).top_losses(4)
    assert torch.equal(loss[at], top) and top[0]==loss.max()

def test_an_export_leaves_the_learner_as_it_was(df, tmp_path):
    learn = fitted(loaders(df, path=tmp_path), splitter=lambda m: [[m.user_factors,m.user_bias], [m.item_factors,m.item_bias]])
    learn.freeze()
    dls,opt = learn.dls,learn.opt
    for fname in ('m.pkl', 'no such folder/m.pkl'):
        try: learn.export(fname, cloudpickle, 2)
        except RuntimeError: assert '/' in fname
        assert learn.dls is dls and learn.opt is opt and opt.frozen_idx==1

def test_what_cannot_be_trained_is_told_before_it_is():
    small,big = (CFDataLoaders.from_df(synth_ratings(n, 40, 600), item_name='title', seed=0, device='cpu') for n in (30,50))
    with pytest.raises(ValueError, match=r"`emb_szs` names 'usr'; the columns are 'user', 'title'"): cf_learner(small, 'nn', emb_szs={'usr':5})
    with pytest.raises(ValueError, match='made for 30 users, the loaders know 50'): cf_learner(big, cf_learner(small, n_factors=3).model)
    learn = cf_learner(small, n_factors=3)
    learn.dls = big
    for f in (lambda: learn.fit(1), learn.validate, learn.get_preds):
        with pytest.raises(ValueError, match='made for 30 users, the loaders know 50'): f()
    learn.dls = small
    learn.fit(1)
    bare = cf_learner(CFDataLoaders(small.train.new(small.train_ds.subset(slice(0, 0))), small.valid, device='cpu'), learn.model)
    with pytest.raises(ValueError, match='there are no training rows'): bare.fit(1)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_spare_rows_train():
    dls = CFDataLoaders.from_df(synth_ratings(30, 40, 600), item_name='title', seed=0, device='cpu')
    learn = cf_learner(dls, DotProductBias(dls.n_users+5, dls.n_items+7, 3))
    learn.fit(1)
    with pytest.raises(ValueError, match='made for 35 users, the loaders know 30'): learn.recommend(k=2)

def test_unknown_ids_come_back_as_they_were_asked(df):
    learn = cf_learner(loaders(df, item_name='item'), n_factors=4)
    rows = pd.DataFrame(dict(user=[df.user[0],-5,-6,df.user[1]], item=[99_999,df['item'][0],88_888,df['item'][1]]), index=[3,1,3,7])
    copy = rows.copy()
    for unk in ('na','mean'):
        for asked in (rows, list(rows.itertuples(index=False, name=None)), rows.to_dict('list'), rows.astype(dict(user='category'))):
            out = learn.predict(asked, unk=unk)[0]
            assert out[['user','item']].to_numpy().tolist()==rows.to_numpy().tolist() and list(out)==['user','item','pred'] and out.pred.notna().all()
        assert learn.predict(rows, unk=unk)[0].dtypes.tolist()==rows.dtypes.tolist()+['float32']
    assert learn.predict(('Ann','Jaws'), unk='na')[0].iloc[0,:2].tolist()==['Ann','Jaws']
    pd.testing.assert_frame_equal(rows, copy)

@pytest.mark.parametrize('make', [lambda d: d, EASE])
def test_an_export_keeps_what_loaders_know(df, make, tmp_path):
    dls = CFDataLoaders.from_df(df, seed=0, unk='mean', device='cpu').positives(4)
    model = make(dls)
    learn = cf_learner(dls, 'dot' if model is dls else model, n_factors=3, loss_func=BPRLoss(), path=tmp_path)
    n = len(learn.dls.train_ds)
    learn.export('l.pkl')
    assert len(learn.dls.train_ds)==n
    back = load_learner(tmp_path/'l.pkl')
    assert (back.dls.unk,back.dls.at_least,back.dls.also_seen)==('mean',4,(None,None)) and not len(back.dls.train_ds)
    user = df.user.iloc[0]
    a,b = (l.recommend([user], 5, exclude_seen=False) for l in (learn,back))
    pd.testing.assert_frame_equal(a, b)

def test_summary_counts_parameters_that_lie_in_no_layer(df):
    learn = cf_learner(CFDataLoaders.from_df(df, device='cpu'), n_factors=3)
    learn.model.user_bias.requires_grad_(False)
    n,m = sum(p.numel() for p in learn.model.parameters()),learn.model.user_bias.numel()
    with learn.no_bar(): res = learn.summary()
    assert all(o in res for o in (f'Total params: {n:,}\n', f'Total trainable params: {n-m:,}\n', f'Total non-trainable params: {m:,}\n'))
