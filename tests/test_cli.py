"The command line, in a process of its own and in this one"
import json,subprocess,sys,warnings
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
    warnings.simplefilter('always')
    for args,told in (([],1), (['--seen'],0)):
        assert main(['recommend', str(bare), '--user', '7', *args])==0
        err = capsys.readouterr().err
        assert (err.count('--seen'),err.count('exclude'),len(err.splitlines()))==(told,0,told)

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

def test_settings_that_train_nothing(fitted, capsys):
    "They are refused before anything is read or written"
    out = fitted/'out'
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for args,msg in ((('--epochs','0'),'`epochs`=0'),(('--epochs','-1'),'`epochs`=-1'),(('--n-factors','0'),'`n_factors`=0'),(('--lr','nan'),'--lr should be'),(('--lr','0'),'--lr should be'),
                     (('--lr','inf'),'--lr should be'),(('--wd','nan'),'--wd one of at least 0'),(('--wd','-1'),'--wd one of at least 0')):
        assert main(['fit', str(fitted/'r.csv'), '--out', str(out), *args])==2 and msg in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in out.iterdir()}==before
    assert main(['fit', str(fitted/'r.csv'), '--out', str(fitted/'one'), '--epochs', '1', '--n-factors', '1'])==0

def test_columns_and_encodings_are_named(tmp_path, capsys):
    "Splitters know the names, the summary counts all users, gaps are told in a shell's words"
    df = synth_ratings(60, 40, 800)
    shop = pd.DataFrame(dict(client=df.user, article='Café '+df.title, stars=df.rating, when=pd.to_datetime(df.timestamp, unit='s').astype(str)))
    shop.to_csv(tmp_path/'s.csv', index=False, sep=';', encoding='latin-1')
    fit = lambda f,*more: main(['fit', str(tmp_path/f), '--user-name', 'client', '--item-name', 'article', '--rating-name', 'stars', '--out', str(tmp_path/'o'), '--epochs', '1', '--n-factors', '4', *more])
    for splitter,held in (('last',60),('time',160),('cold',None)):
        assert fit('s.csv', '--splitter', splitter, '--time-name', 'when', '--encoding', 'latin-1')==0
        assert '800 ratings of 60 users and 40 items' in capsys.readouterr().out
        m = json.loads((tmp_path/'o'/'metrics.json').read_text())
        assert m['rows']['valid']==held if held else m['users']==48
    assert fit('s.csv')==2 and "name its encoding, such as 'latin-1'" in capsys.readouterr().err
    assert fit('s.csv', '--encoding', 'latin-1', '--splitter', 'last', '--time-name', 'day')==2 and "`time_name`='day'" in capsys.readouterr().err
    for c,role in (('client','user'),('article','item'),('stars','rating')):
        shop.assign(**{c: shop[c].where(shop.index!=6)}).to_csv(tmp_path/'g.csv', index=False)
        assert fit('g.csv')==2
        assert f'1 of 800 rows have no {role} (first: row 7 below' in (err := capsys.readouterr().err) and f'--{role}-name' in err and 'df' not in err

def test_in_a_pipe(fitted, tmp_path):
    "No bars, no traceback when the reader leaves, titles in ASCII, no warnings of imports"
    import os
    exe,big = Path(sys.executable).parent/'cfext',tmp_path/'big'
    df = synth_ratings(3000, 800, 40_000)
    df.assign(title='Café '+df.title).to_csv(tmp_path/'b.csv', index=False)
    fit = subprocess.run([exe, 'fit', str(tmp_path/'b.csv'), '--out', str(big), '--epochs', '1', '--n-factors', '4'], capture_output=True, text=True)
    assert fit.returncode==0 and '%' not in fit.stdout and '\r' not in fit.stdout and 'FutureWarning' not in fit.stderr, fit.stderr
    ask = subprocess.run([exe, 'evaluate', str(big)], capture_output=True, text=True)
    assert ask.returncode==0 and len(ask.stdout.splitlines())==8 and '\r' not in ask.stdout and not ask.stderr, ask.stdout+ask.stderr
    plain = subprocess.run([exe, 'recommend', str(big), '--user', '7'], capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING':'ascii'})
    assert plain.returncode==0 and r'Caf\xe9' in plain.stdout and not plain.stderr, plain.stderr
    p = subprocess.Popen([exe, 'similar', str(big)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert p.stderr.read()==b'' and p.wait()==141
    odd = subprocess.run([exe, 'fly'], capture_output=True, text=True)
    assert (odd.returncode,odd.stdout)==(2,'') and odd.stderr.startswith("cfext: no command 'fly'\nusage: cfext COMMAND")

def test_digits_with_underscores_are_no_number(fitted, capsys):
    assert main(['recommend', str(fitted/'out'), '--user', '1_0'])==2 and "'1_0'" in capsys.readouterr().err
    assert main(['recommend', str(fitted/'out'), '--user', '10'])==0

def test_warnings_are_lines_and_an_empty_list_is_said(tmp_path, capsys):
    df = synth_ratings(20, 9, 60, seed=3)
    pd.concat([df[['user','item']], pd.DataFrame(dict(user=1, item=df.item.unique()))]).drop_duplicates().assign(rating=1).to_csv(tmp_path/'r.csv', index=False)
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        assert main(['fit', str(tmp_path/'r.csv'), '--out', str(tmp_path/'o'), '--epochs', '1'])==0
    err = capsys.readouterr().err
    assert "cfext fit: `rating_name`='rating' is 1 in every row" in err and 'UserWarning' not in err and '.py' not in err
    assert main(['recommend', str(tmp_path/'o'), '--user', '1'])==0
    assert 'nothing is left to recommend; --seen' in capsys.readouterr().out
