"Bundles: the same predictions, whole or not at all, no code from the file"
import ast,json,os,pickle,subprocess,sys,warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np,pandas as pd,pytest,torch
from torch import nn
from cfext import *
from cfext import bundle as B
from cfext.core import whole_file
from conftest import root

pytestmark = pytest.mark.usefixtures('quiet')

def make(model='dot', df=None, **kw):
    df = synth_ratings(60, 40, 1000) if df is None else df
    learn = cf_learner(CFDataLoaders.from_df(df, **{'item_name':'title', 'seed':3, 'device':'cpu', 'bs':32, **kw}), model, n_factors=4, y_range=(0.5,5.5), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.01)
    return learn

@pytest.mark.parametrize('model', ['dot','nn',DotProduct,EmbeddingNet])
def test_reloaded_is_before_saving(model, tmp_path):
    learn = make(model)
    learn.save_bundle(tmp_path/'b')
    again = load_bundle(tmp_path/'b', device='cpu')
    df = synth_ratings(60, 40, 1000)
    assert torch.equal(again.predict(df, unk='na')[2], learn.predict(df, unk='na')[2])
    pd.testing.assert_frame_equal(again.recommend(k=5), learn.recommend(k=5))
    pd.testing.assert_frame_equal(again.evaluate(k=5), learn.evaluate(k=5))
    again.save_bundle(tmp_path/'c')
    assert {o.name for o in (tmp_path/'b').iterdir()}=={o.name for o in (tmp_path/'c').iterdir()}, 'saving again writes the same bytes'

solved = dict(EASE=lambda d: EASE(d, 20.), ItemKNN=lambda d: ItemKNN(d, k=5), IALS=lambda d: IALS(d, 4, n_iter=2), Popularity=Popularity,
              LightGCN=lambda d: LightGCN.from_dls(d, n_factors=4, n_layers=2), CosineProduct=lambda d: CosineProduct.from_dls(d, n_factors=4))

@pytest.mark.parametrize('name', solved)
def test_models_for_lists(name, tmp_path):
    dls = CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', rating_name=None, seed=3, device='cpu', bs=32)
    learn = cf_learner(dls, solved[name](dls), loss_func=SampledSoftmaxLoss(0.5), cbs=Negatives(7, seed=1))
    learn.save_bundle(tmp_path/'b')
    again = load_bundle(tmp_path/'b', device='cpu')
    assert type(again.model) is type(learn.model)
    pd.testing.assert_frame_equal(again.recommend(k=5), learn.recommend(k=5))
    if name!='Popularity': pd.testing.assert_frame_equal(again.evaluate(k=5), learn.evaluate(k=5))
    again.save_bundle(tmp_path/'c')
    assert {o.name for o in (tmp_path/'b').iterdir()}=={o.name for o in (tmp_path/'c').iterdir()}
    users,bare = torch.arange(9),tmp_path/'bare'
    if name in ('EASE','ItemKNN'):
        with pytest.raises(ValueError, match='scores users by their rows'): learn.save_bundle(bare, history=False)
        assert not bare.exists()
        return
    less = load_bundle(learn.save_bundle(bare, history=False), device='cpu')
    assert not any(k in less.model.state_dict() for k in ('starts','items')) and not len(less.dls.train_ds)
    with torch.no_grad(): torch.testing.assert_close(less.model.eval().score_items(users), learn.model.eval().score_items(users))

all_losses = [BPRLoss(), HingeLoss(0.5), WARPLoss(2., reduction='sum'), BCELoss(), FullSoftmaxLoss(0.3), SampledSoftmaxLoss(0.2), CCLLoss(0.1, 3.)]

@pytest.mark.parametrize('loss', all_losses, ids=lambda o: type(o).__name__)
def test_a_ranking_loss_and_its_negatives_come_back(loss, tmp_path):
    dls = CFDataLoaders.from_df(synth_ratings(60, 40, 1000), item_name='title', seed=3, device='cpu', bs=32).positives(3)
    learn = cf_learner(dls, CosineProduct, n_factors=4, loss_func=loss, cbs=Negatives(6, 'popularity', alpha=0.5, shared=True, seed=4), seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.05)
    learn.save_bundle(tmp_path)
    again = load_bundle(tmp_path, device='cpu')
    assert type(again.loss_func) is type(loss) and again.loss_func.config==loss.config
    cb = again.negatives
    assert (cb.n_neg, cb.how, cb.seed, cb.kwargs)==(6, 'popularity', 4, dict(alpha=0.5, shared=True))
    assert again.validate()==learn.validate()
    pd.testing.assert_frame_equal(again.recommend(k=30), learn.recommend(k=30))
    for a,b in zip(again.dls.also_seen, dls.also_seen): assert torch.equal(a, b)
    with again.no_bar(),again.no_logging(): again.fit(1, 0.05)

