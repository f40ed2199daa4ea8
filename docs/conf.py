"""Sphinx's settings; `python docs/build.py` writes the sources that it reads."""
import re
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

here = Path(__file__).resolve().parent
project,author,copyright = 'cfext','the cfext developers','the cfext developers'
version = release = re.search(r'__version__ = "([^"]+)"', (here.parent/'cfext'/'__init__.py').read_text())[1]
extensions = ['myst_parser']
myst_enable_extensions = ['dollarmath','attrs_block','attrs_inline','deflist']
myst_heading_anchors = 4
myst_dmath_double_inline = True
html_theme,html_title = 'furo',f'cfext {release}'
html_static_path = [str(here/'static')]
html_favicon = str(here/'static'/'icon.svg')
html_css_files,html_js_files = ['site.css'],['site.js']
html_copy_source = html_show_sourcelink = html_show_sphinx = html_show_copyright = False
html_theme_options = dict(top_of_page_buttons=[], light_css_variables={'color-brand-primary':'#0b5cad','color-brand-content':'#0b5cad'},
                          dark_css_variables={'color-brand-primary':'#7cb7ff','color-brand-content':'#7cb7ff'})
html_math_renderer = 'mathml'
add_module_names,toc_object_entries_show_parents = False,'hide'
python_maximum_signature_line_length = 90
nitpicky = True
nitpick_ignore_regex = [('py:(class|data|exc)', '.*')]
suppress_warnings = ['myst.header']

def _mathml(tex, display):
    label = tex.replace('&', '&amp;').replace('"', '&quot;').replace('<', '&lt;')
    return convert(tex, display=display).replace('<math ', f'<math aria-label="{label}" ', 1)

def setup(app):
    def inline(self, node):
        self.body.append(_mathml(node.astext(), 'inline'))
        raise SkipNode
    def block(self, node):
        self.body.append('<div class="math-block">' + _mathml(node.astext(), 'block') + '</div>')
        raise SkipNode
    app.add_html_math_renderer('mathml', (inline,None), (block,None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
