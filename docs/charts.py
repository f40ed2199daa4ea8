"""Charts that need no script and no outside font: tables with dots or bars in their last column, and lines on logarithmic axes."""
import html,math
from typing import NamedTuple

def is_num(v): return isinstance(v, (int,float)) and not isinstance(v, bool) and math.isfinite(v)

def num(v, digits=4):
    "A number as one would say it: thousands with commas, else so many digits that count"
    if not is_num(v): return ''
    if isinstance(v, int) or abs(v)>=1000: return f'{v:,.0f}'
    s = f'{v:.{digits}g}'
    return s if 'e' not in s else f'{v:.2g}'

class Row(NamedTuple):
    "A line of a chart"
    name:str
    values:list # one number, or one for each seed or fold
    marks:dict = {} # {what: number} to hold against, such as published figures
    ours:bool = False
    note:str = ''

def _mean(vs): return sum(vs)/len(vs)
def _sd(vs): return (sum((v-_mean(vs))**2 for v in vs)/(len(vs)-1))**0.5

def said(vs):
    "Mean and spread in words"
    return num(_mean(vs)) + (f' ± {num(_sd(vs) if _sd(vs)>1e-9*abs(_mean(vs)) else 0, 2)}' if len(vs)>1 else '')

def _ticks(lo, hi, n=4):
    "About `n` round numbers from lo to hi"
    step = 10**math.floor(math.log10((hi-lo)/n))
    step *= next(m for m in (1,2,2.5,5,10) if (hi-lo)/(step*m)<=n)
    return [round(i*step, 10) for i in range(math.ceil(lo/step-1e-9), math.floor(hi/step+1e-9)+1)]

def _drawn(r, at, bars):
    "A bar, or a dot for each value and a tick for their mean; and the marks"
    spot = lambda cls,v,title='': f'<i class="{cls}" style="left:{at(v):.2f}%"{title}></i>'
    ours = f'<i class="bar" style="width:{at(_mean(r.values)):.2f}%"></i>' if bars else \
        ''.join(spot('dot', v) for v in r.values if len(r.values)>1) + spot('mean', _mean(r.values))
    return ours + ''.join(spot('mark', v, f' title="{html.escape(k)}: {num(v)}"') for k,v in r.marks.items())

def chart(rows, title, unit='', *, bars=False, less=None, head='', note=''):
    "A table whose last column is drawn: bars from zero, or dots with their mean on an axis of their own; marks are what is held against"
    rows = [r._replace(values=[v for v in r.values if is_num(v)], marks={k:v for k,v in r.marks.items() if is_num(v)}) for r in rows]
    rows = [r for r in rows if r.values]
    if not rows: return ''
    every = [v for r in rows for v in (*r.values, *r.marks.values())]
    lo,hi = (0,max(every)) if bars else (min(every),max(every))
    pad = 0 if bars else (hi-lo)*.04 or abs(hi)*.05 or 1
    lo,hi = lo-pad,(hi+pad) or 1
    at = lambda v: 100*(v-lo)/(hi-lo)
    marked = any(r.marks for r in rows)
    axis = '' if bars else ''.join(f'<span style="left:{at(t):.2f}%">{num(t)}</span>' for t in _ticks(lo, hi))
    way = '' if less is None else ', less is better' if less else ', more is better'
    body = ''
    for r in rows:
        held = f'<td class="held">{"; ".join(f"{html.escape(k)} {num(v)}" for k,v in r.marks.items())}</td>' if marked else ''
        name = html.escape(r.name) + (f' <small>{html.escape(r.note)}</small>' if r.note else '')
        body += f'<tr{" class=ours" if r.ours else ""}><th scope="row">{name}</th><td class="said">{said(r.values)}</td>{held}<td class="draw"><div>{_drawn(r, at, bars)}</div></td></tr>'
    heads = f'<th scope="col">{html.escape(head or "what")}</th><th scope="col">{html.escape(unit or "value")}</th>' + ('<th scope="col">held against</th>' if marked else '')
    return (f'<div class="table-wrapper"><table class="chart"><caption>{html.escape(title)}<small>{way}{"; " + html.escape(note) if note else ""}</small></caption>'
            f'<thead><tr>{heads}<td class="draw"><div class="axis" aria-hidden="true">{axis}</div></td></tr></thead><tbody>{body}</tbody></table></div>')

def _power(v):
    "A tick of a logarithmic axis"
    for n,s in ((10**9,'G'),(10**6,'M'),(10**3,'k')):
        if v>=n: return f'{v/n:g}{s}'
    return f'{v:g}'

def _log_axis(vs):
    "Ends and ticks of a logarithmic axis: powers of ten, with twos and fives between them where there are few"
    lo,hi = min(vs)*.8,max(vs)*1.25
    for steps in ((1,),(1,3),(1,2,5),(1,1.5,2,3,4,5,6,8)):
        ticks = [m*10.**e for e in range(math.floor(math.log10(lo)), math.ceil(math.log10(hi))+1) for m in steps if lo<=m*10.**e<=hi]
        if len(ticks)>=3: break
    return lo,hi,ticks

def lines(series, title, x='', y=''):
    "Lines through {x: y} of one or two series, both axes logarithmic, as a picture with its numbers in words"
    pts = {n:[(float(a),float(b)) for a,b in s.items() if is_num(b) and float(a)>0 and b>0] for n,s in series.items()}
    pts = {n:p for n,p in pts.items() if p}
    if not pts: return ''
    w,h,left,top,bot = 380,250,52,14,40
    x0,x1,xt = _log_axis([a for p in pts.values() for a,_ in p])
    y0,y1,yt = _log_axis([b for p in pts.values() for _,b in p])
    px = lambda v: left+(w-left-12)*math.log(v/x0)/math.log(x1/x0)
    py = lambda v: h-bot-(h-bot-top)*math.log(v/y0)/math.log(y1/y0)
    words = '; '.join(f'{n}: ' + ', '.join(f'{_power(a)} {num(b)}' for a,b in p) for n,p in pts.items())
    out = [f'<svg class="lines" viewBox="0 0 {w} {h}" role="img" aria-label="{html.escape(f"{title}. {x} and {y}: {words}")}">']
    for t in yt: out.append(f'<line class="grid" x1="{left}" x2="{w-12}" y1="{py(t):.1f}" y2="{py(t):.1f}"/><text x="{left-6}" y="{py(t)+4:.1f}" text-anchor="end">{_power(t)}</text>')
    for t in xt: out.append(f'<text x="{px(t):.1f}" y="{h-bot+16}" text-anchor="middle">{_power(t)}</text>')
    for i,(n,p) in enumerate(pts.items()):
        out.append(f'<polyline class="s{i}" points="{" ".join(f"{px(a):.1f},{py(b):.1f}" for a,b in p)}"/>')
        out += [f'<circle class="s{i}" cx="{px(a):.1f}" cy="{py(b):.1f}" r="3.5"><title>{_power(a)}: {num(b)}</title></circle>' for a,b in p]
    out.append(f'<text x="{(left+w)/2:.0f}" y="{h-6}" text-anchor="middle">{html.escape(x)}</text></svg>')
    key = ' '.join(f'<span class="key s{i}">{html.escape(n)}</span>' for i,n in enumerate(pts)) if len(pts)>1 else ''
    return f'<figure class="lines"><figcaption>{html.escape(title)} <small>{html.escape(y)}</small> {key}</figcaption>{"".join(out)}</figure>'

def together(figures):
    "Pictures side by side, where there is room"
    return f'<div class="figures">{"".join(figures)}</div>' if any(figures) else ''
