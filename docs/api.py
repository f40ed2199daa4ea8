"""What the exported cells define, read from their text: signatures, docments, errors. Nothing is imported or run."""
import ast,re
from dataclasses import dataclass,field

@dataclass
class Param:
    name:str
    anno:str
    default:str
    doc:str

@dataclass
class Sym:
    "A public function, class, method or property"
    name:str # qualified: `f`, `C` or `C.m`
    kind:str # function, class, method, property
    sig:str = ''
    returns:str = ''
    doc:str = ''
    params:list = field(default_factory=list)
    ret:Param = None
    raises:list = field(default_factory=list) # (error, message)
    methods:list = field(default_factory=list)
    more:str = '' # what further keyword arguments are passed to
    async_:bool = False

_no_page = {'forward','extra_repr','encodes','decodes','setups'}

def _text(node): return '' if node is None else ast.unparse(node)
def _public(name): return not name.startswith('_')
def _own_page(name): return _public(name) and name not in _no_page and not name.startswith(('before_','after_'))

def _comment(lines, lineno, col):
    "The docment after a piece of code that ends at (lineno, col)"
    m = re.match(r'[\s,()\]:]*(?:->.*?)?#\s?(.*)', lines[lineno-1][col:])
    return m[1].strip() if m else ''

def _after(lines, node): return _comment(lines, node.end_lineno, node.end_col_offset)

def _params(f, lines):
    "Parameters of a function with their docments, in order; and the text of its signature"
    a,pos = f.args,[*f.args.posonlyargs, *f.args.args]
    defaults = dict(zip([o.arg for o in pos[len(pos)-len(a.defaults):]], a.defaults))
    defaults.update({o.arg:d for o,d in zip(a.kwonlyargs, a.kw_defaults) if d is not None})
    res = []
    for pre,os in (('',pos), ('*',[a.vararg] if a.vararg else []), ('',a.kwonlyargs), ('**',[a.kwarg] if a.kwarg else [])):
        for o in os:
            d = defaults.get(o.arg)
            res.append(Param(pre+o.arg, _text(o.annotation), _text(d), _after(lines, d if d is not None else o)))
    return res

def _signature(f, drop_first):
    a = ast.parse(ast.unparse(f.args) and f'def f({ast.unparse(f.args)}): pass').body[0].args if ast.unparse(f.args) else f.args
    if drop_first: (a.posonlyargs or a.args).pop(0)
    if len(a.defaults)>len(a.posonlyargs)+len(a.args): a.defaults.pop(0)
    return ast.unparse(a)

def _message(call):
    "The words of an error, with what is filled in shown as `{...}`"
    args = call.args if isinstance(call, ast.Call) else []
    if isinstance(call, ast.Call) and _text(call.func)=='UnknownIdError': return 'ids that training has not seen'
    s = next((ast.unparse(o) if not isinstance(o, ast.Constant) else o.value for o in args if isinstance(o, (ast.Constant,ast.JoinedStr))), '')
    for o in args:
        if isinstance(o, ast.JoinedStr):
            s = ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in o.values)
            break
    return s.strip() if isinstance(s, str) else ''

def _raises(f):
    res = []
    for o in ast.walk(f):
        if isinstance(o, ast.Raise) and o.exc is not None:
            n = _text(o.exc.func if isinstance(o.exc, ast.Call) else o.exc)
            if n.endswith('Error') and (n,m := _message(o.exc)) not in res: res.append((n,m))
    return res

def _decorators(o): return [_text(d) for d in o.decorator_list]

def _function(f, src, cls=None):
    "A function, or a method of `cls`"
    lines,decs = src.splitlines(),_decorators(f)
    prop = 'property' in decs or any('as_prop=True' in d for d in decs)
    drop = cls is not None and 'staticmethod' not in decs
    ps = _params(f, lines)[drop:]
    more = next((d[len('delegates('):-1].split(',')[0] for d in decs if d.startswith('delegates(')), '')
    ret = Param('', _text(f.returns), '', _after(lines, f.returns)) if f.returns is not None else None
    return Sym(f'{cls}.{f.name}' if cls else f.name, 'property' if prop else 'method' if cls else 'function', _signature(f, drop), _text(f.returns),
               ast.get_docstring(f) or '', ps, ret, _raises(f), more=more, async_=isinstance(f, ast.AsyncFunctionDef))

def _class(c, src):
    lines,init = src.splitlines(),next((o for o in c.body if isinstance(o, ast.FunctionDef) and o.name=='__init__'), None)
    res = Sym(c.name, 'class', doc=ast.get_docstring(c) or '')
    if init is not None:
        f = _function(init, src, c.name)
        res.sig,res.params,res.raises,res.more = f.sig,f.params,f.raises,f.more
    elif any('dataclass' in d for d in _decorators(c)) or any(_text(b)=='NamedTuple' for b in c.bases):
        flds = [o for o in c.body if isinstance(o, ast.AnnAssign)]
        res.params = [Param(o.target.id, _text(o.annotation), _text(o.value), _after(lines, o.value or o.annotation)) for o in flds]
        res.sig = ', '.join(p.name + (f': {p.anno}' if p.anno else '') + (f' = {p.default}' if p.default else '') for p in res.params)
    for o in c.body:
        if isinstance(o, (ast.FunctionDef,ast.AsyncFunctionDef)) and _own_page(o.name) and not any(d.endswith('.setter') for d in _decorators(o)):
            m = _function(o, src, c.name)
            if m.doc or any(p.doc for p in m.params) or (m.ret and m.ret.doc): res.methods.append(m)
    return res

def symbols(src):
    "The public names that the source of an exported cell defines, in order"
    res = []
    for o in ast.parse(src).body:
        if isinstance(o, ast.ClassDef) and _public(o.name): res.append(_class(o, src))
        if not isinstance(o, (ast.FunctionDef,ast.AsyncFunctionDef)): continue
        if any(d.startswith('patch') for d in _decorators(o)):
            anno = o.args.args[0].annotation
            for c in re.split(r'\s*\|\s*', _text(anno)):
                if c and _public(c) and _own_page(o.name): res.append(_function(o, src, c))
        elif _public(o.name): res.append(_function(o, src))
    return res
