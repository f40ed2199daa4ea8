"""Lists on data in LightGCN's layout: recall@20 and NDCG@20, every item ranked, beside popularity and closed forms.

PATH is a folder with `train.txt` and `test.txt`, a line a user followed by the user's items, as LightGCN's repository has
Gowalla, Yelp2018 and Amazon-Book. A user's training items are left out of the list, recall is over all of the user's test
items, NDCG's ideal list is as long as the smaller of 20 and their number, and the mean is over users with a test item: the
evaluation of the LightGCN paper. Nothing of the size of users times items is held.

Every choice is made on a tenth of the training rows: the number of epochs, the temperature, the settings of iALS and EASE. The
model chosen is trained again on all training rows, and only that meets the test rows.

    python benchmarks/lightgcn_layout.py PATH                         # popularity, MF, iALS, EASE where it fits, on a GPU LightGCN too
    python benchmarks/lightgcn_layout.py PATH --models mf lightgcn    # these alone
    python benchmarks/lightgcn_layout.py PATH --minutes 20            # at most about so long for each trained model
    python benchmarks/lightgcn_layout.py PATH --epochs 30 --values 0.1 # nothing left to choose
    python benchmarks/lightgcn_layout.py PATH --loss bpr --models mf lightgcn # as LightGCN's paper trains them, for comparison
    python benchmarks/lightgcn_layout.py --synthetic                  # a made-up set of Gowalla's size

Ctrl-C ends the run and keeps the models that are done; `--out` is written after each.

The recipe, fixed beforehand from the literature and not tuned on a test set: 64 factors, cosines, a sampled softmax over shared
uniform negatives with a temperature near 0.1 (Wu et al. 2024, "On the effectiveness of sampled softmax loss for item
recommendation"), Adam. `--loss ccl` is the cosine contrastive loss of SimpleX instead (Mao et al. 2021), `--loss bpr` a plain dot
product (Rendle et al. 2009).
Published for LightGCN, recall@20 / NDCG@20 (He et al. 2020): Gowalla .1830 / .1554, Yelp2018 .0649 / .0530, Amazon-Book .0411 / .0315.
"""
import argparse,os,time,warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pandas as pd,torch
from fastai.callback.core import Callback,CancelFitException
from fastai.data.transforms import ColSplitter
from cfext import *
from common import record

k = 20
values = dict(softmax=[0.08,0.1,0.14], ccl=[0.8,0.9], bpr=[0.01,0.1,0.3])

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
    df = pd.DataFrame(dict(user=user, item=item)).drop_duplicates().sample(frac=1, random_state=seed).reset_index(drop=True)
    place = df.groupby('user').cumcount()
    return df.assign(is_valid=place<0.2*df.groupby('user').item.transform('size'))

def loaders(df, held, device, bs=2048):
    "Loaders of the rows, those in `held` as validation"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return CFDataLoaders.from_df(df[['user','item']].assign(is_valid=held), rating_name=None, splitter=ColSplitter('is_valid'), device=device, bs=bs, seed=0)

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

class Watch(Callback):
    "Judge the model on held-out rows every few epochs, keep the best number, stop when it is not coming back or the time is up"
    def __init__(self, held, every, patience, seconds, say): self.held,self.every,self.patience,self.seconds,self.say = held,every,patience,seconds,say
    def before_fit(self): self.best,self.at,self.t = -1.,0,time.time()
    def after_epoch(self):
        n,took = self.epoch+1,time.time()-self.t
        if n==1: print(f'  {self.say}: an epoch takes {took:.1f} s, so all {self.n_epoch} at most {min(took*self.n_epoch, self.seconds)/60:.0f} min', flush=True)
        late = took*(n+1)/n>self.seconds
        if n%self.every and n<self.n_epoch and not late: return
        now = judge(self.model, self.dls, self.held)['recall']
        if now>self.best: self.best,self.at = now,n
        print(f'  {self.say}: epoch {n}, held-out recall@{k} {now:.4f}, best {self.best:.4f} at {self.at}, {time.time()-self.t:.0f} s', flush=True)
        if late or n-self.at>=self.patience*self.every: raise CancelFitException

def learner(dls, name, value, a, cbs=()):
    "MF or LightGCN with the recipe's loss; `value` is the temperature, the margin or the weight decay"
    cosines = a.loss!='bpr'
    loss = dict(softmax=lambda: SampledSoftmaxLoss(value), ccl=lambda: CCLLoss(margin=value, weight=a.weight), bpr=BPRLoss)[a.loss]()
    negs = Negatives(a.n_neg, shared=True, seen=False, seed=a.seed) if cosines else Negatives(1, seed=a.seed)
    model,config = (CosineProduct if cosines else DotProduct,{}) if name=='mf' else (LightGCN,dict(unit=cosines, n_layers=a.layers))
    return cf_learner(dls, model, n_factors=a.factors, config=config, loss_func=loss, cbs=[negs,*cbs], seed=a.seed, unk_p=0)

def fit(learn, epochs, value, a):
    with learn.no_bar(),learn.no_logging(): learn.fit(epochs, a.lr, wd=value if a.loss=='bpr' else a.wd)