@pytest.mark.parametrize('f', [lambda s: s, lambda s: s.map('ü{}'.format), lambda s: s.astype('category'), lambda s: s.astype('Int64'),
    lambda s: s.map('u{}'.format).astype('string[pyarrow]'), lambda s: s/2, lambda s: s.map(lambda o: o if o%2 else str(o)).astype(object)])
def test_ids_of_any_kind(f, tmp_path):
    df = synth_ratings(60, 40, 1000)
    df = df.assign(user=f(df.user))
    learn = make(df=df)
    learn.save_bundle(tmp_path)
    again = load_bundle(tmp_path, device='cpu')
    assert torch.equal(again.predict(df, unk='na')[2], learn.predict(df, unk='na')[2])

def test_trains_on_after_loading(tmp_path):
    learn = make()
    learn.save_bundle(tmp_path)
    again = load_bundle(tmp_path, device='cpu')
    with again.no_bar(),again.no_logging(): again.fit_one_cycle(3, 0.03)
    assert again.recorder.values[-1][1]<learn.validate()[0]

def test_answers_switch_no_mode(tmp_path):
    "A thread that would put dropout on again while another one scores would spoil its scores"
    again,modes = load_bundle(make(EmbeddingNet).save_bundle(tmp_path), device='cpu'),[]
    class Spy(type(again.model)):
        def train(self, mode=True):
            modes.append(mode)
            return super().train(mode)
        def __setattr__(self, k, v):
            if k=='training': modes.append(v)
            super().__setattr__(k, v)
    assert not any(m.training for m in again.model.modules())
    again.model.__class__ = Spy
    u,i = again.dls.classes['user'][1],again.dls.classes['title'][1]
    again.recommend([u,999], k=3, unk='mean'), again.predict((u,i)), again.explain(u, i), again.similar_items(i)
    assert modes and not any(modes) and not any(m.training for m in again.model.modules())

def test_a_model_of_ones_own(tmp_path):
    class Mine(nn.Module):
        def __init__(self): super().__init__(); self.i = nn.Parameter(torch.randn(41,1))
        def forward(self, x): return self.i[x[:,1]]
    learn = make(Mine())
    learn.save_bundle(tmp_path)
    with pytest.raises(BundleError, match="model is Mine, which is not one of cfext's"): load_bundle(tmp_path)
    m = Mine()
    df = synth_ratings(60, 40, 1000)
    assert torch.equal(load_bundle(tmp_path, model=m, device='cpu').predict(df, unk='na')[2], learn.predict(df, unk='na')[2])
    with pytest.raises(BundleError, match='do not fit Linear'): load_bundle(tmp_path, model=nn.Linear(2,1))

def test_crash_while_saving_leaves_the_old_bundle(tmp_path, monkeypatch):
    learn = make()
    learn.save_bundle(tmp_path)
    df = synth_ratings(60, 40, 1000)
    before = load_bundle(tmp_path, device='cpu').predict(df, unk='na')[2]
    with torch.no_grad(): learn.model.item_bias.add_(1)
    real = os.replace
    def fail(n):
        calls = []
        def _inner(a, b):
            calls.append(b)
            if len(calls)==n: raise OSError('disk full')
            return real(a, b)
        return _inner
    for n in (1,2,3):
        monkeypatch.setattr(os, 'replace', fail(n))
        with pytest.raises(OSError, match='disk full'): learn.save_bundle(tmp_path)
        monkeypatch.setattr(os, 'replace', real)
        assert torch.equal(load_bundle(tmp_path, device='cpu').predict(df, unk='na')[2], before)
        assert not [o for o in tmp_path.iterdir() if o.name.startswith(('.','tmp'))], 'no half-written file is left'
    learn.save_bundle(tmp_path)
    assert not torch.equal(load_bundle(tmp_path, device='cpu').predict(df, unk='na')[2], before) and len(list(tmp_path.iterdir()))==3

