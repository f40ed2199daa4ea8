"""Lists on data in LightGCN's layout: recall@20 and NDCG@20, every item ranked, beside popularity and closed forms.

PATH is a folder with `train.txt` and `test.txt`, a line a user followed by the user's items, as LightGCN's repository has
Gowalla, Yelp2018 and Amazon-Book. Anything else that `read_ratings` reads, a file or a MovieLens folder, is split here: a fifth
of each user's rows, at random by each of `--seeds`, is the test, and ratings are left aside.

A user's training items are left out of the list, recall is over all of the user's test items, NDCG's ideal list is as long as the
smaller of 20 and their number, and the mean is over users with a test item: the evaluation of the LightGCN paper. Nothing of the
size of users times items is held. Every choice is made on a tenth of the training rows: temperature, weight and number of epochs, the
settings of iALS and EASE. The model chosen is trained again on all training rows, and only that meets the test rows.

    python benchmarks/lightgcn_layout.py PATH                         # popularity, MF, iALS, EASE where it fits, on a GPU LightGCN too
    python benchmarks/lightgcn_layout.py PATH --models mf lightgcn-bpr # these alone
    python benchmarks/lightgcn_layout.py PATH --minutes 20            # at most about so long for each trained model
    python benchmarks/lightgcn_layout.py PATH --temps 0.1 --weights 1 --epochs 40 # nothing left to choose but twice the epochs
    python benchmarks/lightgcn_layout.py ml-latest-small --seeds 0 1 2 # three splits of a file or folder of ratings
    python benchmarks/lightgcn_layout.py --synthetic                  # a made-up set of Gowalla's size

Ctrl-C ends the run and keeps the models that are done; `--out` is written after each.

The recipe: 64 factors, cosines, the softmax over all items at a low temperature, with a weight of the log-sum-exp (Wu et al. 2024,
"BSL: understanding and improving softmax loss for recommendation"), batches of whole users, Adam, one cycle. A grid of settings is
tried with few epochs; those of the best are doubled for as long as the held-out rows gain and the time allows.
Other losses of a model are named behind it: `mf-bpr` and `lightgcn-bpr` (Rendle et al. 2009, as LightGCN's paper trains both),
`mf-ccl` (Mao et al. 2021), `mf-sampled` (a softmax over shared uniform negatives).
Published for LightGCN, recall@20 / NDCG@20 (He et al. 2020): Gowalla .1830 / .1554, Yelp2018 .0649 / .0530, Amazon-Book .0411 / .0315.
"""
import argparse,itertools,os,time,warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pandas as pd,torch
from fastai.data.transforms import ColSplitter
from cfext import *
from common import mean_sd,record

k = 20
trained_models = 'mf','mf-bpr','mf-ccl','mf-sampled','lightgcn','lightgcn-bpr'
grids = dict(ccl=[dict(margin=m) for m in (0.8,0.9)], bpr=[dict(wd=w) for w in (0.01,0.1,0.3)])

def stand_in(n_users=29_858, n_items=40_981, n_rows=1_027_370, n_topics=400, seed=0):
    "A set of Gowalla's size: users mix a few topics and the general taste, a fifth of each user's rows is the test"
    rng = np.random.default_rng(seed)
    n = np.maximum(8, rng.lognormal(0, 1, n_users))
    n = np.round(n*n_rows*1.15/n.sum()).astype(int).clip(8)
    user = np.repeat(np.arange(n_users), n)
    rank = lambda size, m: np.minimum((m+1.)**rng.random(size)-1, m-1).astype(np.int64)
    order = rng.permutation(n_items)
    per = n_items//n_topics
    own = rng.integers(0, n_topics, (n_users,3))
    topic = own[user, rng.integers(0, 3, len(user))]
    item = np.where(rng.random(len(user))<0.75, order[topic*per+rank(len(user), per)], order[rng.permutation(n_items)][rank(len(user), n_items)])
    return part(pd.DataFrame(dict(user=user, item=item)), seed)

def part(df, seed):
    "Hold out a fifth of each user's rows"
    df = df[['user','item']].drop_duplicates().sample(frac=1, random_state=seed).reset_index(drop=True)
    place = df.groupby('user').cumcount()
    return df.assign(is_valid=place<0.2*df.groupby('user').item.transform('size'))

def loaders(df, device, bs=8192, by_user=True):
    "Loaders of rows that are all for training"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return CFDataLoaders.from_df(df[['user','item']], valid_pct=0, rating_name=None, device=device, bs=bs, seed=0, by_user=by_user)

def judge(model, dls, held):
    "Values of the users of `held`, a frame of user and item; an item without a training row is a target that no list can hold"
    users,ids = dls.classes['user'],dls.classes['item']
    row,who = pd.factorize(held.user)
    item = ids.encode(held.item).astype(np.int64)
    fresh,_ = pd.factorize(held.item)
    item = np.where(item>0, item, dls.n_items+fresh)
    targets = torch.from_numpy(np.stack([row, item], 1)).to(dls.device)
    recs,_ = top_items(SimpleNamespace(model=model, dls=dls), torch.from_numpy(users.encode(pd.Index(who))).long().to(dls.device), k, seen='train')
    hits = hit_matrix(recs, targets)
    return dict(recall=recall_at_k(*hits).mean().item(), ndcg=ndcg_at_k(*hits).mean().item(), users=len(who))

