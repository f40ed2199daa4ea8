"What the benchmark scripts share: where the data is, what the machine is, and a record written whole."
import json,os,platform,statistics,sys,time
from importlib.metadata import version
from pathlib import Path

import torch
from cfext.core import whole_file

here = Path(__file__).parent

def data_dir(name:str)->Path:
    "The folder `name` of the data: $CFEXT_DATA, by default ../shared/data beside the checkout"
    path = Path(os.environ.get('CFEXT_DATA', here.parent.parent/'shared'/'data'))/name
    if not path.exists(): sys.exit(f"{path} is not there: point the environment variable CFEXT_DATA at a folder that holds {name}")
    return path

def machine()->dict:
    "Processor, memory, accelerator and versions"
    cpu = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), platform.processor()) \
        if Path('/proc/cpuinfo').exists() else platform.processor()
    ram = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30
    return dict(cpu=cpu, cores=os.cpu_count(), ram_gib=round(ram), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                threads=torch.get_num_threads(), python=platform.python_version(),
                **{p: version(p) for p in ('torch','fastai','pandas','numpy')})

def out_file(name:str)->Path:
    "Where a record lies: in the folder $OUT, by default beside the scripts"
    return Path(os.environ.get('OUT', here))/f'{name}.json'

def recorded(name:str)->dict:
    "The results of a record, if it is of this machine and these versions"
    old = json.loads(out_file(name).read_text(encoding='utf-8')) if out_file(name).exists() else {}
    return {k:v for k,v in old.items() if k not in ('date','command','machine')} if old.get('machine')==machine() else {}

def record(name:str, results:dict, path:str|None=None):
    "Write `path`, by default `benchmarks/{name}.json`: date, command, machine and results"
    d = dict(date=time.strftime('%Y-%m-%d'), command=' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]), machine=machine(), **results)
    out = Path(path) if path else out_file(name)
    with whole_file(out) as f: f.write_text(json.dumps(d, indent=1)+'\n', encoding='utf-8')
    print(f'written: {out.name}')

def mean_sd(vals)->dict:
    "Mean, standard deviation and the values themselves"
    vals = list(map(float, vals))
    return dict(mean=statistics.fmean(vals), sd=statistics.stdev(vals) if len(vals)>1 else None, values=vals)
