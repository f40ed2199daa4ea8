"The project's own order: notebooks and modules in step, imports downhill, no name of fastai's taken, nothing done on import"
import ast,importlib,json,re,subprocess,sys
from pathlib import Path

import pytest
from conftest import root

nbs = sorted((root/'nbs').glob('[0-9]*.ipynb'))
all_nbs = sorted((root/'nbs').rglob('*.ipynb'))

def cells(p): return [(c['cell_type'], ''.join(c['source']), c) for c in json.loads(p.read_text())['cells']]
def module_of(p): return next(m[1] for t,s,_ in cells(p) if (m := re.search(r'#\|\s*default_exp\s+(\w+)', s)))

def test_modules_are_what_the_notebooks_export(tmp_path):
    from nbdev.export import nb_export
    for p in nbs:
        nb_export(p, lib_path=tmp_path)
        name = f'{module_of(p)}.py'
        strip = lambda s: re.sub(r'(# %% |File to edit: )\S*?nbs/', r'\1nbs/', s).replace('from cfext.', 'from .')
        assert strip((tmp_path/name).read_text()) == strip((root/'cfext'/name).read_text()), f'{p.name}: run `make export`'

def test_every_module_has_a_notebook():
    mods = {p.stem for p in (root/'cfext').glob('*.py')} - {'__init__','_modidx'}
    assert mods == {module_of(p) for p in nbs}

def test_index_of_names_is_current():
    idx = (root/'cfext'/'_modidx.py').read_text()
    for p in nbs: assert f"'cfext.{module_of(p)}'" in idx, f'{p.name}: run `make export`'

def test_imports_go_downhill():
    order = {module_of(p): i for i,p in enumerate(nbs)}
    for m,i in order.items():
        for node in ast.walk(ast.parse((root/'cfext'/f'{m}.py').read_text())):
            if not isinstance(node, ast.ImportFrom): continue
            base = (node.module or '').removeprefix('cfext.') if node.level or (node.module or '').startswith('cfext') else None
            for b in ([base] if base else []):
                if b in order: assert order[b] < i, f'{m} imports {b}, which comes later'

def test_star_imports_are_of_fastai_fastcore_cfext():
    for p in (root/'cfext').glob('*.py'):
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.ImportFrom) and node.names[0].name=='*':
                assert node.level or node.module.split('.')[0] in ('fastai','fastcore','cfext'), f'{p.name}: {node.module}'

def test_what_modules_import_is_required():
    "Each package that a module imports as it is imported is a requirement, or a direct one of a requirement; triton may be missing"
    from configparser import ConfigParser
    from importlib.metadata import packages_distributions,requires
    cfg = ConfigParser(interpolation=None)
    cfg.read(root/'settings.ini')
    name = lambda r: re.match(r'[\w.-]+', r)[0].lower()
    own = {name(r) for r in cfg['DEFAULT']['requirements'].split()}
    given = own | {name(r) for o in own for r in requires(o) or [] if 'extra ==' not in r}
    dists = packages_distributions()
    for p in (root/'cfext').glob('*.py'):
        for node in ast.walk(ast.parse(p.read_text())):
            mods = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for m in {m.split('.')[0] for m in mods} - sys.stdlib_module_names - {'cfext','triton'}:
                assert {o.lower() for o in dists.get(m, [m])} & given, f'{p.name} imports {m}, which settings.ini does not require'

def test_no_public_name_of_fastai_is_taken():
    import cfext
    import fastai.collab,fastai.tabular.all,fastai.vision.all,fastai.text.all,fastai.callback.all
    for mod in (fastai.tabular.all, fastai.vision.all, fastai.text.all, fastai.callback.all, fastai.collab):
        for n in cfext.__all__:
            assert not hasattr(mod, n) or getattr(mod, n) is getattr(cfext, n), f'{n} is a name of {mod.__name__}'

def test_star_import_gives_our_names_only():
    import cfext
    ns = {}
    exec('from cfext import *', ns)
    assert set(ns)-{'__builtins__'} == set(cfext.__all__)
    assert len(cfext.__all__) == len(set(cfext.__all__))

def run(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)

def test_importing_seeds_and_patches_nothing():
    r = run('''
import random,warnings
import numpy as np,torch
from fastai.tabular.all import *
from fastai.collab import *
from fastai.vision.all import *
random.seed(1); np.random.seed(1); torch.manual_seed(1)
classes = [Learner, DataLoaders, DataLoader, TfmdDL, Callback, CollabDataLoaders, TabularModel, Recorder, torch.nn.Module, torch.Tensor]
before = [dict(vars(c)) for c in classes]
cbs,filters = list(defaults.callbacks),list(warnings.filters)
state = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
import cfext, cfext.cli
assert state == (random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()), 'a generator moved'
for c,b in zip(classes, before):
    new = {k for k in vars(c) if k not in b or vars(c)[k] is not b[k]} - {'__abstractmethods__','_abc_impl','__annotations__'}
    assert not new, f'{c.__name__} was patched: {new}'
assert list(defaults.callbacks)==cbs
assert list(warnings.filters)==filters, 'warning filters changed'
''')
    assert r.returncode==0, r.stderr[-2000:]

def test_notebooks_are_clean():
    for p in all_nbs:
        nb = json.loads(p.read_text())
        for t,s,c in cells(p):
            assert not re.search(r'TODO|FIXME', s), f'{p.name}: unfinished: {s[:80]}'
            if t=='code':
                for o in c['outputs']: assert o['output_type']!='error', f'{p.name}: a stored error'

def test_no_path_of_a_machine():
    files = subprocess.run(['git','ls-files'], cwd=root, capture_output=True, text=True).stdout.split()
    for f in files:
        p = root/f
        if p.suffix in ('.py','.ipynb','.md','.toml','.ini','.json','.yaml','') and p.is_file():
            m = re.search(r'(?<![\w.])/(?:home|root|Users|work)/\w+', p.read_text(errors='ignore'))
            assert not m, f'{f}: {m[0]}'

def test_readme_is_made_from_the_index():
    sys.path.insert(0, str(root/'docs'))
    from readme import to_markdown
    assert (root/'README.md').read_text() == to_markdown(root/'nbs'/'index.ipynb'), 'run `make readme`'

def test_readme_has_the_figures_of_the_records(monkeypatch):
    "The table, made anew from the records"
    monkeypatch.chdir(root/'nbs')
    cells = [c for c in json.loads((root/'nbs'/'index.ipynb').read_text())['cells'] if c['cell_type']=='code']
    env = {}
    *body,last = [''.join(c['source']) for c in cells[:2]]
    exec('\n'.join(body), env)
    *lines,shown = last.splitlines()
    exec('\n'.join(lines), env)
    table = eval(shown, env).data
    assert table.count('\n')>=8 and table in (root/'README.md').read_text(), 'run index.ipynb anew, then `make readme`'

def test_metadata_is_complete():
    meta = importlib.metadata.metadata('cfext')
    assert meta['License-Expression']=='Apache-2.0' or meta['License']=='Apache-2.0'
    reqs = ' '.join(meta.get_all('Requires-Dist'))
    for n in ('fastai','torch','safetensors'): assert n in reqs
    assert {'gbm','ann','tune','fast-io','dev'} <= set(meta.get_all('Provides-Extra'))
    assert meta['Author'] and meta['Keywords'] and meta['Summary']
    assert [e.value for e in importlib.metadata.entry_points(group='console_scripts') if e.name=='cfext'] == ['cfext.cli:main']