def trained(train, inner, held, outer, name, a):
    "Choose the value and the number of epochs on the held-out rows, then train on all"
    tried,seconds = {},60*a.minutes/(len(a.values)+1)
    if a.epochs and len(a.values)==1: value,epochs = a.values[0],a.epochs
    else:
        for v in a.values:
            w = Watch(held, a.epochs or a.every, a.patience, seconds, f'{name}, {v}')
            fit(learner(inner, name, v, a, [w]), a.epochs or a.max_epochs, v, a)
            tried[v] = dict(recall=w.best, epochs=w.at)
        value = max(tried, key=lambda v: tried[v]['recall'])
        epochs = tried[value]['epochs']
    print(f'  {name}, {value}: {epochs} epochs on all training rows', flush=True)
    learn,t = learner(outer, name, value, a),time.time()
    fit(learn, epochs, value, a)
    return learn.model,dict(chosen=dict(value=value, epochs=epochs), tried=tried, seconds_an_epoch=(time.time()-t)/epochs)

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

def fitted(name, train, inner, held, outer, a):
    "A model, and how its settings were chosen"
    if name=='popularity': return Popularity(outer),{}
    if name=='ials':
        grid = [dict(alpha0=x, lam=l) for x in (0.03,0.1,0.3) for l in (0.003,)]+[dict(alpha0=0.1, lam=l) for l in (0.001,0.01)]
        return solved(inner, held, outer, lambda d,**kw: IALS(d, n_factors=a.factors, n_iter=8, **kw), grid, name)
    if name=='ease': return solved(inner, held, outer, EASE, [dict(reg=r) for r in (100.,300.,1000.)], name)
    return trained(train, inner, held, outer, name, a)

def table(df, a, save):
    "Fit and judge every model asked for; `save` is told after each"
    train,test = (df[df.is_valid==v].reset_index(drop=True) for v in (False,True))
    mask = np.random.default_rng(a.seed).random(len(train))<0.1
    held = train[mask]
    inner,outer = loaders(train, mask, a.device, a.bs),loaders(train, np.zeros(len(train), bool), a.device, a.bs)
    size = dict(users=outer.n_users-1, items=outer.n_items-1, train=len(train), test=len(test))
    print(f'{size["users"]:,} users, {size["items"]:,} items, {len(train):,} training rows, {len(test):,} test rows of {test.user.nunique():,} users, '
          f'{(~test.item.isin(train.item)).sum():,} of them with an item that has no training row; on {a.device}', flush=True)
    res = {}
    try:
        for name in a.models:
            t = time.time()
            if name=='ease' and not ease_fits(outer.n_items, a.device):
                print(f'  EASE is left out: {outer.n_items:,} items need about {3*8*outer.n_items**2/2**30:.0f} GiB', flush=True)
                continue
            model,how = fitted(name, train, inner, held, outer, a)
            res[name] = dict(**judge(model, outer, test), **how, seconds=time.time()-t)
            print(f'{name}: recall@{k} {res[name]["recall"]:.4f}, NDCG@{k} {res[name]["ndcg"]:.4f} ({res[name]["seconds"]:.0f} s)', flush=True)
            save(res, size)
            del model
    except KeyboardInterrupt: print(f'broken off at {name}: what was done before is kept', flush=True)
    return res

def args():
    p = argparse.ArgumentParser(description='recall@20 and NDCG@20 on data in the layout of LightGCN')
    p.add_argument('path', nargs='?', help='folder with train.txt and test.txt')
    p.add_argument('--synthetic', action='store_true', help="a made-up set of Gowalla's size")
    p.add_argument('--models', nargs='+', choices=('popularity','ials','ease','mf','lightgcn'), help='in this order; default: all, LightGCN on a GPU only')
    p.add_argument('--loss', choices=('softmax','ccl','bpr'), default='softmax')
    p.add_argument('--values', nargs='+', type=float, help=f'tried: temperatures of the softmax, margins of CCL, weight decays of BPR; default {values}')
    p.add_argument('--epochs', type=int, help='train for so many; default: as many as serve the held-out rows')
    p.add_argument('--max-epochs', type=int, default=200)
    p.add_argument('--minutes', type=float, help='for each trained model, about; its settings share them; default: 60 on a CPU, no limit on a GPU')
    p.add_argument('--every', type=int, default=4, help='epochs between looks at the held-out rows')
    p.add_argument('--patience', type=int, default=3, help='looks without a gain before the end')
    p.add_argument('--factors', type=int, default=64)
    p.add_argument('--layers', type=int, default=3, help='steps of LightGCN')
    p.add_argument('--n-neg', type=int, default=2048, help='shared negatives of a batch')
    p.add_argument('--weight', type=float, default=150., help='weight of the negatives in CCL')
    p.add_argument('--bs', type=int, default=2048)
    p.add_argument('--lr', type=float, default=2e-3)
    p.add_argument('--wd', type=float, default=0.)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', help='JSON to write; default: none, but with --synthetic the record beside this script')
    a = p.parse_args()
    if not a.path and not a.synthetic: p.error('PATH or --synthetic is needed')
    if not a.models: a.models = ['popularity','mf'] + (['lightgcn'] if a.device!='cpu' else []) + ['ials','ease']
    if not a.values: a.values = values[a.loss]
    if a.minutes is None: a.minutes = 60 if a.device=='cpu' else float('inf')
    return a

if __name__=='__main__':
    a = args()
    df = stand_in() if a.synthetic else read_ratings(a.path, split='test')
    def save(res, size):
        if not (a.out or a.synthetic): return
        settings = {n: v for n,v in vars(a).items() if n not in ('path','out','minutes')}
        record('lightgcn_layout', dict(what=f'recall@{k} and NDCG@{k} of every item ranked, as LightGCN evaluates', data=Path(a.path).name if a.path else 'synthetic',
                                       size=size, settings=settings, results=res), a.out)
    res = table(df, a, save)
    print(pd.DataFrame({n: {f'recall@{k}':r['recall'], f'NDCG@{k}':r['ndcg'], 'seconds':round(r['seconds'])} for n,r in res.items()}).T.round(4).to_string())