def test_a_bundle_json_of_something_else_is_left_alone(tmp_path):
    mine = dict(kind='web bundle', files=dict(main=dict(name='thesis.tex')))
    (tmp_path/'bundle.json').write_text(json.dumps(mine))
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(BundleError, match='bundle.json is not the manifest of a bundle; .*give another'): make().save_bundle(tmp_path)
    assert json.loads((tmp_path/'bundle.json').read_text())==mine and (tmp_path/'thesis.tex').read_text()=='years of work' and len(list(tmp_path.iterdir()))==2

@pytest.mark.parametrize('step', ['_digest','load_file'])
def test_a_bundle_that_is_replaced_while_it_is_read(step, tmp_path, monkeypatch):
    "The files of the old one go while they are read: the new one is read instead"
    old,new,real,calls = make(),make(),getattr(B, step),[]
    with torch.no_grad(): new.model.item_bias.add_(1)
    old.save_bundle(tmp_path)
    def _inner(f):
        calls.append(f)
        if len(calls)==1:
            monkeypatch.setattr(B, step, real)
            new.save_bundle(tmp_path)
            monkeypatch.setattr(B, step, _inner)
        return real(f)
    monkeypatch.setattr(B, step, _inner)
    again = load_bundle(tmp_path, device='cpu')
    assert torch.equal(again.model.item_bias, new.model.item_bias) and len(calls)>1

def test_writers_at_the_same_place(tmp_path):
    "They remove what older bundles held, and never what the one that stands holds"
    learns = [make() for _ in range(3)]
    for j,l in enumerate(learns):
        with torch.no_grad(): l.model.item_bias.add_(j)
    with ThreadPoolExecutor(3) as ex: list(ex.map(lambda j: learns[j%3].save_bundle(tmp_path), np.random.default_rng(0).integers(0, 3, 150).tolist()))
    load_bundle(tmp_path, device='cpu')
    learns[0].save_bundle(tmp_path)
    assert torch.equal(load_bundle(tmp_path, device='cpu').model.item_bias, learns[0].model.item_bias)

def test_a_bundle_that_lacks_a_file_is_read_once(tmp_path, monkeypatch):
    calls,real = [],B._manifest
    next(make().save_bundle(tmp_path).glob('ids-*')).unlink()
    monkeypatch.setattr(B, '_manifest', lambda p: calls.append(p) or real(p))
    with pytest.raises(BundleError, match='is missing'): load_bundle(tmp_path)
    assert len(calls)==1

def write(path, text='new'):
    with whole_file(path) as f: f.write_text(text)
    return path

def test_whole_files_of_long_names(tmp_path):
    for name in ('x'*251+'.csv', '\u00fc'*125+'.csv', 'no_suffix'*28): assert write(tmp_path/name).read_text()=='new'
    assert len(list(tmp_path.iterdir()))==3

def test_a_file_that_another_writer_removes_meanwhile(tmp_path, monkeypatch):
    path,real = write(tmp_path/'a.txt', 'old').resolve(),Path.stat
    def stat(self, **kwargs):
        res = real(self, **kwargs)
        if self==path: path.unlink()
        return res
    with monkeypatch.context() as m:
        m.setattr(Path, 'stat', stat)
        write(path)
    assert path.read_text()=='new'

def test_a_link_stays_a_link(tmp_path):
    (tmp_path/'there').mkdir()
    for target,link in ((tmp_path/'there'/'a.txt', tmp_path/'a.txt'), (tmp_path/'there'/'not yet.txt', tmp_path/'b.txt')):
        if target.name=='a.txt': target.write_text('old')
        link.symlink_to(target)
        write(link)
        assert link.is_symlink() and target.read_text()=='new'
    (tmp_path/'linked').symlink_to(tmp_path/'there')
    write(tmp_path/'linked'/'c.txt')
    assert (tmp_path/'linked').is_symlink() and {o.name for o in (tmp_path/'there').iterdir()}=={'a.txt','not yet.txt','c.txt'}

