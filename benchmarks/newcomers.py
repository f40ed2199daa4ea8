"""Newcomers on MovieLens 100K: the error for users who came after the training, folded in, against training again.

The ratings are cut by time: the model is trained on the first 80%. Of the users who appear only later, with ten ratings or more
there, the first half of the ratings is folded in and the second half is predicted. Lists are judged on the same rows, every rating a choice,
by a dot product and by cosines under a softmax (folded in by steps of their loss) and by iALS (by its own half step).

    python benchmarks/newcomers.py            # three seeds
    python benchmarks/newcomers.py --quick    # one
"""
import sys,time,warnings

import numpy as np,pandas as pd,torch
from fastai.tabular.all import *
from cfext import *
from cfext.newcomers import *
from common import data_dir,mean_sd,record

warnings.simplefilter('ignore')
seeds = (42,) if '--quick' in sys.argv else (42, 1, 2)

def cut(df):
    "Training rows, rows to fold in, rows to predict"
    df = df.sort_values('timestamp', kind='stable')
    n = int(0.8*len(df))
    train,late = df[:n],df[n:]
    late = late[~late.user.isin(train.user)]
    late = late[late.item.isin(train.item)]
    late = late[late.groupby('user').item.transform('size')>=10]
    first = late.groupby('user').cumcount()<late.groupby('user').item.transform('size')//2
    return train,late[first],late[~first]

def fit(df, seed):
    dls = CFDataLoaders.from_df(df, valid_pct=0, seed=seed, bs=64, device='cpu', unk='na')
    learn = cf_learner(dls, n_factors=50, y_range=(0,5.5), seed=seed)
    set_seed(seed)
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(5, 5e-3, wd=0.1)
    return learn

def rankers(train, known, asked, seed):
    "NDCG@10 of lists for the newcomers, folded in and trained again, and seconds of both"
    def loaders(df, **kwargs): return CFDataLoaders.from_df(df, rating_name=None, valid_pct=0, seed=seed, bs=2048, device='cpu', **kwargs)
    def softmax(df):
        learn = cf_learner(loaders(df), n_factors=64, loss_func=FullSoftmaxLoss(), cbs=Negatives(seed=seed), seed=seed, unk_p=0)
        torch.manual_seed(seed)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(8, 0.02, wd=0.7)
        return learn
    def cosines(df):
        learn = cf_learner(loaders(df, by_user=True), CosineProduct, n_factors=64, loss_func=FullSoftmaxLoss(temp=0.12, weight=1.2), seed=seed)
        torch.manual_seed(seed)
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(30, 0.01)
        return learn
    def ials(df):
        dls = loaders(df)
        return cf_learner(dls, IALS(dls, n_factors=32, n_iter=10, alpha0=0.3, lam=0.01, seed=seed), unk_p=0)
    res,secs = {},{}
    def judged(name, f):
        t = time.perf_counter()
        learn = f()
        secs[name] = time.perf_counter()-t
        rep = learn.evaluate(split=asked[['user','item']], bar=False)['NDCG@10']
        res[name] = float(rep.iloc[0])
        res.setdefault('popularity', float(rep['popularity']))
    for name,make in (('softmax',softmax), ('cosines, softmax',cosines), ('iALS',ials)):
        early = make(train)
        judged(f'{name}, folded in', lambda: early.fold_in(known))
        judged(f'{name}, trained again', lambda: make(pd.concat([train,known])))
    return dict(ndcg=res, seconds=secs)

def one_seed(df, seed):
    train,known,asked = cut(df)
    rmse = lambda p: float(((np.asarray(p, dtype=float).reshape(-1)-asked.rating.to_numpy())**2).mean()**0.5)
    preds = lambda learn: learn.predict(asked)[2]
    learn = fit(train, seed)
    mean = asked.item.map(train.groupby('item').rating.mean())
    res = {'unknown row': rmse(preds(learn)), 'item mean': rmse(mean), 'folded in': rmse(preds(learn.fold_in(known)))}
    res['trained again'] = rmse(preds(fit(pd.concat([train,known]), seed)))
    x = torch.from_numpy(learn.dls.classes['item'].encode(known.item)).long()
    base,_ = pd.factorize(known.user)
    rows,y = torch.from_numpy(base).long(),torch.tensor(known.rating.to_numpy(np.float32))
    n = int(rows.max())+1
    pick = torch.arange(1000)%n
    many = [torch.nonzero(rows==u)[:,0] for u in range(n)]
    big = torch.cat([many[u] for u in pick])
    to = torch.arange(1000).repeat_interleave(torch.tensor([len(many[u]) for u in pick]))
    times = []
    for _ in range(5):
        t = time.perf_counter(),time.process_time()
        ridge_rows(learn.model, to, x[big], y[big], RowPrior(learn.model, learn.dls.train_ds))
        times.append((time.perf_counter()-t[0],time.process_time()-t[1]))
    lists = rankers(train, known, asked, seed)
    print(seed, {k: round(v, 4) for k,v in lists['ndcg'].items()}, {k: round(v, 2) for k,v in lists['seconds'].items()})
    print(seed, {k: round(v, 4) for k,v in res.items()}, f'{n} users, {len(known)} rows; 1,000 users ({len(big)} rows) in {np.median(times, 0)[0]:.3f} s, {np.median(times, 0)[1]:.3f} of the processor', flush=True)
    return dict(rmse=res, lists=lists, users=n, rows=len(known), asked=len(asked), seconds_for_1000=dict(zip(('wall','processor'), np.median(times, 0).tolist())), rows_of_1000=len(big))

if __name__=='__main__':
    df = read_ratings(data_dir('ml-100k'))[['user','item','rating','timestamp']]
    runs = [one_seed(df, s) for s in seeds]
    record('newcomers', dict(what='RMSE on the later half of the ratings of users who came after the training', seeds=seeds,
                             rmse={k: mean_sd(r['rmse'][k] for r in runs) for k in runs[0]['rmse']},
             ndcg={k: mean_sd(r['lists']['ndcg'][k] for r in runs) for k in runs[0]['lists']['ndcg']}, runs=runs))
