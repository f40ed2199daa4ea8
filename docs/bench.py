"""A page for each record in benchmarks/: date, machine, command, charts, what it is held against, every figure in it, and the script."""
import ast,html,json,re

from charts import num
from pages import esc
from records import view

about = ('date','machine','command','versions','env','load_average')
charted = re.compile(r'^(mean|rmse|mape|mse|secs|seconds|s_per_epoch|valid_nll|recall@\d+|ndcg@\d+|accuracy|log loss|us_a_row|ms)$', re.I)

def is_num(v): return isinstance(v, (int,float)) and not isinstance(v, bool)
def is_scalar(v): return is_num(v) or isinstance(v, (str,bool))

def show(v):
    if v is None: return ''
    if isinstance(v, bool): return 'yes' if v else 'no'
    if is_num(v): return f'{v:,}' if isinstance(v, int) else f'{v:,.0f}' if abs(v)>=1000 else f'{v:.4g}'
    if isinstance(v, list): return ', '.join(map(show, v)) if len(v)<=8 and all(map(is_scalar, v)) else f'{len(v)} values'
    if isinstance(v, dict): return ', '.join(f'{k} {show(o)}' for k,o in v.items())
    return str(v) if len(str(v))<=160 else str(v)[:157]+'…'

def bar(v, most, sd=None):
    "A cell with a number and a bar of its size"
    s = show(v) + (f' ± {show(sd)}' if is_num(sd) else '')
    return f'<td class="num">{html.escape(s)}<span class="bar" style="width:{max(1, 100*v/most):.1f}%"></span></td>' if most>0 and v>=0 else f'<td class="num">{s}</td>'

def html_table(rows, cols, title):
    "Rows {name: {column: value}}, with bars in the columns that are worth comparing"
    most = {c: max([r[c] for r in rows.values() if is_num(r.get(c))], default=0) for c in cols if charted.match(c) and len(rows)>1}
    head = ''.join(f'<th scope="col">{html.escape(c)}</th>' for c in cols)
    body = ''
    for n,r in rows.items():
        cells = [bar(r[c], most[c], r.get('sd') if c=='mean' else None) if c in most and is_num(r.get(c)) else f'<td>{html.escape(show(r.get(c)))}</td>' for c in cols]
        body += f'<tr><th scope="row">{html.escape(str(n))}</th>{"".join(cells)}</tr>'
    cap = f'<caption>{html.escape(title)}</caption>' if title else ''
    return f'<div class="table-wrapper bench"><table class="frame">{cap}<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'

def by_name(v):
    "A list of dicts as {name: dict}, if it is one"
    if not (isinstance(v, list) and v and all(isinstance(o, dict) for o in v)): return v
    name = lambda i,o: next((o[k] for k in ('rule','name','model','what') if isinstance(o.get(k), str)), str(i+1))
    return {f'{name(i,o)}' if len({name(j,p) for j,p in enumerate(v)})==len(v) else f'{i+1}. {name(i,o)}': o for i,o in enumerate(v)}

def tables(d, path=()):
    "HTML tables of a nested record, outermost first"
    d = {str(k):by_name(v) for k,v in d.items() if k not in about and v is not None}
    own = {k:v for k,v in d.items() if is_scalar(v) or (isinstance(v, list) and not isinstance(v, dict))}
    subs = {k:v for k,v in d.items() if isinstance(v, dict) and v}
    nums = own and all(map(is_num, own.values())) and len(own)>1
    title = ' · '.join(path)
    if nums and charted.match(path[-1] if path else ''): yield html_table({k:{path[-1]:v} for k,v in own.items()}, [path[-1]], title)
    elif own: yield html_table({k:{'value':v} for k,v in own.items()}, ['value'], title)
    rows = {k:{c:o for c,o in v.items() if c not in about and (is_scalar(o) or isinstance(o, list) and len(o)<=8 and all(map(is_scalar, o)))} for k,v in subs.items()}
    cols = list(dict.fromkeys(c for r in rows.values() for c in r))
    if 'mean' in cols and 'sd' in cols: cols.remove('sd')
    same = len(subs)>1 and 0<len(cols)<=10 and sum(bool(r) for r in rows.values())>1
    if same: yield html_table({k:r for k,r in rows.items() if r}, cols, title)
    for k,v in subs.items():
        rest = {c:o for c,o in v.items() if not (same and c in rows[k])}
        rest = {c:o for c,o in rest.items() if not (isinstance(o, list) and by_name(o) is o)} if same else rest
        if rest: yield from tables(rest, (*path,k))