@pytest.mark.parametrize('umask,old,want', [(0o022,None,0o644), (0o077,None,0o600), (0o077,0o644,0o644), (0o022,0o600,0o600), (0o022,0o664,0o664)])
def test_permissions_are_those_there_were_or_the_processs_own(tmp_path, umask, old, want):
    f = tmp_path/'f.txt'
    if old is not None: (f.write_text('old'), f.chmod(old))
    was = os.umask(umask)
    try: write(f)
    finally: os.umask(was)
    assert f.stat().st_mode&0o777==want

def test_spoiled_bundles(tmp_path):
    learn = make()
    def spoil(stem, text):
        learn.save_bundle(tmp_path/'b')
        f = next(o for o in (tmp_path/'b').iterdir() if o.name.startswith(stem))
        f.unlink() if text is None else f.write_text(text) if isinstance(text, str) else f.write_bytes(f.read_bytes()[:text])
    for stem,text,msg in (('bundle', None, 'holds no bundle'), ('bundle', 40, 'not readable as JSON'), ('bundle', '[]', 'is not the manifest'),
                          ('bundle', '{"kind":"cfext bundle","format":2}', 'has format 2.*upgrade cfext'), ('ids', 50, 'checksum differs'),
                          ('tensors', 999, 'checksum differs'), ('tensors', None, 'is missing')):
        spoil(stem, text)
        with pytest.raises(BundleError, match=msg): load_bundle(tmp_path/'b')
    with pytest.raises(BundleError, match='holds no bundle'): load_bundle(tmp_path/'nowhere')
    (tmp_path/'f').write_text('x')
    with pytest.raises(BundleError, match='is a file; expected a folder'): learn.save_bundle(tmp_path/'f')
    with pytest.raises(BundleError, match="f is a file; expected the bundle's folder, as"): load_bundle(tmp_path/'f')

def test_a_manifest_that_lacks_something_or_holds_the_wrong_kind(tmp_path):
    "Whatever is done to an entry of `bundle.json`, a `BundleError` names it, or the learner loads"
    f = make().save_bundle(tmp_path/'b')/'bundle.json'
    good = json.loads(f.read_text())
    def load(change):
        d = json.loads(json.dumps(good))
        change(d)
        f.write_text(json.dumps(d))
        return load_bundle(tmp_path/'b', device='cpu')
    load(lambda d: None)
    inside = lambda d,at: d if not at else inside(d[at[0]], at[1:])
    places = [(),('files',),('files','ids'),('files','tensors'),('model',)]
    for at in places:
        for k in inside(good, at):
            with pytest.raises(BundleError, match='is not the manifest' if k=='kind' else f'lacks {k}'): load(lambda d: inside(d, at).pop(k))
            for v in (None,'x',3,-1,.5,[],{},['x']):
                if type(v) is type(inside(good, at)[k]) or (k,v)==('rating_name',None) or (k,type(v)) in (('rating_name',str),('unk_p',float)): continue
                if k in ('rating_name','config') and (k=='rating_name' and isinstance(v, (int,float)) or v is None): continue
                with pytest.raises(BundleError): load(lambda d: inside(d, at).update({k:v}))
    for change,msg in ((dict(unk='all'), "`unk`='all' is not one of"), (dict(unk_p=3), '`p`=3 should be a probability'), (dict(bs=0), '`bs`=0 should be'),
                       (dict(user_name='usr'), "is not of the columns 'usr' and 'title'"), (dict(loss_args=dict(far=1)), "MSELoss does not take `loss_args`={'far': 1}"),
                       (dict(loss='Odd'), 'was trained with Odd'), (dict(negatives=3), 'does not take 3')):
        with pytest.raises(BundleError, match=msg): load(lambda d: d.update(change))
    for change in (dict(n_users=5), dict(far=5), dict(y_range='x')):
        with pytest.raises(BundleError, match='do not make a DotProductBias of its arguments'): load(lambda d: d['model']['config'].update(change))
    with pytest.raises(BundleError, match='do not make a DotProductBias'): load(lambda d: d['model']['config'].pop('n_users'))
    with pytest.raises(BundleError, match='do not make a DotProductBias'): load(lambda d: d['model'].update(config=None))

