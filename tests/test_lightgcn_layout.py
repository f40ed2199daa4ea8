"The script for data in LightGCN's layout: its evaluation against that paper's, in loops, and the whole way on a small made-up folder"
import importlib.util,json,math,os,subprocess,sys
from types import SimpleNamespace

import numpy as np,pandas as pd,pytest,torch
from cfext import *
from conftest import root

@pytest.fixture(scope='module')
def script():
    sys.path.insert(0, str(root/'benchmarks'))
    try:
        spec = importlib.util.spec_from_file_location('lightgcn_layout', root/'benchmarks'/'lightgcn_layout.py')
        m = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(m)
        yield m
    finally: sys.path.remove(str(root/'benchmarks'))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "80 users of four tastes over 60 items; item 99 and user 500 are in the test alone, two users have no test row"
    rng,path = np.random.default_rng(0),tmp_path_factory.mktemp('lists')
    own = {u: rng.permutation([i for i in range(60) if i%4==u%4])[:rng.integers(6, 13)] for u in range(80)}
    line = lambda u, items: ' '.join(map(str, [u,*items]))
    (path/'train.txt').write_text('\n'.join(line(u, i[3:]) for u,i in own.items())+'\n')
    (path/'test.txt').write_text('\n'.join(line(u, i[:3] if u>1 else []) for u,i in own.items())+'\n7 99\n500 3 4\n')
    return path

def naive(score, train, test, k):
    "Recall and NDCG as LightGCN's repository computes them; `score` gives {item: score} of a user"
    rs,ns = [],[]
    for u,rel in test.items():
        s = {i:v for i,v in score(u).items() if i not in train.get(u, ())}
        hit = [i in rel for i in sorted(s, key=lambda i: -s[i])[:k]]
        rs.append(sum(hit)/len(rel))
        ns.append(sum(h/math.log2(j+2) for j,h in enumerate(hit))/sum(1/math.log2(j+2) for j in range(min(k, len(rel)))))
    return np.mean(rs),np.mean(ns)

def test_evaluation_is_that_of_the_paper(script, folder):
    df = read_ratings(folder, split='test')
    train,test = (df[df.is_valid==v] for v in (False,True))
    dls = script.loaders(train, 'cpu')
    model = IALS(dls, 4, n_iter=2)
    with torch.no_grad(): S = model.score_items(torch.arange(dls.n_users))
    users,items = dls.classes['user'],dls.classes['item']
    score = lambda u: dict(zip(items.ids, S[users.encode([u])[0],1:].tolist()))
    sets = lambda d: d.groupby('user').item.agg(set).to_dict()
    got = script.judge(model, dls, test)
    known = sets(test)
    del known[500]
    r,n = naive(score, sets(train), known, 20)
    tied = script.judge(model, dls, test[test.user!=500])
    assert (tied['recall'],tied['ndcg'],tied['users'])==(pytest.approx(r, rel=1e-5),pytest.approx(n, rel=1e-5),78) and got['users']==79
    assert len(known[7])==4, 'an item that nobody has counts among those to be found'

def test_the_script_runs_and_finds_the_tastes(folder, tmp_path):
    models = ['popularity','ials','ease','mf','mf-sampled','mf-bpr','lightgcn']
    cmd = [sys.executable, 'benchmarks/lightgcn_layout.py', str(folder), '--models', *models, '--temps', '0.2', '--weights', '1', '--epochs', '8',
           '--max-epochs', '16', '--bs', '64', '--n-neg', '32', '--factors', '8', '--lr', '0.03', '--device', 'cpu', '--out', str(tmp_path/'o.json')]
    r = subprocess.run(cmd, capture_output=True, text=True, cwd=root, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert r.returncode==0, r.stderr[-2000:]
    res = json.loads((tmp_path/'o.json').read_text())['results']
    assert list(res)==models and 'of 79 users, 1 of them with an item that has no training row' in r.stdout
    for n in models[1:]: assert res[n]['ndcg']['mean']>1.3*res['popularity']['ndcg']['mean'], res
    run = res['mf']['runs'][0]
    assert [o['epochs'] for o in run['tried']]==[8,16] and run['chosen']['epochs']==max(run['tried'], key=lambda o: o['recall'])['epochs']

def test_ratings_are_split_by_user(script):
    df = pd.DataFrame(dict(user=np.arange(200)//20, item=np.arange(200)%20, rating=3.))
    a,b = (script.part(pd.concat([df, df]), s) for s in (0,1))
    assert len(a)==200 and (a.groupby('user').is_valid.sum()==4).all()
    assert set(map(tuple, a[a.is_valid][['user','item']].values))!=set(map(tuple, b[b.is_valid][['user','item']].values))
