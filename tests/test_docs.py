"The site: built whole, from the notebooks alone, and looked at in a browser"
import ast,functools,html,http.server,json,os,re,sys,threading
from pathlib import Path
from urllib.parse import unquote,urlparse

import pytest
from browser import faults,open_browser
from conftest import root

sys.path.insert(0, str(root/'docs'))
pytest.importorskip('sphinx', reason='sphinx, myst-parser and furo, of the dev requirements, make the site')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site, built once for all processes of the session; or one that was built before, named by CFEXT_SITE"
    if 'CFEXT_SITE' in os.environ: return Path(os.environ['CFEXT_SITE']).resolve()
    from filelock import FileLock
    from build import build
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith('popen-') else base
    with FileLock(base/'site.lock'):
        if not (base/'site.rc').exists(): (base/'site.rc').write_text(str(build(base/'site', base/'site_src', jobs='1')))
    assert (base/'site.rc').read_text()=='0', 'the site was built with warnings, shown above'
    return base/'site'

@pytest.fixture(scope='session')
def served(site):
    "The site over http"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}/'
    s.shutdown()

@pytest.fixture(scope='module')
def browser():
    with open_browser() as new: yield new

def pages(site): return sorted(p for p in site.rglob('*.html') if '_static' not in p.parts)
def ids(text): return set(re.findall(r'\bid="([^"]+)"', text))