def test_a_name_in_the_manifest_cannot_leave_the_folder(tmp_path):
    make().save_bundle(tmp_path/'b')
    f = tmp_path/'b'/'bundle.json'
    d = json.loads(f.read_text())
    (tmp_path/'secret.json').write_text('{}')
    d['files']['ids'] = dict(name='../secret.json', sha256=d['files']['ids']['sha256'])
    f.write_text(json.dumps(d))
    with pytest.raises(BundleError, match='is missing'): load_bundle(tmp_path/'b')

def pickle_uses(tree):
    "What in a module's code reads or writes pickles: imports, names, `allow_pickle` not False, `torch.load` of more than weights"
    bad = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'read_pickle', 'to_pickle', 'load_pickle', 'save_pickle', 'load_learner'}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names if a.name.split('.')[0] in bad)
        elif isinstance(n, ast.ImportFrom): yield from (a.name for a in n.names if a.name in bad or (n.module or '').split('.')[0] in bad)
        elif isinstance(n, ast.Name) and n.id in bad: yield n.id
        elif isinstance(n, ast.Attribute) and n.attr in bad: yield n.attr
        elif isinstance(n, ast.Call):
            kw = {k.arg:getattr(k.value, 'value', None) for k in n.keywords}
            if kw.get('allow_pickle', False) is not False: yield 'allow_pickle'
            if ast.unparse(n.func)=='torch.load' and kw.get('weights_only') is not True: yield 'torch.load'

def test_no_pickle_anywhere():
    for p in (root/'cfext').glob('*.py'): assert not [*pickle_uses(ast.parse(p.read_text()))], p.name

@pytest.mark.parametrize('code', ['import pickle', 'from joblib import dump', 'pd.read_pickle(f)', 'torch.load(f)', 'torch.load(f, weights_only=ok)',
                                  'np.load(f, allow_pickle=True)'])
def test_pickle_would_be_seen(code): assert [*pickle_uses(ast.parse(code))]

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_predictions_on_another_device(tmp_path):
    learn = make()
    learn.save_bundle(tmp_path)
    df = synth_ratings(60, 40, 1000)
    there = load_bundle(tmp_path, device='cuda').predict(df, unk='na')[2]
    torch.testing.assert_close(there.cpu(), learn.predict(df, unk='na')[2], rtol=1e-5, atol=1e-5)

def test_bundles_that_could_be_saved_can_be_loaded(tmp_path):
    "Ids beyond int64, columns that are numbers, a threshold"
    df = synth_ratings(60, 40, 800)[['user','item','rating']]
    huge = df.assign(user=pd.util.hash_pandas_object(df.user, index=False))
    numbered = df.set_axis([0,1,2], axis=1)
    for j,(d,kw,u) in enumerate(((huge, {}, huge.user[0]), (numbered, dict(user_name=0, item_name=1, rating_name=2), 7))):
        learn = cf_learner(CFDataLoaders.from_df(d, seed=1, device='cpu', **kw), n_factors=3, seed=1)
        learn.save_bundle(tmp_path/str(j))
        pd.testing.assert_frame_equal(load_bundle(tmp_path/str(j), device='cpu').recommend([u], k=3), learn.recommend([u], k=3))
    from fastai.losses import BCEWithLogitsLossFlat
    likes = CFDataLoaders.from_df(df.assign(rating=(df.rating>3)*1.), seed=1, device='cpu')
    cf_learner(likes, loss_func=BCEWithLogitsLossFlat(thresh=0.8)).save_bundle(tmp_path/'t')
    assert load_bundle(tmp_path/'t', device='cpu').loss_func.thresh==0.8

def test_a_name_that_is_too_long_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        with whole_file(tmp_path/('n'*256)) as f: f.write_text('x')
    assert list(tmp_path.iterdir())==[]

def test_lists_of_a_bundle_without_rows_say_so(tmp_path):
    learn = load_bundle(make().save_bundle(tmp_path/'b', history=False), device='cpu')
    user = learn.dls.classes[learn.dls.user_name].ids[0]
    with pytest.warns(UserWarning, match='no rows, so that nothing is left out as seen'): learn.recommend([user], 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.recommend([user], 3, exclude_seen=False)
        learn.recommend([user], 3, exclude=learn.dls.classes[learn.dls.item_name].ids[:2])
