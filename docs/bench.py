"""A page for each record in benchmarks/: date, machine, command, every table in it with bars, and the script."""
import ast,html,json,re

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
    return ', '.join(o for o in (f'{n} x {cpu}', f"{m['ram_gib']} GiB" if 'ram_gib' in m else '', m.get('gpu') or '', f"{m['threads']} thread(s)" if 'threads' in m else '') if o)

def versions(d):
    v = find(d, 'versions') or {k:o for k,o in (find(d, 'machine') or {}).items() if k in ('python','torch','fastai','pandas','numpy')} \
        if isinstance(find(d, 'machine'), dict) or find(d, 'versions') else {}
    return ', '.join(f'{k} {o}' for k,o in v.items())

def page(f, script):
    "Title, first words of the script, and the page of a record"
    d,src = json.loads(f.read_text(encoding='utf-8')),script.read_text(encoding='utf-8') if script.exists() else ''
    doc = (ast.get_docstring(ast.parse(src)) or '') if src else ''
    what = doc.split('\n\n')[0].replace('\n', ' ')
    head = re.split(r'[:.?]( |$)', what)[0].replace('`', '')
    title = head if 0<len(head)<=70 else f.stem.replace('_', ' ').capitalize()
    meta = {'date':find(d, 'date'), 'machine':machine(find(d, 'machine')), 'versions':versions(d), 'command':find(d, 'command')}
    rows = ''.join(f'<tr><th scope="row">{k}</th><td>{html.escape(str(v))}</td></tr>' for k,v in meta.items() if v)
    body = '\n'.join(tables(d))
    raw = lambda s: f'`````{{raw}} html\n{s}\n`````'
    parts = [f'# {title}', html.escape(what).replace('$', r'\$'), raw(f'<div class="table-wrapper"><table class="frame meta"><tbody>{rows}</tbody></table></div>'),
             '## Results', raw(body), '## Script', f'`benchmarks/{script.name}`', f'``````{{code-block}} python\n{src}\n``````']
    return title,what,meta,'\n\n'.join(parts)+'\n'

def write_benchmarks(src, out):
    "A page a record, and a page of all; returns the names"
    out.mkdir(parents=True, exist_ok=True)
    done = {}
    for f in sorted(src.glob('*.json')):
        title,what,meta,md = page(f, f.with_suffix('.py'))
        (out/f'{f.stem}.md').write_text(md, encoding='utf-8')
        done[f.stem] = (title,what,meta)
    rows = [f"| [{t}]({n}.md) | {w.replace('|', chr(92)+'|').replace('$', chr(92)+'$')} | {(m['date'] or '').replace('-', chr(0x2011))} |" for n,(t,w,m) in done.items()]
    text = ['# Benchmarks', '> Every figure with its date, its machine, its command and its script', '',
            'Each page is made from the record that a script in `benchmarks/` wrote, and shows all that is in it. Figures of quality are of held-out rows, '
            'choices were made on validation rows; times are of the machine that is named, side by side in one run.', '',
            '| record | what is measured | date |', '|---|---|---|', *rows, '', '```{toctree}\n:hidden:\n\n' + '\n'.join(done) + '\n```']
    (out/'index.md').write_text('\n'.join(text)+'\n', encoding='utf-8')
    return done
