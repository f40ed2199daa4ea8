"""Lists on the split of the NCF paper (He et al. 2017), MovieLens 1M: HR@10 and NDCG@10 of one held-out film among 99 sampled ones.

The protocol is the published one, and is kept for comparison only: a sample of 99 says less than the whole catalogue. A user's
rank is the number of sampled films that score higher than the held-out one; a film that scores the same does not push it down,
which decides popularity's figures (.4538 / .2545; with ties against, also printed, .4531 / .2541) and nothing else's. Where a
user's own film is among the 99 (156 users, a defect of the original) it is not compared with itself.

Choices are made on validation rows: the last training row of each user is held out, with 99 films drawn from those the user has no
training row of. The best setting of each model is fitted anew to all training rows, and only that meets the test. The factors of
several models side by side are those of a wider dot product, whose scores are the sum of theirs; their weight is chosen alike.

That the last row is the latest one is not written in the training file, which has no times. Its rows are in order of time within a
user all the same: matched with the sequences of the SASRec paper's file (by which users have which films, which is one to one), all
993,576 rows that the two share stand in the same order. One of the models makes use of that order, of training rows alone, and
says so in its name: MF and NeuMF of the papers see a set of pairs and no order, as do all others here, and it is with those that
their figures compare.

    python benchmarks/ncf_ml1m.py                      # three seeds
    python benchmarks/ncf_ml1m.py --only "dot, iALS"   # some models anew; the others stay in the record
    python benchmarks/ncf_ml1m.py --quick              # one seed, the settings that were chosen before
"""
import gzip,json,sys,time,warnings

import numpy as np,pandas as pd,torch
from fastcore.basics import noop
from cfext import *
from common import data_dir,here,mean_sd,record

warnings.simplefilter('ignore')
quick = '--quick' in sys.argv
only = sys.argv[sys.argv.index('--only')+1:] if '--only' in sys.argv else None
seeds = (0,) if quick else (0, 1, 2)
k = 10

def read(path):
    "Training rows, and for the test (user, item) and 99 items a user"
    train = pd.read_csv(path/'ml-1m.train.rating.gz', sep='\t', header=None, names=['user','item','rating'])
    test = pd.read_csv(path/'ml-1m.test.rating', sep='\t', header=None).iloc[:,:2].to_numpy()
    with gzip.open(path/'ml-1m.test.negative.gz', 'rt') as f: lines = [l.split('\t') for l in f]
    assert [l[0] for l in lines]==[f'({u},{i})' for u,i in test], 'the files of positives and negatives are not in step'
    return train,test,np.array([[int(o) for o in l[1:]] for l in lines])

def hold_out(train, seed=0):
    "The rest, the last row of each user, and 99 items drawn from those the user has no training row of"
    last = train.groupby('user').tail(1)
    rng,items = np.random.default_rng(seed),np.arange(train.item.max()+1)
    seen = train.groupby('user').item.agg(list)
    negs = [rng.choice(np.setdiff1d(items, seen[u]), 99, replace=False) for u in last.user]
    return train.drop(last.index),last[['user','item']].to_numpy(),np.stack(negs)

def loaders(df): return CFDataLoaders.from_df(df, rating_name=None, valid_pct=0, device='cpu', bs=8192, seed=0, by_user=True)

def judge(dls, model, pos, negs, against=False):
    "HR@10 and NDCG@10; a film without a training row scores below all others"
    users,items = dls.classes['user'],dls.classes['item']
    us,cand = torch.from_numpy(users.encode(pd.Index(pos[:,0]))).long(),np.concatenate([pos[:,1:],negs], 1)
    codes = torch.from_numpy(items.encode(pd.Index(cand.ravel()))).long().reshape(cand.shape)
    with in_mode(model), torch.no_grad(): s = torch.cat([model.score_items(u).gather(1, c) for u,c in zip(us.split(512), codes.split(512))])
    s = s.masked_fill(codes==0, -torch.inf)
    above = (s[:,1:]>=s[:,:1]) if against else (s[:,1:]>s[:,:1])
    rank = (above & torch.from_numpy(negs!=pos[:,1:])).sum(1).numpy()
    return dict(HR=float((rank<k).mean()), NDCG=float(np.where(rank<k, 1/np.log2(rank+2), 0).mean()))

def dot(dls, seed, lr, wd, epochs, n_factors, a=0., model=DotProduct, **loss):
    ds,u = dls.train_ds,dls.train_ds.x[:,0].long()
    ds.w = torch.bincount(u)[u].float()**-a if a else None
    learn = cf_learner(dls, model, n_factors=n_factors, loss_func=FullSoftmaxLoss(**loss), seed=seed, unk_p=0)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr, wd=wd)
    ds.w = None
    return learn.model

def ials(dls, seed, recent=0., half=20, **kw):
    "iALS; with `recent`, a user's last row weighs 1+recent, and what is beyond 1 halves every `half` rows before it"
    ds = dls.train_ds
    u = pd.Series(ds.x[:,0].numpy())
    ds.w = torch.from_numpy(1+recent*2.**(-u.groupby(u).cumcount(ascending=False).to_numpy()/half)).float() if recent else None
    model = IALS(dls, seed=seed, n_iter=10, **kw)
    ds.w = None
    return model

