"""Test-time augmentation on a CIFAR-10 sample and on MNIST 3/7: accuracy over seeds, and time beside fastai's `tta`.

    CFEXT_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/tta.py --out benchmarks/tta.json

The views of `TTA` were fixed before any of this was run: the training augmentation, as many draws as fastai takes and four
times as many, and the mirror image (not for digits). Every figure is on the `valid` folder, which chose nothing."""
import argparse,itertools,json,os,platform,random,statistics,sys,tarfile,tempfile,time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from fastai.vision.all import *

from cfext.preds import *
from cfext.views import *
from datetime import date # after the star imports, which bring a `datetime` of their own

sets = dict(
    cifar10_tiny=dict(cls=PILImage, c=3, n_out=10, epochs=5, aug=lambda: aug_transforms(max_rotate=8, max_zoom=1.15, max_warp=0.1, max_lighting=0.15), flip=True),
    mnist_37=dict(cls=PILImageBW, c=1, n_out=2, epochs=1, aug=lambda: aug_transforms(do_flip=False, max_rotate=8, max_zoom=1.15, max_warp=0.1, max_lighting=0.15), flip=False))

def conv(a, b, stride=2): return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
def small_cnn(c, n_out): return nn.Sequential(conv(c,16), conv(16,32), conv(32,64), conv(64,128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128,n_out))

def unpack(name, to):
    with tarfile.open(Path(os.environ.get('CFEXT_DATA', Path(__file__).parents[1].parent/'shared'/'data'))/f'{name}.tgz') as f: f.extractall(to, filter='data')
    return first(p for p in Path(to).rglob('train') if p.is_dir() and name in str(p)).parent

def learner(name, path, seed, bs=64, size=None):
    s = sets[name]
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    block = DataBlock((ImageBlock(s['cls']), CategoryBlock()), get_items=get_image_files, get_y=parent_label,
        splitter=GrandparentSplitter(), item_tfms=Resize(size) if size else None, batch_tfms=[*s['aug'](), Normalize.from_stats([0.45]*s['c'], [0.25]*s['c'])])
    dls = block.dataloaders(path, bs=bs, val_bs=200, num_workers=0, device=torch.device('cpu'))
    return Learner(dls, small_cnn(s['c'], s['n_out']), metrics=accuracy)

def acc(p, t): return accuracy(p, t).item()
def interval(xs):
    "Mean and half of the 95% interval (Student's t)"
    from scipy.stats import t
    h = t.ppf(0.975, len(xs)-1)*statistics.stdev(xs)/len(xs)**0.5 if len(xs)>1 else 0.
    return [round(statistics.mean(xs), 4), round(h, 4)]

def one_seed(name, path, seed):
    "Train one network and predict in every way"
    learn = learner(name, path, seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(sets[name]['epochs'], 0.01)
        r = dict(plain=acc(*learn.get_preds()))
        torch.manual_seed(seed), random.seed(seed)
        r['fastai_tta_4'] = acc(*learn.tta(n=4))
        ours = lambda *a, **kw: acc(*learn.get_preds(cbs=TTA(*a, seed=seed, **kw)))
        r['train_4'],r['train_16'] = ours(train_views(4)),ours(train_views(16))
        if sets[name]['flip']: r['flip'] = ours(flip_views())
    print(name, seed, {k: round(v, 4) for k,v in r.items()}, flush=True)
    return r

def summary(per_seed):
    "Means with 95% intervals, of accuracy and of its paired difference from fastai's `tta`"
    rows = list(per_seed.values())
    return dict(per_seed=per_seed, mean_and_half_95=dict((k, interval([r[k] for r in rows])) for k in rows[0]),
                less_fastai=dict((k, interval([r[k]-r['fastai_tta_4'] for r in rows])) for k in rows[0]))

def big_jpegs(src, to, n=400, sz=320):
    "The sample's pictures enlarged to a photograph's size, as one meets them on disk, so that decoding dominates"
    for split,k in (('train',20),('valid',n)):
        for i,p in enumerate(sorted(get_image_files(src/split))[::max(1, len(get_image_files(src/split))//k)][:k]):
            d = to/split/p.parent.name
            d.mkdir(parents=True, exist_ok=True)
            Image.open(p).convert('RGB').resize((sz,sz), Image.BICUBIC).save(d/f'{i}.jpg', quality=90)
    return to

def times(path, repeats, size=None, views=4):
    learn = learner('cifar10_tiny', path, 0, size=size)
    runs = dict(plain=lambda: learn.get_preds(), fastai_tta_4=lambda: learn.tta(n=views),
        flip_x_scale_4=lambda: learn.get_preds(cbs=TTA(product_views(flip_views(), scale_views((1.,1.1))))),
        d4_half_4=lambda: learn.get_preds(cbs=TTA(flip_views(ud=True))),
        train_4=lambda: learn.get_preds(cbs=TTA(train_views(views))))
    ts = {k: [] for k in runs}
    with learn.no_bar(), learn.no_logging():
        for f in runs.values(): f()
        for _ in range(repeats): # interleaved, so that a busy machine slows all alike
            for k,f in runs.items():
                t = time.perf_counter()
                f()
                ts[k].append(time.perf_counter()-t)
    med = {k: statistics.median(v) for k,v in ts.items()}
    return dict(n_images=len(learn.dls.valid_ds), seconds={k: round(v, 3) for k,v in med.items()},
        over_plain={k: round(statistics.median([a/b for a,b in zip(ts[k], ts['plain'])]), 2) for k in ts}, repeats=repeats)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--out'), ap.add_argument('--seeds', default='0,1,2,3,4'), ap.add_argument('--repeats', type=int, default=7)
    ap.add_argument('--part', default='accuracy,time')
    a = ap.parse_args()
    import psutil,fastai,cfext
    cpu = first(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')) if Path('/proc/cpuinfo').exists() else platform.processor()
    res = json.loads(Path(a.out).read_text()) if a.out and Path(a.out).exists() else {}
    here = dict(date=str(date.today()), machine=dict(cpus=os.cpu_count(), model=cpu, ram_gib=round(psutil.virtual_memory().total/2**30)),
        versions=dict(python=platform.python_version(), torch=torch.__version__, fastai=fastai.__version__, cfext=cfext.__version__),
        command=f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS','')} python benchmarks/tta.py {' '.join(sys.argv[1:])}")
    with tempfile.TemporaryDirectory() as d:
        paths = {k: unpack(k, f'{d}/{k}') for k in sets}
        for k,seed in itertools.product(sets, a.seeds.split(',')) if 'accuracy' in a.part else (): # seeds already in the file are kept
            done = res.setdefault('accuracy', {}).setdefault(k, {}).get('per_seed', {})
            if seed not in done: res['accuracy'][k] = summary({**done, seed: one_seed(k, paths[k], int(seed))})
            res['accuracy'].update(here)
            if a.out: Path(a.out).write_text(json.dumps(res, indent=1)+'\n')
        if 'time' in a.part: res['time'] = dict(**here,
            decoding_dominates=times(big_jpegs(paths['cifar10_tiny'], Path(d)/'big'), a.repeats, size=32),
            tiny_pictures=times(paths['cifar10_tiny'], max(3, a.repeats//2)))
    print(json.dumps(res.get('time', {}), indent=1))
    if a.out: Path(a.out).write_text(json.dumps(res, indent=1)+'\n')