def find(d, key):
    "The first value of a key, at any depth"
    if not isinstance(d, dict): return None
    if d.get(key) is not None: return d[key]
    return next((v for o in d.values() if (v := find(o, key)) is not None), None)

def machine(m):
    if not isinstance(m, dict): return str(m or 'not recorded')
    n,cpu = m.get('cores', m.get('cpus')),m.get('cpu', m.get('model'))
    return ', '.join(o for o in (f'{n} x {cpu}', f"{m['ram_gib']} GiB" if 'ram_gib' in m else '', m.get('gpu') or '', f"{m['threads']} thread{'s' if m['threads']!=1 else ''}" if 'threads' in m else '') if o)

def versions(d):
    v = find(d, 'versions') or {k:o for k,o in (find(d, 'machine') or {}).items() if k in ('python','torch','fastai','pandas','numpy')} \
        if isinstance(find(d, 'machine'), dict) or find(d, 'versions') else {}
    return ', '.join(f'{k} {o}' for k,o in v.items())

def raw(s): return f'`````{{raw}} html\n{s}\n`````'

def manner(doc):
    "A script's docstring as Markdown: its commands as code"
    parts = []
    for p in doc.split('\n\n'):
        ls = p.split('\n')
        code = all(l.startswith(('    ','python ')) for l in ls)
        parts.append('```text\n'+'\n'.join(l.removeprefix('    ') for l in ls)+'\n```' if code else esc(' '.join(ls)))
    return '\n\n'.join(parts)

def held_table(held, links=None):
    "Figures beside what they are held against; `links`: a page for each"
    head = '| what | here | held against | its figure | outcome |\n|---|---|---|---|---|'
    if links: head = '| record '+head.replace('\n|', '\n|---|')
    line = lambda o: f'{esc(o.what)} | {num(o.got)} | {esc(o.source)} | {num(o.want)} | {o.outcome()} |'
    return '\n'.join([head, *[f'| {links[i] if links else ""}{" | " if links else ""}{line(o)}' for i,o in enumerate(held)]])

def page(f, script):
    "Title, first words of the script, the page of a record, and its view"
    d,src = json.loads(f.read_text(encoding='utf-8')),script.read_text(encoding='utf-8') if script.exists() else ''
    doc = (ast.get_docstring(ast.parse(src)) or '') if src else ''
    what = re.sub(r': python benchmarks/.*$', '.', doc.split('\n\n')[0].replace('\n', ' '))
    what = re.sub(r':$', '.', what)
    v = view(f.stem, d)
    title = v.title or f.stem.replace('_', ' ').capitalize()
    meta = {'date':find(d, 'date'), 'machine':machine(find(d, 'machine')), 'versions':versions(d), 'command':find(d, 'command')}
    rows = ''.join(f'<tr><th scope="row">{k}</th><td>{html.escape(str(o))}</td></tr>' for k,o in meta.items() if o)
    parts = [f'# {title}', esc(what), raw(f'<div class="table-wrapper"><table class="frame meta"><tbody>{rows}</tbody></table></div>')]
    charts = '\n'.join(o for o in v.parts if o)
    if charts: parts += ['## Results', raw(charts)]
    if v.held: parts += ['## Held against', held_table(v.held)]
    if v.short: parts += ['## Notes', '\n'.join(f'- {esc(o)}' for o in v.short)]
    if '\n\n' in doc: parts += ['## How it was measured', manner(doc[doc.index('\n\n')+2:])]
    body = '\n'.join(tables(d))
    whole = raw('<details class="src"><summary>every figure in the record</summary>'+body+'</details>') if charts else raw(body)
    parts += ['## The record', f'`benchmarks/{f.name}`', whole]
    if src: parts += ['## The script', f'`benchmarks/{script.name}`', raw('<details class="src"><summary>source</summary>'), f'``````{{code-block}} python\n{src}\n``````', raw('</details>')]
    return title,what,meta,v,'\n\n'.join(parts)+'\n'

