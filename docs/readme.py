"""README.md from nbs/index.ipynb, as recorded: `python docs/readme.py`

A cell with `#| hide` is left out, one with `#| echo: false` shows only its output. Tables come as Markdown, everything else as text.
"""
import json,re
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def _text(o): return o if isinstance(o, str) else ''.join(o)

def _output(o):
    "Markdown of one output of a cell"
    data = o.get('data', {})
    if 'text/markdown' in data: return _text(data['text/markdown'])
    text = re.sub(r'\x1b\[[0-9;]*m', '', _text(data.get('text/plain', o.get('text', '')))).rstrip()
    return f'```\n{text}\n```' if text and not text.startswith('<') else ''

def to_markdown(nb:Path)->str:
    "The notebook as the README's text"
    parts = []
    for c in json.loads(Path(nb).read_text(encoding='utf-8'))['cells']:
        src = _text(c['source']).strip()
        flags = set(re.findall(r'^#\|\s*(\w+)', src, re.M))
        if 'hide' in flags: continue
        if c['cell_type']=='markdown': parts.append(src)
        else:
            code = re.sub(r'^#\|.*\n', '', src, flags=re.M).strip()
            if 'echo' not in flags: parts.append(f'```python\n{code}\n```')
            parts += [_output(o) for o in c['outputs'] if o['output_type'] in ('execute_result','display_data')]
    return '<!-- made from nbs/index.ipynb by `make readme` -->\n\n' + '\n\n'.join(p for p in parts if p) + '\n'

if __name__=='__main__': (root/'README.md').write_text(to_markdown(root/'nbs'/'index.ipynb'), encoding='utf-8')
