"""The lesson's recipe on MovieLens: validation error of each model, beside fastai's own learner on the same rows.

    python benchmarks/lesson.py            # all of it
    python benchmarks/lesson.py --quick    # one seed
"""
import sys,warnings

import pandas as pd,torch
from fastai.collab import *
from fastai.tabular.all import *
from cfext import *
from common import data_dir,mean_sd,record

warnings.simplefilter('ignore')
seeds = (42,) if '--quick' in sys.argv else (42, 1, 2)

def fit(learn, epochs=5, lr=5e-3, wd=0.1):
    "Validation mean squared error after the recipe, and after each epoch"
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr, wd=wd)
    return [float(v[1]) for v in learn.recorder.values]

def both(df, seed, bs=64, **names):
    "fastai's loaders and ours, with the same validation rows"
    theirs = CollabDataLoaders.from_df(df, seed=seed, bs=bs, device='cpu', **names)
    ours = CFDataLoaders.from_df(df, seed=seed, bs=bs, device='cpu', **names)
    rows = lambda ids,y: sorted(zip(*(map(str, o) for o in ids), map(float, y)))
    u,i,r = names['user_name'],names['item_name'],names['rating_name']
    v = df.iloc[theirs.valid_ds.items.index]
    f = ours.valid_ds.frame((ours.valid_ds.x, ours.valid_ds.y))
    known = (f[u]!='#na#')&(f[i]!='#na#')
    if set(rows((f[u][known], f[i][known]), f[r][known]))-set(rows((v[u], v[i]), v[r])): raise SystemExit('the validation rows differ')
    return theirs,ours

class LessonNN(Module):
    "The lesson's own network, as printed: two of fastai's embeddings, 100 activations"
    def __init__(self, user_sz, item_sz, y_range=(0,5.5), n_act=100):
        self.user_factors,self.item_factors,self.y_range = Embedding(*user_sz),Embedding(*item_sz),y_range
        self.layers = nn.Sequential(nn.Linear(user_sz[1]+item_sz[1], n_act), nn.ReLU(), nn.Linear(n_act, 1))
    def forward(self, x): return sigmoid_range(self.layers(torch.cat([self.user_factors(x[:,0]), self.item_factors(x[:,1])], dim=1)), *self.y_range)

def plain(dls, model): return cf_learner(dls, model, unk_p=0)

def ml100k(seed):
    df = read_ratings(data_dir('ml-100k'))
    theirs,ours = both(df, seed, user_name='user', item_name='title', rating_name='rating')
    n,yr = (ours.n_users, ours.n_items),(0,5.5)
    cfgs = {
        'fastai collab_learner': lambda: fit(collab_learner(theirs, n_factors=50, y_range=yr)),
        'fastai collab_learner, every row once': lambda: fit(collab_learner(ours, n_factors=50, y_range=yr)),
        'cf_learner': lambda: fit(cf_learner(ours, n_factors=50, y_range=yr)),
        'DotProductBias': lambda: fit(plain(ours, DotProductBias(*n, 50, y_range=yr))),
        "DotProductBias, Adam's own wd .01": lambda: fit(plain(ours, DotProductBias(*n, 50, y_range=yr)), wd=None), # the lesson names no wd here
        "DotProduct, Adam's own wd .01": lambda: fit(plain(ours, DotProduct(*n, 50, y_range=yr)), wd=None),
        'DotProductBias, no weight decay': lambda: fit(plain(ours, DotProductBias(*n, 50, y_range=yr)), wd=0),
        'DotProduct, no weight decay': lambda: fit(plain(ours, DotProduct(*n, 50, y_range=yr)), wd=0),
        'CollabNN as in the lesson, wd .01': lambda: fit(plain(ours, CollabNN(*get_emb_sz(ours.train_ds), y_range=yr)), wd=0.01),
        "the lesson's own class of it, fastai's loop": lambda: fit(Learner(ours, LessonNN(*get_emb_sz(ours.train_ds), y_range=yr), loss_func=MSELossFlat()), wd=0.01),
        "cf_learner('nn')": lambda: fit(cf_learner(ours, 'nn', y_range=yr)),
        "cf_learner('nn', layers [100,50])": lambda: fit(cf_learner(ours, 'nn', y_range=yr, config=dict(layers=[100,50]))),
    }
    return {k: (set_seed(seed), f())[1] for k,f in cfgs.items()}

def ml_small(seed):
    df = read_ratings(data_dir('ml-latest-small-2016'))
    theirs,ours = both(df, seed, user_name='user', item_name='item', rating_name='rating')
    cfgs = {
        'fastai collab_learner': lambda: fit(collab_learner(theirs, n_factors=50, y_range=(0,5.5))),
        'cf_learner': lambda: fit(cf_learner(ours, n_factors=50, y_range=(0,5.5))),
    }
    return {k: (set_seed(seed), f())[1] for k,f in cfgs.items()}

# Printed by the lesson, the book (the later figure of a pair) and fastai's pages, one run each
published = {'ml-100k': {'fastai collab_learner': [.8115, .8169], "DotProduct, Adam's own wd .01": [.8846], "DotProductBias, Adam's own wd .01": [.8941, .8926],
                         'DotProductBias': [.8218, .8200], 'CollabNN as in the lesson, wd .01': [.8413, .8675], "cf_learner('nn', layers [100,50])": [.8576, .8649]},
             'ml-latest-small-2016': {'cf_learner': [.76338]}}

if __name__=='__main__':
    res = {}
    for name,f in (('ml-100k',ml100k), ('ml-latest-small-2016',ml_small)):
        runs = []
        for s in seeds:
            runs.append(f(s))
            print(name, s, {k: round(v[-1], 4) for k,v in runs[-1].items()}, flush=True)
        res[name] = {k: dict(**mean_sd(r[k][-1] for r in runs), best_epoch=mean_sd(min(r[k]) for r in runs), epochs=[r[k] for r in runs],
                             published=published[name].get(k)) for k in runs[0]}
        print(pd.DataFrame({k: {'mean':v['mean'], 'sd':v['sd'], 'published':v['published']} for k,v in res[name].items()}).T.to_string(), flush=True)
    record('lesson', dict(what='validation mean squared error after 5 epochs of fit_one_cycle(5, 5e-3, wd=.1), bs 64, random 20%', seeds=seeds, results=res))
