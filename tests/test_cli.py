"The command line, in a process of its own and in this one"
import json,subprocess,sys
from pathlib import Path

import numpy as np,pandas as pd,pytest
from cfext import synth_ratings
from cfext.cli import main

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    d = tmp_path_factory.mktemp('cli')
    synth_ratings(80, 60, 2000).to_csv(d/'r.csv', index=False)
    assert main(['fit', str(d/'r.csv'), '--out', str(d/'out'), '--epochs', '2', '--n-factors', '6', '-k', '4', '--splitter', 'last'])==0
    return d

def test_fit_writes_everything(fitted):
    names = {o.name.split('-')[0] for o in (fitted/'out').iterdir()}
    assert names=={'bundle.json','tensors','ids','metrics.json','losses.png','item_map.png','items.csv','recommendations.csv'}
    m = json.loads((fitted/'out'/'metrics.json').read_text())
    assert len(m['epochs'])==2 and m['rows']['valid']==80 and m['settings']['splitter']=='last'
    assert set(m['report'])=={'DotProductBias','mean rating','user mean','item mean','user and item means','popularity'}
    r = pd.read_csv(fitted/'out'/'recommendations.csv')
    assert r.groupby('user').size().eq(4).all() and r.user.nunique()==80

def test_choices_without_ratings(tmp_path, capsys):
    "A table of users and items, and the same with ratings and --lists, give the same model; LightGCN's layout has its own split"
    df = synth_ratings(80, 60, 2000)
    df[['user','title']].to_csv(tmp_path/'c.csv', index=False)
    df[['user','title','rating']].to_csv(tmp_path/'r.csv', index=False)
    layout = tmp_path/'layout'
    layout.mkdir()
    codes = df.assign(user=df.user-1, item=df.title.factorize()[0]).drop_duplicates(['user','item'])
    for name,part in (('train',codes[codes.index%5>0]),('test',codes[codes.index%5==0])):
        (layout/f'{name}.txt').write_text('\n'.join(f"{u} {' '.join(map(str, o))}" for u,o in part.groupby('user').item))
    runs = {'c':['c.csv'], 'r':['r.csv','--lists'], 'l':['layout','--split','test']}
    for out,(data,*more) in runs.items(): assert main(['fit', str(tmp_path/data), *more, '--out', str(tmp_path/out), '--epochs', '3', '-k', '4'])==0
    assert 'no column of ratings among user, title: each row is taken as a choice' in capsys.readouterr().out
    c,r,l = (json.loads((tmp_path/o/'metrics.json').read_text()) for o in runs)
    assert c['report']==r['report'] and set(c['report'])=={'CosineProduct','popularity','EASE'} and set(c['report']['EASE'])=={'recall@4','NDCG@4'}
    assert c['settings']['lists'] and c['settings']['lr']==0.01 and l['rows']['valid']==(codes.index%5==0).sum()
    assert pd.read_csv(tmp_path/'c'/'recommendations.csv').equals(pd.read_csv(tmp_path/'r'/'recommendations.csv'))
    assert main(['evaluate', str(tmp_path/'c'), '-k', '4'])==0 and main(['similar', str(tmp_path/'c'), '-k', '3'])==0
    assert 'RMSE' not in capsys.readouterr().out
    assert main(['fit', str(tmp_path/'c.csv'), '--model', 'nn', '--out', str(tmp_path/'n')])==2 and not (tmp_path/'n').exists()

def test_ask(fitted, capsys):
    out = str(fitted/'out')
    assert main(['evaluate', out, '-k', '4'])==0
    assert 'recall@4' in capsys.readouterr().out
    assert main(['recommend', out, '--user', '7', '-k', '3'])==0
    assert len(capsys.readouterr().out.splitlines())==4
    assert main(['recommend', out])==0 and main(['similar', out])==0
    capsys.readouterr()
    title = pd.read_csv(fitted/'r.csv').title[0]
    assert main(['similar', out, '--item', title, '-k', '3'])==0
    assert len(capsys.readouterr().out.splitlines())==4

