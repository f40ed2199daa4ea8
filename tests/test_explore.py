"The explorer: its answers, its bad input, and its pages in a browser"
import hashlib,json,re,signal,socket,subprocess,sys,threading,time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np,pandas as pd,pytest,torch
from browser import faults,open_browser
from conftest import root
from starlette.testclient import TestClient
from cfext import *
from cfext.cli import main
from cfext.explore import explore_app
from cfext.explorer import Explorer,item_facts

evil = ['<script>alert(1)</script>','مدينة الضباب','Long '*80,'"><img src=x onerror=alert(1)>',"O'Neil & Sons </title><b>"]

def make(out, n_users=60, n_items=40, n_ratings=1200, model='dot', item_name='item', history=True, epochs=3, **kwargs):
    df = synth_ratings(n_users, n_items, n_ratings)
    for i,e in enumerate(evil): df.loc[df['item']==i+1, 'title'] = e
    dls = CFDataLoaders.from_df(df, item_name=item_name, seed=42, device='cpu', **kwargs)
    learn = cf_learner(dls, model, n_factors=6, y_range=(0.5,5.5), seed=42) if model=='dot' else cf_learner(dls, model, y_range=(0.5,5.5), seed=42)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, 0.05, wd=0.1)
    learn.save_bundle(out, history=history)
    df[['item','title','genre']].drop_duplicates('item').to_csv(Path(out)/'items.csv', index=False)
    return learn,df

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp('films')
    return out,*make(out)

@pytest.fixture(scope='module')
def client(bundle): return TestClient(explore_app(Explorer(bundle[0])), base_url='http://localhost')

urls = ('/','/user?id=7','/user?id=7&k=99','/item?id=2','/map','/map/canvas','/biases?min=3','/metrics','/metrics?run=1','/new','/new?r=0:5&r=9:1.5','/search?q=l','/find?q=l')

@pytest.mark.parametrize('url', urls)
def test_every_page_answers(client, url):
    r = client.get(url)
    assert r.status_code==200
    for e in evil: assert e not in r.text or url.startswith('/find') or '<' not in e
    assert 'http://' not in r.text.replace('http://www.w3.org', '') and 'https://' not in r.text
    if url!='/map/canvas': assert "default-src 'none'" in r.headers['content-security-policy']

@pytest.mark.parametrize('url,status', [('/user?id=nobody',404), ('/user',404), ('/item?id=41',404), ('/item?id=%00',404), ('/nowhere',404), ('/new?r=1:nan',400), ('/new?r=x',400),
                                        ('/new?r=-1:5',404), ('/new?r=40:5',404), ('/new?q=zzzz',404), ('/new?q=l&stars=many',400), ('/find?q=a&role=odd',400), ('/user?id=7&k=many',200),
                                        ('/user?id=7&k=-3',200), ('/biases?min=-9',200), ('/biases?min=99999',200), ('/search',200), ('/find',200)])
def test_odd_addresses(client, url, status):
    r = client.get(url)
    assert r.status_code==status
    if status!=200 and not url.startswith('/find'): assert '<h1>Not ' in r.text

def test_only_this_host(client):
    assert client.get('/', headers=dict(host='evil.example')).status_code==400
    assert client.post('/').status_code==405

def test_answers_are_those_of_the_learner(bundle):
    path,learn,df = bundle
    ex = Explorer(path)
    for u in (1,7,60):
        at = ex.place('user', str(u))
        assert [ex.items[o['item']] for o in ex.lists(ex.alone(at), u, 5)] == learn.recommend(u, k=5)['item'].tolist()
        np.testing.assert_allclose([o['score'] for o in ex.lists(ex.alone(at), u, 5)], learn.recommend(u, k=5)['score'], rtol=1e-5)
        assert sorted(ex.history(at).rating)==sorted(df[df.user==u].rating)
    rows = pd.DataFrame(dict(user=1000, item=[3,8,11], rating=[5.,1.,4.]))
    new,who = ex.newcomer({2:5., 7:1., 10:4.})
    want = learn.fold_in(rows).recommend(1000, k=6)
    got = ex.lists(new, who, 6)
    assert [ex.items[o['item']] for o in got]==want['item'].tolist()
    assert not {2,7,10} & {o['item'] for o in got}

