"""Everything that needs a GPU, one after another, each within its time: the tests that are marked `cuda`, then the benchmarks.

    python benchmarks/gpu.py                        # all of it, eight minutes at the most
    OUT=results python benchmarks/gpu.py --minutes 5  # what five minutes allow, records into the folder `results`
    python benchmarks/gpu.py --only loop topk       # some of it

What comes first matters most: a piece that finds no time left, or runs out of its own, is named at the end, and the records of the
others stand. topk needs implicit (pip install implicit)."""
import argparse,os,subprocess,sys,time
from pathlib import Path

import torch

pieces = {'kernels':  (120, '-m pytest -q -x -p no:cacheprovider tests/test_kernels.py'),
          'loop':     (120, 'benchmarks/loop.py --only ml100k'),
          'fit_many': (60,  'benchmarks/fit_many.py'),
          'topk':     (90,  'benchmarks/topk.py'),
          'big':      (240, 'benchmarks/loop.py --only big'),
          'tests':    (180, '-m pytest -q -m cuda --continue-on-collection-errors -p no:cacheprovider '+
                   ' '.join(f'tests/test_{o}.py' for o in 'bundle callbacks ensemble loop losses many preds sequence'.split())),
          'stream':   (120, 'benchmarks/loop.py --only stream'),
          'growth':   (180, 'benchmarks/loop.py --only growth'),
          'rows':     (120, 'benchmarks/rows.py')}

def run(args, seconds):
    "Run Python on `args`; how it ended"
    t,root = time.time(),Path(__file__).parent.parent
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))}
    try: rc = subprocess.run([sys.executable, *args.split()], cwd=root, env=env, timeout=seconds).returncode
    except subprocess.TimeoutExpired: return f'out of time after {seconds:.0f} s'
    return f'{"done" if rc==0 else f"failed ({rc})"} in {time.time()-t:.0f} s'

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=8)
    p.add_argument('--only', nargs='*', default=list(pieces), choices=list(pieces))
    args = p.parse_args()
    if not torch.cuda.is_available(): sys.exit("PyTorch sees no GPU here; the other benchmarks run on the processor")
    if 'OUT' in os.environ: Path(os.environ['OUT']).mkdir(parents=True, exist_ok=True)
    end,ended = time.time()+args.minutes*60,{}
    for name in args.only:
        seconds,what = pieces[name]
        left = end-time.time()
        print(f'--- {name}: python {what}', flush=True)
        ended[name] = run(what, min(seconds, left)) if left>5 else 'no time left'
    for name,how in ended.items(): print(f'{name:9} {how}')
    if not all(how.startswith('done') for how in ended.values()): sys.exit(1)