def test_a_page_for_each_notebook(site):
    for p in (root/'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' not in p.parts: assert (site/p.relative_to(root/'nbs').with_suffix('.html')).exists(), p.name
    for p in (root/'benchmarks').glob('*.json'): assert (site/'benchmarks'/f'{p.stem}.html').exists(), p.name

def test_each_record_is_read_and_what_is_missing_is_said(tmp_path):
    "Every record has charts of its own; a script without a record is named; a record of another shape is shown as it is"
    from bench import script_of,write_benchmarks
    from records import view
    for p in (root/'benchmarks').glob('*.json'):
        v = view(p.stem, json.loads(p.read_text()))
        assert script_of(p).exists(), p.name
        assert v.title and any(v.parts) and not any('another shape' in o for o in v.short), (p.name, v.short)
    src = tmp_path/'benchmarks'
    src.mkdir()
    for n in ('loop.py','loaders.py','topk.py'): (src/n).write_text((root/'benchmarks'/n).read_text())
    side = dict(seconds={'fastai':4., 'cfext':1.}, times_faster={'fastai':1., 'cfext':4.}, all={'fastai':[4.,5.,4.], 'cfext':[1.,1.,1.]})
    grow = {k:{str(n):dict(s=n/1e4, us_a_step=float(n)) for n in ns} for k,ns in dict(rows=(10**5,10**6), catalogue=(10**3,10**5), factors=(8,256)).items()}
    (src/'loop_cpu.json').write_text(json.dumps({'date':'2026-01-02', 'command':'c', 'machine':dict(cpu='Some CPU', cores=2), 'ML-100K, bs 64':side, 'growth':grow}))
    assert list(write_benchmarks(src, tmp_path/'out'))==['loop_cpu']
    md = (tmp_path/'out'/'loop_cpu.md').read_text()
    assert md.count('<svg class="lines"')==6 and '1M 1,000,000' in md and '4 times as fast' in md
    for o in ('2026-01-02','Some CPU','python benchmarks/loop.py','def growth'): assert o in md, o
    index = (tmp_path/'out'/'index.md').read_text()
    assert 'Not recorded yet' in index and '`python benchmarks/loop.py`, on a GPU' in index and '`python benchmarks/loaders.py`' in index and '`python benchmarks/topk.py`, on a GPU' in index and '1 ahead, 0 even, 0 behind' in index
    (src/'loop_cpu.json').write_text(json.dumps({'date':'2026-01-02', 'machine':'m', 'ML-100K, bs 64':dict(seconds=[1,2])}))
    write_benchmarks(src, tmp_path/'out')
    md = (tmp_path/'out'/'loop_cpu.md').read_text()
    assert 'another shape' in md and 'ML-100K, bs 64' in md

def test_rules_of_the_same_widths_do_not_differ():
    from records import view
    rules = [dict(rule=n, mean=1., params=9, verdict=o) for n,o in (('fastai','reference'),('google','noise'),('dcn','better'),('count','same widths'))]
    v = view('emb_sizes', {'a set': dict(settings=dict(metric='loss'), runs=[], results=[dict(budget=9, rules=rules)])})
    assert v.short[0].startswith('1 of the 2 comparisons') and '; 1 more come to the same widths' in v.short[0]

@pytest.mark.parametrize('got,want,kw,says', [(.8,.9,{},'ahead by 11.1%'), (.8,.9,dict(less=False),'behind by 11.1%'), (.89,.9,dict(sd=.02),'even'), (2.,8.,dict(time=True),'ahead: 4 times'),
                                              (8.,2.,dict(time=True),'behind: 4 times'), (None,2.,{},'not recorded'), (1.,1.,{},'even')])
def test_ahead_and_behind(got, want, kw, says):
    from records import Held
    assert Held('x', got, want, 'y', **kw).outcome().startswith(says)

def test_every_public_name_has_its_place(site):
    import cfext
    text = {p: p.read_text(encoding='utf-8') for p in pages(site)}
    have = set().union(*map(ids, text.values()))
    missing = [n for n in cfext.__all__ if f'cfext.{n}' not in have and callable(getattr(cfext, n))]
    assert not missing

def test_arguments_returns_and_errors_are_told(site):
    for page,name,words in (('10_recommend','top_items',('<table','(n,) long codes','Returns')), ('01c_data','CFDataLoaders.from_df',('<table','ValueError'))):
        text = (site/f'{page}.html').read_text(encoding='utf-8')
        part = text[text.index(f'id="cfext.{name}"'):]
        part = part[:part.index('<dl class="py')]
        for o in words: assert o in part, (name, o)
    for page in pages(site): # what a table's cell needs stays there
        text = page.read_text(encoding='utf-8')
        assert r'<span class="pre">\|</span>' not in text, page

def test_links_within_the_site_lead_somewhere(site):
    text = {p: p.read_text(encoding='utf-8') for p in pages(site)}
    have,n = {p: ids(t) for p,t in text.items()},0
    for p,t in text.items():
        for h in re.findall(r'<a [^>]*href="([^"]*)"', t):
            u = urlparse(h)
            if u.scheme or not h: continue
            to = (p.parent/unquote(u.path)).resolve() if u.path else p
            assert to.exists(), f'{p.name}: {h}'
            if u.fragment and to in have: assert unquote(u.fragment) in have[to] or u.fragment=='', f'{p.name}: {h}'
            n += 1
    assert n>1000

def test_nothing_from_outside_is_named(site):
    for p in pages(site):
        t = p.read_text(encoding='utf-8')
        for tag,attr in (('script','src'),('link','href'),('img','src'),('iframe','src')):
            for m in re.findall(rf'<{tag} [^>]*{attr}="([^"]*)"', t): assert not urlparse(m).netloc or 'canonical' in m, f'{p.name}: {m}'

def article(p):
    t = p.read_text(encoding='utf-8')
    return t[t.index('<article'):t.index('</article>')]

def clicks_to(site, words):
    "Fewest clicks, on links in the text alone, from the start page to a page whose code has `words`"
    seen,at,n = set(),{site/'index.html'},0
    while at:
        text = {p: article(p) for p in at}
        if any(words in re.sub('<[^>]*>', '', ' '.join(re.findall('<pre.*?</pre>', t, re.S))) for p,t in text.items() if n): return n
        seen |= at
        to = {(p.parent/unquote(urlparse(h).path)).resolve() for p,t in text.items() for h in re.findall('<a [^>]*href="([^"]*)"', t) if not urlparse(h).scheme and urlparse(h).path}
        at,n = {p for p in to if p.suffix=='.html'}-seen,n+1

@pytest.mark.parametrize('words', ['CFDataLoaders.from_csv(','.recommend(','LGBMRegressor(','GradientAccumulator('])
def test_two_clicks_from_the_start_at_most(site, words):
    "Train on a CSV, lists, LightGBM, accumulation: seen at work, not only named"
    assert 1<=clicks_to(site, words)<=2
    assert clicks_to(site, 'no page shows this') is None

def test_each_code_block_has_run(site):
    "What a page shows as Python is a cell that `nbdev-test` runs, or the text of a script or module; what stands in prose is for a shell"
    for p in [*(root/'nbs').rglob('*.ipynb')]:
        if '.ipynb_checkpoints' in p.parts: continue
        assert not p.name.startswith('_') and not {'skip_exec','skip_showdoc'} & set(json.loads(p.read_text())['metadata'])
        for c in json.loads(p.read_text())['cells']:
            src = ''.join(c['source'])
            if c['cell_type']=='code': assert not re.search(r'^#\|\s*(eval: false|notest|slow|cuda)', src, re.M) and not src.startswith(('!','%%')), f'{p.name} shows what is not run: {src[:80]!r}'
            else:
                assert c['cell_type']=='markdown' and not re.search('skip_exec', src), p.name
                for block in re.findall(r'^```(.*?)```', src, re.M|re.S): assert re.match(r'\n(pip|make|cfext|python) ', block), f'{p.name}: {block[:80]!r} is not run'
    run = ['\n'.join(re.sub(r'^#\|.*\n?', '', ''.join(c['source']), flags=re.M).strip() for c in json.loads(p.read_text())['cells']) for p in (root/'nbs').rglob('*.ipynb')]
    run = re.sub(r'\s', '', '\n'.join([*run, *[p.read_text() for p in (root/'benchmarks').glob('*.py')]]))
    n = 0
    for p in pages(site):
        for block in re.findall(r'<div class="highlight-python notranslate">.*?<pre>(.*?)</pre>', p.read_text(encoding='utf-8'), re.S):
            code = re.sub(r'\s', '', html.unescape(re.sub('<[^>]*>', '', block)))
            assert code in run, f'{p.name}: {code[:80]!r}'
            n += 1
    assert n>300

def test_names_in_the_readme_are_there():
    import cfext
    have = set(cfext.__all__) | {n for o in map(cfext.__dict__.get, cfext.__all__) if isinstance(o, type) for n in dir(o)} | {'cfext','CollabDataLoaders','collab_learner','with'}
    for span in re.findall('`([^`\n]+)`', (root/'README.md').read_text()):
        for n in re.findall(r'(?<![\w=\'./])([A-Za-z_]\w+)(?=\()', span): assert n in have or n=='recipe', f'{n} in {span!r}'

def test_the_readme_repeats(tmp_path, monkeypatch, quiet):
    "Its lines, run anew, whatever torch's generator is at, give the lists that it shows"
    import torch
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(os.getpid())
    parts = re.findall(r'^```python\n(.*?)^```\n\n(?:^```\n(.*?)^```)?', (root/'README.md').read_text(), re.M|re.S)
    env,n = {},0
    for code,shown in parts:
        *body,last = code.strip().split('\n')
        exec('\n'.join(body), env)
        got = eval(last, env)
        if not hasattr(got, 'columns'): continue
        head,*want = [{m.end(): m[0] for m in re.finditer(r'\S+( \S+)*', l)} for l in shown.splitlines()[:1+len(got)]] # cells by where they end
        for (_,row),w in zip(got.iterrows(), want, strict=True):
            assert set(list(w)[1:])<=set(head), (code, w)
            for v,end in zip(row, head, strict=True):
                o = w.get(end, '')
                assert o=='' if v!=v else abs(v-float(o))<.01 if isinstance(v, float) else str(v)==o, (code, v, o)
                n += 1
    assert n>=30

def test_cells_that_import_stand_alone():
    "Quarto's nbdev-docs runs exported cells and cells with imports, and these only: they must not need what others define"
    stores = lambda tree: {o.id for o in ast.walk(tree) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
    for p in (root/'nbs').glob('[0-9]*.ipynb'):
        skipped,ran = set(),set()
        for c in json.loads(p.read_text())['cells']:
            src = ''.join(c['source'])
            if c['cell_type']!='code' or src.startswith('%'): continue
            tree = ast.parse(src)
            runs = re.search(r'^#\|\s*export', src, re.M) or any(isinstance(o, (ast.Import,ast.ImportFrom)) for o in ast.walk(tree))
            needs = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)} - stores(tree)
            if runs and not re.search(r'^#\|\s*export', src, re.M): assert not (odd := needs & (skipped-ran)), f'{p.name}: {odd} in {src[:80]!r}'
            (ran if runs else skipped).update(stores(tree))