def test_find_is_that_of_a_naive_search(bundle):
    "The title or id itself, then beginnings, then beginnings of words, then any place; the more rated first"
    ex = Explorer(bundle[0])
    for role in ('item','user'):
        names,ids,n = [t.casefold() for t in ex.titles[role]],[t.casefold() for t in ex.keys[role]],ex.counts[role]
        for q in ('the ','o','long long','1','33','garden','the o','e (19','مدينة','<SCRIPT>','nothing of the kind',' ',''):
            want,t = [],q.strip().casefold()
            for i in sorted(range(len(names)), key=lambda i: -n[i]):
                if t and all(w in names[i] or w in ids[i] for w in t.split()):
                    want.append(((t not in (names[i],ids[i]), not (names[i].startswith(t) or ids[i].startswith(t)), ' '+t not in names[i]), i))
            for k in (1,3,50): assert ex.find(role, q, k)==[i for _,i in sorted(want, key=lambda o: o[0])][:k], (role, q, k)

def test_find_by_id(bundle):
    ex = Explorer(bundle[0])
    assert [ex.keys['item'][i] for i in ex.find('item', '33', 1)]==['33'] and '33' not in ex.titles['item'][ex.find('item', '33', 1)[0]]

def test_why_names_what_was_liked(bundle):
    ex = Explorer(bundle[0])
    u = ex.place('user', '7')
    h = ex.history(u)
    liked = set(h[h.rating>=h[~h.held_out].rating.mean()].title)
    why = [t for o in ex.lists(ex.alone(u), 7, 10) for _,t,_ in o['why']]
    assert why and set(why)<=liked

def test_what_was_rated_low_is_not_recommended(tmp_path, quiet):
    df = synth_ratings(40, 30, 500, seed=3)
    learn = cf_learner(CFDataLoaders.from_df(df, seed=5, device='cpu').positives(4), n_factors=5, loss_func=BPRLoss(), seed=0)
    ex = Explorer(learn.save_bundle(tmp_path/'b'))
    for user in ex.users:
        had = set(df[df.user==user].item)
        assert not had & {ex.items[o['item']] for o in ex.lists(ex.alone(ex.users.get_loc(user)), user, 30)}

def test_what_was_had_twice_is_one_reason(tmp_path, quiet):
    df = synth_ratings(40, 30, 500, seed=3)
    learn = cf_learner(CFDataLoaders.from_df(pd.concat([df, df, df]), valid_pct=0, device='cpu'), n_factors=5, seed=0)
    with learn.no_bar(),learn.no_logging(): learn.fit(2, 0.02)
    ex = Explorer(learn.save_bundle(tmp_path/'b'))
    whys = [[i for i,_,_ in o['why']] for user in ex.users[:9] for o in ex.lists(ex.alone(ex.users.get_loc(user)), user, 5, n_why=3)]
    assert sum(map(len, whys))>20 and all(len(o)==len(set(o)) for o in whys)

def test_nothing_is_written(bundle, client):
    digest = lambda: {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in bundle[0].iterdir()}
    before = digest()
    for u in urls: client.get(u)
    assert digest()==before

def test_titles_by_other_columns(bundle, tmp_path):
    path,learn,df = bundle
    items = df[['item','title','genre']].drop_duplicates('item')
    for data in (df, items, items.assign(item=items['item'].astype(str)), items.rename(columns=dict(genre='genres'))):
        ex = Explorer(learn, data)
        assert ex.titles['item'].tolist()==[items.set_index('item').title[i] for i in ex.items]
    with pytest.raises(ValueError, match='is not a column'): Explorer(learn, items.rename(columns=dict(item='film')))
    with pytest.raises(ValueError, match='holds none of the'): Explorer(learn, items.assign(item=-1))
    with pytest.raises(FileNotFoundError): Explorer(learn, tmp_path/'no.csv')

@pytest.mark.parametrize('kw', [dict(model='nn'), dict(item_name='title'), dict(history=False), dict(n_users=12, n_items=10, n_ratings=50)])
def test_other_bundles(tmp_path, kw, quiet):
    make(tmp_path/'b', **kw)
    if kw.get('item_name')=='title': (tmp_path/'b'/'items.csv').unlink()
    ex = Explorer(tmp_path/'b')
    c = TestClient(explore_app(ex), base_url='http://localhost')
    for u in ('/',f'/user?id={ex.keys["user"][0]}','/map','/biases','/metrics','/new'): assert c.get(u).status_code==200, u
    assert c.get('/item', params=dict(id=ex.keys['item'][0])).status_code==200
    if kw.get('n_items')==10: assert 'a longer list' not in c.get(f'/user?id={ex.keys["user"][0]}').text
    assert c.get('/new?r=0:5').status_code==(400 if kw.get('model')=='nn' else 200)