def grid_of(loss, a):
    "The settings to try"
    if loss in grids: return grids[loss]
    return [dict(temp=t, **({'weight':w} if loss=='softmax' else {})) for t,w in itertools.product(a.temps, a.weights if loss=='softmax' else [1])]

def learner(dls, name, kw, a, seed):
    "MF or LightGCN with the loss that the name asks for"
    base,_,loss = name.partition('-')
    kw,cosines = {n:v for n,v in kw.items() if n!='wd'},loss!='bpr'
    func = dict(softmax=FullSoftmaxLoss, sampled=SampledSoftmaxLoss, ccl=CCLLoss, bpr=BPRLoss)[loss or 'softmax'](**kw, **({'weight':a.ccl_weight} if loss=='ccl' else {}))
    negs = Negatives(a.n_neg, shared=True, seen=False, seed=seed) if loss in ('sampled','ccl') else Negatives(seed=seed)
    model,config = (CosineProduct if cosines else DotProduct,{}) if base=='mf' else (LightGCN,dict(unit=cosines, n_layers=a.layers))
    return cf_learner(dls, model, n_factors=a.factors, config=config, loss_func=func, cbs=negs, seed=seed, unk_p=0)

def fit(dls, name, kw, epochs, a, seed):
    "Train one model by one cycle"
    learn = learner(dls, name, kw, a, seed)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, a.lr, wd=kw.get('wd', a.wd))
    return learn.model

def trained(inner, held, outer, name, a, seed):
    "Choose the settings and the number of epochs on the held-out rows, then train on all"
    grid,t = grid_of(name.partition('-')[2] or 'softmax', a),time.time()
    fit(inner, name, grid[0], 1, a, seed)
    took,budget = time.time()-t,60*a.minutes
    grid = grid[:max(1, int(budget/took/10)-4)] # at least ten epochs each; 4: twice as many here, and for all rows
    epochs = max(1, min(a.epochs, int(budget/took/(len(grid)+4))))
    most = took*epochs*(len(grid)+4)
    print(f'  {name}: an epoch takes {took:.1f} s; {len(grid)} settings of {epochs} epochs, then more: at least {most/60:.0f} min', flush=True)
    tried = []
    def look(kw, n):
        tried.append(dict(kw, epochs=n, recall=judge(fit(inner, name, kw, n, a, seed), inner, held)['recall']))
        print(f'  {name} {kw}, {n} epochs: held-out recall@{k} {tried[-1]["recall"]:.4f}, {time.time()-t:.0f} s', flush=True)
        return tried[-1]['recall']
    kw = max(grid, key=lambda kw: look(kw, epochs))
    best = max(o['recall'] for o in tried)
    while 2*epochs<=a.max_epochs and time.time()-t+took*4*epochs<=budget:
        new = look(kw, 2*epochs)
        if new<=best: break
        best,epochs = new,2*epochs
    print(f'  {name} {kw}: {epochs} epochs on all training rows', flush=True)
    start = time.time()
    model = fit(outer, name, kw, epochs, a, seed)
    return model,dict(chosen=dict(kw, epochs=epochs), tried=tried, seconds_an_epoch=(time.time()-start)/epochs)

def solved(inner, held, outer, make, grid, name):
    "Choose a setting of a closed form on the held-out rows, then solve for all"
    tried = []
    for kw in grid:
        tried.append(judge(make(inner, **kw), inner, held)['recall'])
        print(f'  {name} {kw}: held-out recall@{k} {tried[-1]:.4f}', flush=True)
    kw = grid[int(np.argmax(tried))]
    return make(outer, **kw),dict(chosen=kw, tried=tried)

def ease_fits(n_items, device):
    "Is there memory for the three square tables in double precision that EASE needs at once?"
    if str(device).startswith('cuda'): free = torch.cuda.mem_get_info()[0]
    else: free = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_AVPHYS_PAGES')
    return 3*8*n_items**2<0.8*free

def fitted(name, inner, held, outer, a, seed):
    "A model, and how its settings were chosen"
    if name=='popularity': return Popularity(outer),{}
    if name=='ials':
        grid = [dict(alpha0=x, lam=l) for x in (0.1,0.3,1.) for l in (0.003,0.01,0.03)]
        return solved(inner, held, outer, lambda d,**kw: IALS(d, n_factors=a.factors, n_iter=8, **kw), grid, name)
    if name=='ease': return solved(inner, held, outer, EASE, [dict(reg=r) for r in (30.,100.,300.,1000.)], name)
    return trained(inner, held, outer, name, a, seed)

