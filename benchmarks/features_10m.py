"""Ten million rows through `EmbeddingFeatures.transform`: seconds, and memory beyond the output.

    python benchmarks/features_10m.py

Users and items as integers, as strings and as categories; a dot model of 138,493 x 26,744 ids (the size of MovieLens 20M) with 8
factors, so 19 float32 columns: 760 MB of output. Times are medians of interleaved repeats, on the clock and of the processor (one
thread; the two differ on a busy machine, whose load is recorded). Memory is the peak of traced allocations above the output, in a
run of its own, since tracing slows it."""
import argparse,datetime,json,os,platform,time,tracemalloc
from pathlib import Path

import numpy as np,pandas as pd
from cfext.features import EmbeddingFeatures
from cfext.tables import EmbTable

here = Path(__file__).resolve()

def tables(n_users, n_items, d, keys, rng):
    "Tables of a dot model whose ids are made by `keys`"
    def one(n): return EmbTable(pd.Index(keys(np.arange(n))), rng.normal(size=(n+1,d)).astype('float32'),
                                rng.normal(size=n+1).astype('float32'), np.r_[0,np.ones(n, int)], 'dot')
    return dict(user=one(n_users), item=one(n_items))

def main(n, d, repeats):
    rng = np.random.default_rng(42)
    n_users,n_items = 138_493,26_744
    ids = dict(user=rng.integers(0, n_users, n), item=rng.integers(0, n_items, n))
    as_str = lambda o: np.char.add('id', o.astype(str)).astype(object)
    names = {k: as_str(np.arange(m)) for k,m in dict(user=n_users, item=n_items).items()}
    ints,strs = tables(n_users, n_items, d, lambda o: o, rng),tables(n_users, n_items, d, as_str, rng)
    cases = dict(integers=(ints, pd.DataFrame(ids)),
                 strings=(strs, pd.DataFrame({k: pd.Series(names[k][v], dtype=object) for k,v in ids.items()})),
                 categories=(strs, pd.DataFrame({k: pd.Categorical.from_codes(v, names[k]) for k,v in ids.items()})))
    efs = {k: EmbeddingFeatures(t, output='only').fit(X[:1000]) for k,(t,X) in cases.items()}
    secs,cpu,res = {k: [] for k in cases},{k: [] for k in cases},{}
    for _ in range(repeats):
        for k,(_,X) in cases.items():
            t,c = time.perf_counter(),time.process_time()
            out = efs[k].transform(X)
            secs[k].append(time.perf_counter()-t); cpu[k].append(time.process_time()-c)
            del out
    for k,(_,X) in cases.items():
        tracemalloc.start()
        out = efs[k].transform(X)
        peak,size = tracemalloc.get_traced_memory()[1],out.to_numpy().nbytes
        tracemalloc.stop()
        del out
        res[k] = dict(seconds=float(np.median(secs[k])), cpu_seconds=float(np.median(cpu[k])), all_seconds=secs[k], all_cpu_seconds=cpu[k], output_mb=size/1e6, peak_beyond_output_mb=(peak-size)/1e6)
        print(k, {a: round(b, 2) for a,b in res[k].items() if not a.startswith('all')}, flush=True)
    ram = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30
    model = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine())
    here.with_suffix('.json').write_text(json.dumps(dict(rows=n, factors=d, load_average=os.getloadavg()[0], results=res, date=str(datetime.date.today()),
        machine=f'{os.cpu_count()} x {model}, {ram:.0f} GiB', versions=dict(numpy=np.__version__, pandas=pd.__version__),
        command='python benchmarks/features_10m.py'), indent=1)+'\n')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', type=int, default=10_000_000)
    p.add_argument('--factors', type=int, default=8)
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    main(a.rows, a.factors, a.repeats)