@pytest.mark.parametrize('model,loss', [(CosineProduct,FullSoftmaxLoss(temp=0.2)), (DotProduct,BPRLoss())])
def test_a_new_user_of_a_model_of_lists(tmp_path, model, loss, quiet):
    "What is asked for moves up; the model is left as it is"
    df = synth_ratings(60, 40, 1200)
    learn = cf_learner(CFDataLoaders.from_df(df, item_name='title', rating_name=None, seed=1, device='cpu'), model, n_factors=6, loss_func=loss, seed=1)
    learn.fit(3, 0.02)
    learn.save_bundle(tmp_path)
    ex = Explorer(tmp_path)
    before = [p.clone() for p in ex.learn.model.parameters()]
    assert TestClient(explore_app(ex), base_url='http://localhost').get('/new?r=0:1&r=4:1').status_code==200
    (one,a),(two,b) = (ex.newcomer({i:1.}) for i in (0,4))
    place = lambda l,u,i: top_items(l, l.dls.encode_ids([u], 'user'), 40, seen=None)[0][0].tolist().index(i+1)
    assert place(one, a, 0)<place(two, b, 0) and place(two, b, 4)<place(one, a, 4)
    assert all(torch.equal(p, q) for p,q in zip(before, ex.learn.model.parameters()))

@pytest.mark.parametrize('model', [LightGCN,SideProduct])
def test_models_whose_factors_are_computed(tmp_path, model, quiet):
    df = synth_ratings(60, 40, 1200)
    config = dict(items=df.drop_duplicates('title')[['title','genre']]) if model is SideProduct else {}
    learn = cf_learner(CFDataLoaders.from_df(df, item_name='title', seed=1, device='cpu'), model, n_factors=6, y_range=(.5,5.5), seed=1, config=config)
    learn.fit(3, 0.02)
    ex = Explorer(learn.save_bundle(tmp_path))
    for u in ('/user?id=7','/new?r=0:5&r=9:1.5','/map'): assert TestClient(explore_app(ex), base_url='http://localhost').get(u).status_code==200
    assert [o['title'] for o in ex.lists(ex.alone(6), 7, 5)]==learn.recommend(7, k=5).title.tolist()
    assert any(o['why'] for o in ex.lists(ex.alone(6), 7, 10))
    rows = pd.DataFrame(dict(user=61, title=ex.items[[0,9]], rating=[5.,1.5]))
    got = [o['score'] for o in ex.lists(*ex.newcomer({0:5., 9:1.5}), 6)]
    np.testing.assert_allclose(got, learn.fold_in(rows).recommend(61, k=6).score, rtol=1e-4)

@pytest.mark.parametrize('top', [2**63-1, 2**64-1])
def test_a_new_user_beside_the_largest_id(top, quiet):
    df = synth_ratings(60, 40, 1200)
    df = df.assign(user=df.user.astype('uint64' if top>=2**63 else 'int64').where(df.user<60, top))
    ex = Explorer(cf_learner(CFDataLoaders.from_df(df, seed=1, device='cpu'), n_factors=4, seed=1))
    new,who = ex.newcomer({2:5., 7:1.})
    assert who not in ex.users and len(ex.lists(new, who, 5))==5
    assert TestClient(explore_app(ex), base_url='http://localhost').get(f'/user?id={top}').status_code==200

def test_the_prior_is_whole_before_it_is_shared(tmp_path):
    "Threads that ask for a new user while the first one works it out"
    class Spy(Explorer):
        def __setattr__(self, k, v):
            assert k!='_prior' or not v.noise.isnan()
            super().__setattr__(k, v)
    make(tmp_path, history=False)
    ex = Spy(tmp_path)
    assert len(ex.lists(*ex.newcomer({2:5., 7:1.}), 5))==5

def test_long_titles_are_cut_where_they_are_reasons(client):
    r = client.get('/new?r=2:5')
    whys = re.findall('class="why">.*?</small>', r.text, re.S)
    assert any('because of' in o for o in whys)
    for why in whys: assert len(re.sub('<[^>]*>', '', why))<200

def test_a_hundred_thousand_items(tmp_path):
    n = 100_000
    df = pd.DataFrame(dict(user=np.arange(n)%50, item=np.arange(n), rating=np.arange(n)%5+1.))
    learn = cf_learner(CFDataLoaders.from_df(df, seed=1, valid_pct=0.01, device='cpu'), n_factors=4, seed=1)
    with torch.no_grad(): learn.model.item_factors.normal_()
    c = TestClient(explore_app(Explorer(learn)), base_url='http://localhost')
    for u in ('/','/user?id=3','/item?id=7','/biases','/new?r=5:3'): assert c.get(u).status_code==200
    r = c.get('/map/canvas')
    assert r.status_code==200 and len(r.content)<20e6
    assert len(c.get('/find?q=99').json())>5