def test_every_page_in_a_browser(browser, site):
    w = browser(site.as_uri())
    for p in pages(site):
        w.page.goto(p.as_uri())
        if p.name in ('search.html','genindex.html'): continue
        heads = w.page.evaluate("[...document.querySelectorAll('article h1,article h2,article h3,article h4')].map(o=>+o.tagName[1])")
        assert heads.count(1)==1 and all(b<=a+1 for a,b in zip(heads, heads[1:])), f'{p.name}: headings {heads}'
        broken = w.page.evaluate("[...document.images].filter(o=>!o.complete||!o.naturalWidth||!o.alt).map(o=>o.src)")
        assert not broken, f'{p.name}: {broken}'
        assert w.page.evaluate("document.querySelectorAll('.math, script[src*=math]').length")==0
        w.clean()

def test_plots_and_formulas_are_there(browser, site):
    w = browser(site.as_uri())
    w.page.goto((site/'11b_interpret.html').as_uri())
    assert w.page.locator('img.plot').count()>=3
    w.page.goto((site/'04_losses.html').as_uri())
    assert w.page.locator('math').count()>=3
    assert w.page.locator('math').first.bounding_box()['width']>20
    w.clean()

@pytest.mark.parametrize('how', ['file','http'])
def test_search_finds_a_function_and_lands_on_it(browser, site, served, how):
    base = site.as_uri()+'/' if how=='file' else served
    w = browser(base.rstrip('/'))
    w.page.goto(base+'index.html')
    w.page.fill('input[name=q]', 'similar_items')
    w.page.keyboard.press('Enter')
    link = w.page.locator('#search-results li a[href$="#cfext.CFLearner.similar_items"]').first # there are others of the name, and results arrive one by one
    link.wait_for()
    link.click()
    w.page.wait_for_url('**#cfext.CFLearner.similar_items')
    w.page.wait_for_function('''() => {
        const y = document.getElementById('cfext.CFLearner.similar_items').getBoundingClientRect().y
        return 0<=y && y<innerHeight }''') # pictures above it may still be arriving
    w.clean()

def test_dark_and_narrow(browser, site):
    ground = {}
    for dark in (False,True):
        w = browser(site.as_uri(), dark=dark, width=390, height=780)
        for name in ('index','10_recommend','tutorials/training_loop','benchmarks/lesson'):
            w.page.goto((site/f'{name}.html').as_uri())
            assert w.page.evaluate('document.scrollingElement.scrollWidth<=innerWidth'), f'{name} is wider than the screen'
        ground[dark] = w.page.evaluate("getComputedStyle(document.body).backgroundColor")
        w.clean()
    assert ground[False]!=ground[True]

@pytest.mark.parametrize('dark', [False,True])
def test_everybody_can_use_it(browser, site, dark):
    w = browser(site.as_uri(), dark=dark)
    for name in ('index','10_recommend','benchmarks/index','benchmarks/lesson','benchmarks/emb_sizes','pages/from_fastai','tutorials/from_scratch') if dark else ('index','10_recommend','04_losses','pages/own_data','tutorials/from_scratch','benchmarks/index','benchmarks/lesson'):
        w.page.goto((site/f'{name}.html').as_uri())
        assert not (f := faults(w.page)), f'{name}: {f}'