def table(df, a, seed, save):
    "Fit and judge every model asked for; `save` is told after each"
    train,test = (df[df.is_valid==v].reset_index(drop=True) for v in (False,True))
    mask = np.random.default_rng(seed).random(len(train))<0.1
    held = train[mask]
    bs = a.bs or min(8192, max(512, len(train)//100))
    both = lambda by_user: (loaders(train[~mask].reset_index(drop=True), a.device, bs, by_user),loaders(train, a.device, bs, by_user))
    _,outer = pair = both(False)
    size = dict(users=outer.n_users-1, items=outer.n_items-1, train=len(train), test=len(test))
    print(f'{size["users"]:,} users, {size["items"]:,} items, {len(train):,} training rows, {len(test):,} test rows of {test.user.nunique():,} users, '
          f'{(~test.item.isin(train.item)).sum():,} of them with an item that has no training row; on {a.device}', flush=True)
    for name in a.models:
        t = time.time()
        if name=='ease' and not ease_fits(outer.n_items, a.device):
            print(f'  EASE is left out: {outer.n_items:,} items need about {3*8*outer.n_items**2/2**30:.0f} GiB', flush=True)
            continue
        inner,outer = both(True) if name in ('mf','lightgcn') else pair
        model,how = fitted(name, inner, held, outer, a, seed)
        run = dict(**judge(model, outer, test), **how, seed=seed, seconds=time.time()-t)
        print(f'{name}: recall@{k} {run["recall"]:.4f}, NDCG@{k} {run["ndcg"]:.4f} ({run["seconds"]:.0f} s)', flush=True)
        save(name, run, size)
        del model

def args():
    p = argparse.ArgumentParser(description='recall@20 and NDCG@20 on data in the layout of LightGCN')
    p.add_argument('path', nargs='?', help='folder with train.txt and test.txt; or a file or folder of ratings, which is split')
    p.add_argument('--synthetic', action='store_true', help="a made-up set of Gowalla's size")
    p.add_argument('--models', nargs='+', choices=('popularity','ials','ease',*trained_models), help='in this order; default: popularity, mf, ials, ease, LightGCN on a GPU only')
    p.add_argument('--temps', nargs='+', type=float, default=[0.12,0.08,0.18], help='temperatures of the softmax to try, the first ones if time is short')
    p.add_argument('--weights', nargs='+', type=float, default=[1.2,1.], help='weights of its log-sum-exp to try')
    p.add_argument('--epochs', type=int, default=20, help='of each setting tried; fewer where --minutes asks for it')
    p.add_argument('--max-epochs', type=int, default=160, help='at most so many where doubling them helps')
    p.add_argument('--minutes', type=float, help='for each trained model, about; default: 60 on a CPU, a day on a GPU')
    p.add_argument('--factors', type=int, default=64)
    p.add_argument('--layers', type=int, default=3, help='steps of LightGCN')
    p.add_argument('--n-neg', type=int, default=512, help='shared negatives of a batch, for -sampled and -ccl')
    p.add_argument('--ccl-weight', type=float, default=150., help='weight of the negatives in CCL')
    p.add_argument('--bs', type=int, help='rows a batch; default: a hundredth of the training rows, 512 to 8192')
    p.add_argument('--lr', type=float, default=1e-2)
    p.add_argument('--wd', type=float, default=0.)
    p.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the model, the held-out rows, and of the split where there is none')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', help='JSON to write; default: none, but with --synthetic the record beside this script')
    a = p.parse_args()
    if not a.path and not a.synthetic: p.error('PATH or --synthetic is needed')
    if not a.models: a.models = ['popularity','mf'] + (['lightgcn'] if a.device!='cpu' else []) + ['ials','ease']
    if a.minutes is None: a.minutes = 60 if a.device=='cpu' else 24*60
    return a

def read(a, seed):
    "Rows of user and item, those of the test marked"
    if a.synthetic: return stand_in(seed=seed)
    if (Path(a.path)/'train.txt').is_file(): return read_ratings(a.path, split='test')
    df = read_ratings(a.path)
    return part(df.rename(columns={find_col(df, n, n): n for n in ('user','item')}), seed)

if __name__=='__main__':
    a,runs = args(),{}
    def save(name, run, size):
        runs.setdefault(name, []).append(run)
        if not (a.out or a.synthetic): return
        settings = {n: v for n,v in vars(a).items() if n not in ('path','out','minutes')}
        record('lightgcn_layout'+'_synthetic'*a.synthetic, dict(what=f'recall@{k} and NDCG@{k} of every item ranked, as LightGCN evaluates', data=Path(a.path).name if a.path else 'synthetic',
                                       size=size, settings=settings, results=results()), a.out)
    results = lambda: {n: dict({m: mean_sd(o[m] for o in r) for m in ('recall','ndcg','seconds')}, runs=r) for n,r in runs.items()}
    try:
        for seed in a.seeds: table(read(a, seed), a, seed, save)
    except KeyboardInterrupt: print('broken off: what was done before is kept')
    show = lambda d, n: f'{d["mean"]:.{n}f}' + (f' +- {d["sd"]:.{n}f}' if d['sd'] is not None else '')
    print(pd.DataFrame({n: {f'recall@{k}':show(r['recall'], 4), f'NDCG@{k}':show(r['ndcg'], 4), 'seconds':show(r['seconds'], 0)} for n,r in results().items()}).T.to_string())