def test_mistakes_end_in_one_line(bundle, tmp_path, capsys):
    path = bundle[0]
    for f in path.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    def _said(*args):
        assert main(['explore', *map(str, args), '--port', '0'])==2
        return capsys.readouterr().err
    assert 'holds no bundle' in _said(tmp_path/'nowhere')
    (tmp_path/'items.csv').write_text('a,b\n1,2\n')
    assert 'is not a column' in _said(tmp_path)
    m = json.loads((tmp_path/'bundle.json').read_text())
    (tmp_path/'bundle.json').write_text(json.dumps({**m, 'format':99}))
    assert 'has format 99' in _said(tmp_path)
    (tmp_path/'bundle.json').write_text(json.dumps(m)[:40])
    assert 'not readable as JSON' in _said(tmp_path)
    (tmp_path/'bundle.json').write_text(json.dumps(m))
    next(tmp_path.glob('tensors*')).write_bytes(b'half')
    assert 'checksum differs' in _said(tmp_path)

def test_a_port_in_use(bundle, capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        assert main(['explore', str(bundle[0]), '--port', str(s.getsockname()[1])])==2
    assert 'name another with --port' in capsys.readouterr().err

def test_the_address_answers_once_it_is_said_and_an_interrupt_ends_it(bundle, tmp_path):
    with open(tmp_path/'err', 'w') as err:
        p = subprocess.Popen([sys.executable, '-c', 'import sys; from cfext.cli import main; sys.exit(main())', 'explore', str(bundle[0]), '--port', '0'],
                             stdout=subprocess.PIPE, stderr=err, text=True, cwd=root)
        try:
            address = p.stdout.readline().split()[0]
            with urlopen(address, timeout=60) as r: assert r.status==200
        finally: p.send_signal(signal.SIGINT)
        assert p.wait(60)==0
    assert 'Traceback' not in (tmp_path/'err').read_text()

@contextmanager
def running(path):
    "The command, on a free port"
    p = subprocess.Popen([sys.executable, '-c', 'import sys; from cfext.cli import main; sys.exit(main())', 'explore', str(path), '--port', '0'],
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root)
    try: yield p.stdout.readline().split()[0].rstrip('/')
    finally:
        p.terminate()
        p.wait(20)

@pytest.fixture(scope='module')
def served(bundle):
    "The app in a thread of this process"
    import uvicorn
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        server = uvicorn.Server(uvicorn.Config(explore_app(Explorer(bundle[0])), log_level='error'))
        t = threading.Thread(target=server.run, kwargs=dict(sockets=[s]), daemon=True)
        t.start()
        while not server.started: time.sleep(0.05)
        yield f'http://127.0.0.1:{s.getsockname()[1]}'
        server.should_exit = True
        t.join(10)

@pytest.fixture(scope='module')
def browser():
    with open_browser() as new: yield new

def test_the_whole_path_in_a_browser(browser, bundle):
    with running(bundle[0]) as url:
        assert url.startswith('http://127.0.0.1:')
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: # the address under which others would ask
            try: s.connect(('192.0.2.1', 9))
            except OSError: pass
            own = s.getsockname()[0]
        if own[:4] not in ('127.','0.0.'):
            with pytest.raises(OSError): socket.create_connection((own, int(url.rsplit(':', 1)[1])), 2)
        w = browser(url)
        page = w.page
        page.goto(url)
        page.keyboard.press('Tab')
        assert page.evaluate('document.activeElement.className')=='skip'
        page.fill('#find', 'script')
        page.wait_for_selector('#find-list li')
        assert page.locator('#find-list li bdi').first.inner_text()==evil[0]
        page.keyboard.press('ArrowDown')
        assert page.get_attribute('#find', 'aria-activedescendant')=='find-list0'
        page.keyboard.press('Enter')
        page.wait_for_url('**/item?id=1')
        assert page.locator('h1').inner_text()==evil[0]
        page.locator('section:has(h2:text-is("Similar")) a').first.click()
        page.wait_for_url('**/item?id=*')
        page.fill('#find', '7')
        page.wait_for_selector('#find-list li')
        page.keyboard.press('Escape')
        assert page.locator('#find-list').is_hidden()
        page.goto(url+'/user?id=7')
        assert page.locator('.recs > li').count()==10
        assert page.locator('.why a').count()>=5
        page.locator('nav a', has_text='Metrics').click()
        page.get_by_role('button', name='Evaluate now').click()
        page.wait_for_selector('text=popularity')
        w.clean()
        page.goto(url+'/user?id=nobody')
        assert 'nobody' in page.locator('main').inner_text()

def test_a_new_user_by_keyboard(browser, served):
    w = browser(served)
    page = w.page
    page.goto(served+'/new')
    for text in ('the ','long'):
        page.fill('#rate', text)
        page.wait_for_selector('#rate-list li')
        page.keyboard.press('ArrowDown')
        page.keyboard.press('Enter')
        assert page.evaluate('document.activeElement.id')=='stars'
        page.keyboard.press('Tab')
        before = page.url
        page.keyboard.press('Enter')
        page.wait_for_function('u => location.href!==u', arg=before)
        page.wait_for_selector('.recs li')
    assert page.locator('td a', has_text='take back').count()==2
    first = page.locator('.recs li').first.inner_text()
    page.locator('td a', has_text='take back').first.click()
    page.wait_for_function("document.querySelectorAll('td a[aria-label^=\"take back\"]').length===1")
    assert page.locator('.recs li').first.inner_text()!=first
    w.clean()

def test_the_map(browser, served):
    from playwright.sync_api import TimeoutError
    w = browser(served)
    page = w.page
    page.goto(served+'/map')
    page.frame_locator('iframe.map').locator('#legend button').first.wait_for()
    f = next(o for o in page.frames if o.url.endswith('/map/canvas'))
    canvas,box = f.locator('#map'),page.locator('iframe.map').bounding_box()
    for _ in range(40): # a busy machine lays the frame out late
        at = f.evaluate('[sx(12), sy(12)]')
        try:
            for dx in (9,0): canvas.hover(position=dict(x=at[0]+dx, y=at[1]), timeout=1000) # waits until the canvas would get it, or looks anew where the item is
        except TimeoutError: continue
        if f.locator('#tip').is_visible(): break
        page.wait_for_timeout(50)
    assert f.locator('#tip').is_visible() and 'ratings' in f.locator('#tip').inner_text()
    state = f.evaluate('[k,ox,oy]')
    page.mouse.wheel(0, -400)
    page.wait_for_timeout(200)
    assert f.evaluate('k')>state[0]
    f.locator('#map').focus()
    page.keyboard.press('ArrowRight')
    page.keyboard.press('0')
    page.wait_for_timeout(100)
    np.testing.assert_allclose(f.evaluate('[k,ox,oy]'), state)
    page.mouse.down()
    page.mouse.move(box['x']+at[0]+80, box['y']+at[1]+30, steps=4)
    page.mouse.up()
    assert abs(f.evaluate('ox')-state[1])>40 and page.url.endswith('/map')
    f.locator('#legend button').first.click()
    assert f.evaluate('on[0]') is False
    f.locator('#legend button').first.click()
    f.locator('#find').fill('script')
    f.locator('#find').press('Enter')
    page.wait_for_url('**/item?id=1')
    w.clean()

@pytest.mark.parametrize('dark', [False,True])
def test_everybody_can_use_it(browser, served, dark):
    wide,narrow = browser(served, dark=dark),browser(served, dark=dark, width=390, height=780)
    for u in ('/','/user?id=7','/map/canvas','/new?r=0:5&r=2:1') if dark else ('/','/user?id=7','/item?id=3','/map','/map/canvas','/biases','/metrics','/new?r=0:5&r=2:1','/search?q=l'):
        wide.page.goto(served+u)
        wide.page.wait_for_load_state('networkidle')
        assert not (f := faults(wide.page)), f'{u}: {f}'
        narrow.page.goto(served+u)
        assert narrow.page.evaluate('document.scrollingElement.scrollWidth<=innerWidth'), f'{u} is wider than a phone'
    wide.clean()
    narrow.clean()

def test_a_report_of_an_earlier_model_is_not_shown(tmp_path, quiet, capsys):
    synth_ratings(60, 40, 900, seed=3).to_csv(tmp_path/'r.csv', index=False)
    assert main(['fit', str(tmp_path/'r.csv'), '--out', str(tmp_path/'o'), '--epochs', '1'])==0
    shown = lambda: 'On held-out rows' in TestClient(explore_app(Explorer(tmp_path/'o')), base_url='http://localhost').get('/metrics').text
    assert shown()
    learn = load_bundle(tmp_path/'o', device='cpu')
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.02)
    learn.save_bundle(tmp_path/'o')
    assert not shown()
