"""Notebooks to MyST Markdown: prose as it is, code with its recorded output, exported cells as signatures and tables."""
import base64,json,os,re
from pathlib import Path

from api import symbols

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'

def text(o): return o if isinstance(o, str) else ''.join(o)

class Cell:
    "A cell of a notebook: its text without directives, and these"
    def __init__(self, c):
        self.kind,src,self.outputs = c['cell_type'],text(c['source']).strip(),c.get('outputs', [])
        self.flags = {k:(v or '').strip() for k,v in re.findall(r'^#\|\s*(\w+):?\s*(.*)$', src, re.M)} if self.kind=='code' else {}
        self.src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip() if self.kind=='code' else src
    exported = property(lambda self: bool({'export','exports'} & set(self.flags)))
    hidden = property(lambda self: bool({'hide','default_exp','exporti'} & set(self.flags)))

class Page:
    "A notebook that becomes a page"
    def __init__(self, path):
        self.path,self.rel = path,path.relative_to(nbs)
        self.cells = [Cell(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
        self.module = next((c.flags['default_exp'] for c in self.cells if 'default_exp' in c.flags), None)
        self.title = next((m[1] for c in self.cells if c.kind=='markdown' and (m := re.search(r'^# (.+)$', c.src, re.M))), path.stem)
        self.doc = self.rel.with_suffix('').as_posix()
        self.syms = {id(c): symbols(c.src) for c in self.cells if c.exported and c.kind=='code'}
    def names(self):
        for ss in self.syms.values():
            for s in ss: yield from (o.name for o in (s,*s.methods))

def read_pages(): return [Page(p) for p in sorted(nbs.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

class Linker:
    "Names in backticks to links: cfext's own within the site, those of fastai and fastcore to their pages"
    def __init__(self, pages):
        self.own = {n for p in pages for n in p.names()}
        from nbdev.doclinks import NbdevLookup
        self.other = NbdevLookup(strip_libs='fastai fastcore', incl_libs='fastai fastcore').syms
    def name(self, m):
        "A link for a name in backticks, which may be a call: `f`, `C.m`, `learn.m(x)`, `C(x).m`"
        s,shown = m[1].removeprefix('cfext.'),m[1]+(m[2] or '')
        for o in (s, f"CFLearner.{s.removeprefix('learn.')}") if s.startswith('learn.') else (s,):
            if o in self.own and not re.search('[<>`]', shown): return '{py:obj}`' + f'{shown} <cfext.{o}>`'
        url = self.other.get(s)
        url = url[0] if isinstance(url, tuple) else url
        clear = s[:1].isupper() or '_' in s
        return f'[`{shown}`]({url})' if url and url.startswith('https://') and clear else m[0]
    def __call__(self, md):
        "Link the names in Markdown, outside fences, links and headings"
        res,fence = [],None
        for l in md.split('\n'):
            if m := re.match(r'\s*(`{3,}|~{3,})', l): fence = None if fence and l.strip().startswith(fence) else fence or m[1]
            elif not fence and not l.startswith(('    ','#')): l = re.sub(r'(?<![\[`}])`([\w.]+)(\([^`]*\))?`(?!\]\(|`)', self.name, l)
            res.append(l)
        return '\n'.join(res)

def esc(s):
    "Plain text for Markdown, with what stands in backticks left alone"
    parts = re.split(r'(`[^`]*`)', s)
    return ''.join(p if i%2 else re.sub(r'([*_\[\]$<>{}|\\])', r'\\\1', p) for i,p in enumerate(parts))

def code(s, cell=True):
    "A code span, in a cell of a table or elsewhere"
    s = ' '.join(s.split())
    if cell: s = s.replace('|', r'\|')
    return f'`{s}`' if s and '`' not in s else f'`` {s} ``' if s else ''

def _cell_text(s, link): return link(re.sub(r'(`[^`]*`)', lambda m: m[0].replace('|', r'\|'), esc(s)))

def sym_md(s, link, fence=6, shown=()):
    "A signature, its table of parameters, what it returns and what it refuses, as a directive of Sphinx's Python domain"
    ticks,out = '`'*fence,[]
    opts = ':async:\n' if s.async_ else ''
    sig = s.name if s.kind=='property' else f'{s.name}({s.sig})' + (f' -> {s.returns}' if s.returns and s.kind!='class' else '')
    if s.kind=='property' and s.returns: opts += f':type: {s.returns}\n'
    out += [f'{ticks}{{py:{s.kind}}} {sig}', opts, link(esc(s.doc)), '']
    if any(p.doc for p in s.params):
        cols = [c for c in ('anno','default') if any(getattr(p, c) for p in s.params)]
        heads = ['argument', *[dict(anno='type', default='default')[c] for c in cols], 'meaning']
        out += ['| '+' | '.join(heads)+' |', '|---'*len(heads)+'|']
        for p in s.params: out.append('| '+' | '.join([code(p.name), *[code(getattr(p, c)) for c in cols], _cell_text(p.doc, link)])+' |')
        out.append('')
    if s.more: out += [f'Further keyword arguments go to {link(f"`{s.more}`")}.', '']
    if s.ret and (s.ret.doc or s.ret.anno) and s.ret.anno!='None': out += [f'**Returns** {code(s.ret.anno, cell=False)} {link(esc(s.ret.doc))}', '']
    if s.raises: out += ['**Raises**', '', *[f'- `{n}`' + (f': {esc(m)}' if m else '') for n,m in s.raises], '']
    for m in s.methods: out += ['', sym_md(m, link, fence-1), '']
    return '\n'.join(out + [ticks])

def fenced(s, lang, cls=''):
    ticks = '`'*max(3, 1+max(map(len, re.findall('`+', s)), default=2))
    return f'{ticks}{{code-block}} {lang}\n' + (f':class: {cls}\n' if cls else '') + f'\n{s}\n{ticks}'

def raw_html(s): return '`````{raw} html\n' + s + '\n`````'

def _html(s):
    "A table of pandas or of fastai's recorder, without its styles; `None` for a progress bar"
    s = re.sub(r'<style.*?</style>|<script.*?</script>', '', s, flags=re.S)
    if '<progress' in s and '<table' not in s: return None
    m = re.search(r'<table.*</table>', s, re.S)
    if not m: return raw_html(s) if s.strip() else None
    t = re.sub(r'<table[^>]*>', '<table class="frame">', m[0])
    t = re.sub(r'<th></th>', '<td></td>', t)
    t = re.sub(r'<tr style="[^"]*">', '<tr>', t)
    t = re.sub(r'(<tbody>.*</tbody>)', lambda b: b[0].replace('<th>', '<th scope="row">'), t, flags=re.S)
    return raw_html(f'<div class="table-wrapper frame">{t}</div>')

class Writer:
    "Pages to files under `out`"
    def __init__(self, pages, out):
        self.pages,self.out,self.link,self.n_img = pages,out,Linker(pages),0
        self.docs = {(p.rel.with_suffix('')).as_posix() for p in pages}
    def image(self, page, data, src):
        self.n_img += 1
        stem = page.doc.replace('/', '_')
        f = self.out/'_img'/f'{stem}_{self.n_img}.png'
        f.parent.mkdir(exist_ok=True, parents=True)
        f.write_bytes(base64.b64decode(text(data)))
        call = (re.findall(r'(\w+)\(', src) or ['the code above'])
        alt = f'Figure of {page.title}, drawn by {next((o for o in reversed(call) if o.startswith(("show","plot","draw"))), call[-1])}'
        return f'```{{image}} /_img/{f.name}\n:alt: {alt}\n:class: plot\n```'
    def output(self, page, o, src, with_image):
        if o['output_type']=='stream':
            s = re.sub(r'\x1b\[[0-9;]*m', '', text(o['text'])).rstrip()
            return fenced(s, 'text', 'output') if s and o['name']=='stdout' else None
        d = o.get('data', {})
        if 'text/markdown' in d and '<table' not in text(d['text/markdown']): return self.prose(page, text(d['text/markdown']))
        if 'image/png' in d: return self.image(page, d['image/png'], src)
        if 'text/html' in d: return _html(text(d['text/html']))
        s = re.sub(r'\x1b\[[0-9;]*m', '', text(d.get('text/plain', ''))).rstrip()
        if not s or re.match(r'<(Axes|Figure|matplotlib|IPython)|\[<|array\(\[<Axes|\(<Axes', s) or (with_image and s.startswith('<')): return None
        return fenced(s, 'text', 'output')
    def record(self, f):
        "The page of a script or record in benchmarks/; that of all where there is no record yet"
        return next((n for n in (f.stem,f'{f.stem}_cpu',f'{f.stem}_gpu') if f.with_name(f'{n}.json').exists()), 'index')
    def target(self, page, url):
        "A link in a notebook as a link of the site"
        if re.match(r'[a-z]+:|#', url): return url
        path,_,frag = url.partition('#')
        for base in (page.path.parent, root):
            f = Path(os.path.normpath(base/path))
            if f.suffix=='.html' and f.with_suffix('.ipynb').exists(): f = f.with_suffix('.ipynb') # as Quarto's pages are linked
            if not f.exists() or root not in f.parents: continue
            rel = f.relative_to(root).as_posix()
            up = '../'*page.doc.count('/')
            if f.suffix=='.ipynb': rel = f.relative_to(nbs).with_suffix('.md').as_posix()
            elif rel.startswith('benchmarks/') and f.suffix in ('.py','.json'): rel,frag = f'benchmarks/{self.record(f)}.md',''
            elif rel=='benchmarks': rel = 'benchmarks/index.md'
            elif rel in ('CONTRIBUTING.md','CHANGELOG.md'): rel = rel.lower()
            else: continue
            return f'{up}{rel}' + (f'#{frag}' if frag else '')
        return url
    def prose(self, page, md):
        md = re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({self.target(page, m[1])})', md)
        return self.link(md)
    def cell(self, page, c):
        if c.kind=='markdown': return [self.prose(page, c.src)]
        if c.hidden or c.kind!='code': return []
        if c.exported:
            syms = page.syms[id(c)]
            res = [sym_md(s, self.link) for s in syms]
            imports = not re.search(r'^(def|class|@|\w+ *=|for |async )', c.src, re.M)
            return res + ([] if imports else [raw_html('<details class="src"><summary>source</summary>'), fenced(c.src, 'python'), raw_html('</details>')])
        res = [] if c.flags.get('echo')=='false' or not c.src else [fenced(c.src, 'python')]
        image = any('image/png' in o.get('data', {}) for o in c.outputs)
        return res + [s for o in c.outputs if (s := self.output(page, o, c.src, image))]
    def write(self, page):
        parts = []
        for c in page.cells: parts += self.cell(page, c)
        if page.module: parts.insert(1, f'```{{py:currentmodule}} cfext\n```\n\n{{.source-line}}\n`cfext.{page.module}`, made from `nbs/{page.rel.as_posix()}`')
        f = self.out/f'{page.doc}.md'
        f.parent.mkdir(exist_ok=True, parents=True)
        f.write_text('\n\n'.join(p for p in parts if p) + '\n', encoding='utf-8')
        return f
