"""Everything that needs a GPU, one after another, each within its time: whether kernels compile, the tests that are marked `cuda`,
then the benchmarks.

    python benchmarks/gpu.py                        # all of it, eight minutes at the most
    OUT=results python benchmarks/gpu.py --minutes 5  # what five minutes allow, records into the folder `results`
    python benchmarks/gpu.py --only loop topk       # some of it

What comes first matters most: a piece that finds no time left, or runs out of its own, is named at the end, and the records of the
others stand. With OUT, how each ended and the last lines of what it said go to `gpu.json` there as soon as it has. A piece whose package
is missing is left out: pytest for the tests, implicit for topk."""
import argparse,os,shlex,subprocess,sys,threading,time
from collections import deque
from importlib.util import find_spec
from pathlib import Path

import torch

pieces = {'ready':    (60,  None, '-c "import sys; from cfext.kernels import kernel_ready; sys.exit(kernel_ready())"'),
          'kernels':  (120, 'pytest', '-m pytest -q --tb=short -p no:cacheprovider tests/test_kernels.py'),
          'loop':     (120, None, 'benchmarks/loop.py --only ml100k'),
          'fit_many': (60,  None, 'benchmarks/fit_many.py'),
          'tests':    (150, 'pytest', '-m pytest -q --tb=short -m cuda --continue-on-collection-errors -p no:cacheprovider '+
                   ' '.join(f'tests/test_{o}.py' for o in 'loop losses many bundle callbacks ensemble preds sequence'.split())),
          'topk':     (90,  'implicit', 'benchmarks/topk.py'),
          'big':      (240, None, 'benchmarks/loop.py --only big'),
          'stream':   (120, None, 'benchmarks/loop.py --only stream'),
          'growth':   (180, None, 'benchmarks/loop.py --only growth'),
          'rows':     (120, None, 'benchmarks/rows.py')}

def run(args, seconds):
    "Run Python on `args`; how it ended, and the last lines of what it said"
    t,root,last = time.time(),Path(__file__).resolve().parent.parent,deque(maxlen=40)
    env = {**os.environ, 'PYTHONUNBUFFERED':'1', 'PYTHONPATH':os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))}
    env.update({k: str(Path(env[k]).resolve()) for k in ('OUT','CFEXT_DATA') if k in env})
    p = subprocess.Popen([sys.executable, '-W', 'ignore', *shlex.split(args)], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    late = threading.Timer(seconds, p.kill)
    late.start()
    for line in p.stdout:
        print(line, end='', flush=True)
        last.append(line.rstrip()[:300])
    rc,took = p.wait(),time.time()-t
    late.cancel()
    return 'done' if rc==0 else f'out of time after {seconds:.0f} s' if took>=seconds else f'failed ({rc})',took,list(last)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=8)
    p.add_argument('--only', nargs='*', default=list(pieces), choices=list(pieces))
    args = p.parse_args()
    if not torch.cuda.is_available(): sys.exit("PyTorch sees no GPU here; the other benchmarks run on the processor")
    if 'OUT' in os.environ: Path(os.environ['OUT']).mkdir(parents=True, exist_ok=True)
    from common import record
    end,ended = time.time()+args.minutes*60,{}
    for name in args.only:
        seconds,needs,what = pieces[name]
        left = end-time.time()
        print(f'--- {name}: python {what}', flush=True)
        if needs and find_spec(needs) is None: how,took,last = f'left out, since {needs} is not installed',0,[]
        elif left<5: how,took,last = 'no time left',0,[]
        else: how,took,last = run(what, min(seconds, left))
        ended[name] = dict(ended=how, seconds=round(took, 1), last=last)
        if 'OUT' in os.environ: record('gpu', dict(pieces=ended))
    for name,o in ended.items():
        if o['ended'].startswith('failed'): print(f'--- {name}, the end of it', *o['last'][-15:], sep='\n')
    for name,o in ended.items(): print(f'{name:9} {o["seconds"]:6} s  {o["ended"]}')
    if not all(o['ended']=='done' for o in ended.values()): sys.exit(1)