@pytest.mark.parametrize('args,msg', [(['recommend','OUT','--user','nobody'], 'whole numbers'), (['recommend','OUT','--user','100000'], 'not seen in training'),
    (['similar','OUT','--item','Nowhere'], "'Nowhere'"), (['evaluate','/nowhere'], 'holds no bundle'), (['fit','/nowhere.csv'], 'neither a file nor a folder'),
    (['fit','CSV','--user-name','usr'], "`user_name`='usr' is not a column"), (['fit','CSV','--splitter','odd'], "`splitter`='odd'"),
    (['fit','CSV','--out','CSV'], 'is a file'), (['recommend','OUT','-k','0'], '`k`=0')])
def test_mistakes_end_in_one_line(fitted, capsys, args, msg):
    args = [a.replace('OUT', str(fitted/'out')).replace('CSV', str(fitted/'r.csv')) for a in args]
    before = {p: p.stat().st_mtime_ns for p in fitted.rglob('*')}
    assert main(args)==2
    err = capsys.readouterr().err
    assert msg in err and 'Traceback' not in err
    assert {p: p.stat().st_mtime_ns for p in fitted.rglob('*')}==before, 'nothing is written'

def test_help(capsys):
    assert main([])==0 and 'cfext COMMAND' in capsys.readouterr().out
    assert main(['fly'])==2

def test_as_a_command(fitted):
    exe = Path(sys.executable).parent/'cfext'
    r = subprocess.run([exe, 'recommend', str(fitted/'out'), '--user', '7', '-k', '2'], capture_output=True, text=True)
    assert r.returncode==0 and len(r.stdout.splitlines())==3, r.stderr
    m = subprocess.run([sys.executable, '-m', 'cfext.cli', 'recommend', str(fitted/'out'), '--user', '7', '-k', '2'], capture_output=True, text=True)
    assert (m.returncode,m.stdout)==(0,r.stdout), m.stderr
    m = subprocess.run([sys.executable, '-m', 'cfext.cli', 'recommend', '/nowhere'], capture_output=True, text=True)
    assert m.returncode==2 and m.stderr.splitlines()[-1].startswith('cfext recommend: ') and 'RuntimeWarning' not in m.stderr

def test_unknown_ids_and_a_bundle_without_rows(fitted, tmp_path, capsys):
    "What is advised are options of the command"
    from cfext import load_bundle
    bare = load_bundle(fitted/'out').save_bundle(tmp_path/'bare', history=False)
    for cmd,role,odd in (('recommend','user','100000'),('similar','item','Nowhere')):
        assert main([cmd, str(fitted/'out'), f'--{role}', odd])==2
        err = capsys.readouterr().err
        assert f'--{role} takes' in err and 'unk=' not in err and len(err.splitlines())==1
        assert main([cmd, str(bare)])==2
        assert 'without its rows' in (err := capsys.readouterr().err) and f'--{role}' in err
    assert main(['evaluate', str(bare)])==2 and '--valid-pct' in capsys.readouterr().err
    for cmd in ('evaluate','recommend','similar'): assert main([cmd, '/nowhere'])==2 and '`cfext fit DATA --out /nowhere` writes one' in capsys.readouterr().err
    assert main(['recommend', str(bare), '--user', '7'])==0

def test_nothing_held_out_and_a_fit_that_diverges(tmp_path, capsys):
    "Everything is written without held-out rows; a diverged fit leaves what was there"
    df = synth_ratings(60, 40, 800)
    df.drop(columns='genre').assign(genres=np.nan).to_csv(tmp_path/'r.csv', index=False)
    out = tmp_path/'o'
    fit = lambda *more: main(['fit', str(tmp_path/'r.csv'), '--out', str(out), '--epochs', '1', *more])
    assert fit('--valid-pct', '0')==0 and 'Empty DataFrame' not in capsys.readouterr().out
    assert json.loads((out/'metrics.json').read_text())['epochs'][0]['valid_loss'] is None and (out/'recommendations.csv').exists()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert fit('--lr', '1e6')==2 and 'the training has diverged' in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()}==before
    assert main(['fit', str(tmp_path/'r.csv'), '--out', str(tmp_path/'p'), '-k', '0'])==2 and not (tmp_path/'p').exists()
    df.assign(genre=3).to_csv(tmp_path/'r.csv', index=False)
    assert fit()==0
