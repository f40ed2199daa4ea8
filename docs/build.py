"""The site from the notebooks, as recorded: `python docs/build.py [--out _docs]`. No notebook is run; `make outputs` does that."""
import argparse,shutil,subprocess,sys,time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pages import Writer,read_pages,root
from bench import write_benchmarks

# Modules by the number their notebook begins with: up to which number, and what they are about
groups = [(1,'Data'), (4,'Models and losses'), (8,'Training and predicting'), (11,'Lists, judging, explaining'),
          (14,'Ensembles, features, bundles'), (15,'Sequences'), (99,'From a shell')]

# How-tos and lessons in the order in which one would read them; others follow
order = 'from_fastai own_data choosing boosted_trees service lessons from_scratch training_loop entity_embeddings embedding_sizes road_to_the_top char_rnn'.split()

def toctree(caption, docs):
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(docs) + '\n```' if docs else ''

def contents(pages, bench):
    "The tables of contents that the start page carries for the side bar"
    number = lambda p: int(''.join(c for c in p.doc.split('_')[0] if c.isdigit()) or 99)
    place = lambda p: order.index(p.rel.stem) if p.rel.stem in order else len(order)
    of = lambda folder: [f'{p.title} <{p.doc}>' for p in sorted(pages, key=place) if p.rel.parts[0]==folder]
    parts = [toctree('How to', of('pages')), toctree('Lessons that run', of('tutorials'))]
    low = -1
    for top,name in groups:
        parts.append(toctree(name, [f'{p.title} <{p.doc}>' for p in pages if len(p.rel.parts)==1 and p.module and low<number(p)<=top]))
        low = top
    rest = ['benchmarks/index'] if bench else []
    return '\n\n'.join(o for o in [*parts, toctree('About', [*rest,'changelog','contributing'])] if o)

def write_sources(src):
    "All pages as Markdown under `src`"
    pages = read_pages()
    w = Writer(pages, src)
    for p in pages: w.write(p)
    bench = write_benchmarks(root/'benchmarks', src/'benchmarks')
    for n in ('CHANGELOG.md','CONTRIBUTING.md'): (src/n.lower()).write_text((root/n).read_text(encoding='utf-8'), encoding='utf-8')
    f = src/'index.md'
    f.write_text(f.read_text(encoding='utf-8')+'\n\n'+contents(pages, bench)+'\n', encoding='utf-8')

def build(out:Path, src:Path=root/'build'/'site', jobs='auto')->int:
    "Write the site into `out`, anew; any warning, such as a dead link, is a failure"
    for d in (out,src): shutil.rmtree(d, ignore_errors=True)
    src.mkdir(parents=True)
    write_sources(src)
    cmd = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', jobs, '-c', str(root/'docs'), '-d', str(src.parent/'doctrees'), str(src), str(out)]
    return subprocess.run(cmd).returncode

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--out', type=Path, default=root/'_docs', help='folder of the site')
    args,t = ap.parse_args(),time.time()
    rc = build(args.out)
    if rc==0: print(f"{len(list(args.out.rglob('*.html')))} pages in {time.time()-t:.0f} s: {args.out.name}/index.html")
    sys.exit(rc)