def script_of(f):
    "The script that wrote a record: `loop.py` for `loop.json` and `loop_cpu.json`"
    s = f.with_suffix('.py')
    while not s.exists() and '_' in s.stem: s = s.with_name(s.stem.rpartition('_')[0]+'.py')
    return s if s.exists() else f.with_suffix('.py')

def awaited(src, done):
    "Scripts, and halves of scripts, whose record is not here: [(record, first words, command)]"
    res = []
    for f in sorted(src.glob('*.py')):
        text = f.read_text(encoding='utf-8')
        halves = re.findall(r"'(\w+)' if cuda else '(\1_cpu)'", text) or [(b,a) for a,b in re.findall(r"'(\w+)' if [\w.]*device=='cpu' else '(\1_gpu)'", text)]
        names = halves[0] if halves else (f.stem,)
        if '__main__' not in text or 'record(' not in text: continue
        for n in names:
            if n not in done and not any(k.startswith(f.stem+'_') for k in done if not halves):
                res.append((n, (ast.get_docstring(ast.parse(text)) or '').split('\n\n')[0].replace('\n', ' '), f'`python benchmarks/{f.name}`' + (', on a GPU' if halves and n==halves[0][0] else '')))
    return res

def write_benchmarks(src, out):
    "A page a record, and a page of all; returns the names"
    out.mkdir(parents=True, exist_ok=True)
    done,held,links = {},[],[]
    for f in sorted(src.glob('*.json')):
        title,what,meta,v,md = page(f, script_of(f))
        (out/f'{f.stem}.md').write_text(md, encoding='utf-8')
        done[f.stem] = (title,what,meta)
        held += v.held
        links += [f'[{title}]({f.stem}.md)' if not i else '' for i in range(len(v.held))]
    rows = [f"| [{t}]({n}.md) | {esc(w)} | {(m['date'] or '').replace('-', chr(0x2011))} |" for n,(t,w,m) in done.items()]
    said = [o.outcome().split()[0].strip(':') for o in held if o.outcome()]
    count = ', '.join(f'{said.count(w)} {w}' for w in ('ahead','even','behind'))
    machines = sorted({re.sub(', [0-9]+ threads?$', '', m['machine']) for _,_,m in done.values()})
    text = ['# Benchmarks', '> Every figure with its date, its machine, its command and its script', '',
            'Each page is made from the record that a script in `benchmarks/` wrote: only figures that others published were typed in. Figures of quality are of held-out rows, '
            'and choices were made on validation rows; times are of the machine that is named, side by side in one run. What fell short is [listed with the rest](#ahead-and-behind).', '',
            f'Machines: {esc("; ".join(machines))}.', '', '| record | what is measured | date |', '|---|---|---|', *rows]
    if wait := awaited(src, done):
        text += ['', '## Not recorded yet', '', 'These scripts have no record yet, so nothing is claimed of what they measure.', '',
                 '| record | what it would measure | command |', '|---|---|---|', *[f'| {n.replace("_", " ")} | {esc(w)} | {c} |' for n,w,c in wait]]
    text += ['', '## Ahead and behind', '', f'All comparisons of all records: {count}. A lesson or a paper mostly prints one run; *even* is a difference smaller than the spread of the seeds.', '', held_table(held, links),
             '', '```{toctree}\n:hidden:\n\n' + '\n'.join(done) + '\n```']
    (out/'index.md').write_text('\n'.join(text)+'\n', encoding='utf-8')
    return done