members = {}
def side_by_side(dls, seed, weight, n=3):
    "Three of iALS and three of cosines, their factors side by side: a dot product whose score is the sum of theirs"
    def tables(name, s):
        if (id(dls),name,s) not in members:
            make,grid = makers[name]
            m = make(dls, s, **(grid[3] if name=='dot, iALS' else grid[1])) # the settings that validation chose for each alone
            unit = (lambda t: torch.nn.functional.normalize(t, dim=1)) if isinstance(m, CosineProduct) else noop
            members[id(dls),name,s] = unit(m.user_factors.detach()),unit(m.item_factors.detach())
        return members[id(dls),name,s]
    parts = [(tables(name, seed*n+j),w) for name,w in (('dot, iALS',1.),('cosine, full softmax',weight)) for j in range(n)]
    P,Q = torch.cat([p for (p,_),_ in parts], 1),torch.cat([q*w for (_,q),w in parts], 1)
    model = DotProduct(dls.n_users, dls.n_items, P.shape[1])
    with torch.no_grad():
        model.user_factors.copy_(P)
        model.item_factors.copy_(Q)
    return model

makers = {
    'popularity': (lambda dls,seed: Popularity(dls), [{}]),
    'item-kNN':   (lambda dls,seed,**kw: ItemKNN(dls, **kw), [dict(k=n, shrink=s) for n in (50,100,200) for s in (10.,)]),
    'EASE':       (lambda dls,seed,**kw: EASE(dls, **kw), [dict(reg=r) for r in (500.,1000.,2000.)]),
    'dot, iALS':  (ials, [dict(n_factors=64, alpha0=a, lam=0.003) for a in (0.15,0.3,0.6)] + [dict(n_factors=n, alpha0=0.3, lam=l) for n,l in ((128,0.006),(256,0.006),(256,0.01))]),
    'dot, iALS, recent rows first': (ials, [dict(n_factors=64, alpha0=0.3, lam=0.003, recent=4., half=h) for h in (10,20)]),
    'dot, full softmax': (lambda dls,seed,**kw: dot(dls, seed, **kw), [dict(lr=0.02, wd=wd, epochs=30, n_factors=64, a=0.5) for wd in (0.05,0.2)]),
    'cosine, full softmax': (lambda dls,seed,**kw: dot(dls, seed, model=CosineProduct, **kw), [dict(lr=0.01, wd=0., epochs=30, n_factors=64, temp=t, weight=w) for t,w in ((0.09,1.),(0.12,1.),(0.15,1.),(0.12,1.1))]),
    'dot, iALS and cosines side by side': (side_by_side, [dict(weight=w) for w in (0.3,0.5,0.7,1.,1.5)])}
seeded = ('dot, iALS','dot, iALS, recent rows first','dot, full softmax','cosine, full softmax','dot, iALS and cosines side by side')

def save(res):
    "Record what there is so far"
    record('ncf_ml1m', dict(what='HR@10 and NDCG@10 of the held-out film among 99 sampled ones, the split of He et al. (2017)', seeds=seeds,
                            published={'NeuMF (Dacrema 2019)':dict(HR=.673, NDCG=.401), 'MF (Rendle 2020)':dict(HR=.729, NDCG=.452)}, results=res))

if __name__=='__main__':
    train,test,negs = read(data_dir('ncf-ml-1m'))
    rest,pos,vnegs = hold_out(train)
    inner,outer = loaders(rest),loaders(train)
    before = json.loads((here/'ncf_ml1m.json').read_text())['results'] if quick or only else {}
    res = before if only else {}
    for name in only or makers:
        make,grid = makers[name]
        tried,t = [],time.time()
        if quick: grid = [before[name]['setting']]
        for kw in grid if len(grid)>1 else []:
            tried.append(judge(inner, make(inner, 0, **kw), pos, vnegs))
            print(f'  {name} {kw}: {tried[-1]}', flush=True)
        kw = grid[int(np.argmax([o['NDCG'] for o in tried])) if tried else 0]
        runs = [judge(outer, make(outer, s, **kw), test, negs) for s in (seeds if name in seeded else seeds[:1])]
        res[name] = dict(setting=kw, tried=tried, HR=mean_sd(r['HR'] for r in runs), NDCG=mean_sd(r['NDCG'] for r in runs), seconds=time.time()-t, date=time.strftime('%Y-%m-%d'))
        if name=='popularity': res[name].update({'ties against':judge(outer, Popularity(outer), test, negs, against=True), 'on the validation rows':judge(inner, Popularity(inner), pos, vnegs)})
        print(f'{name} {kw}: HR@10 {res[name]["HR"]["mean"]:.4f}, NDCG@10 {res[name]["NDCG"]["mean"]:.4f}', flush=True)
        save(res)
    print(pd.DataFrame({n: {'HR@10':v['HR']['mean'], 'NDCG@10':v['NDCG']['mean']} for n,v in res.items()}).T.round(4).to_string())
