"""Guo & Berkhahn's table on Rossmann: kNN, forest and boosted trees, without and with entity embeddings, and the network.

    python benchmarks/rossmann.py select    # hyper-parameters, on the validation tail of the training rows
    python benchmarks/rossmann.py run       # the table, on the test rows
    python benchmarks/rossmann.py networks  # five networks and their mean
    python benchmarks/rossmann.py all_rows  # a network on all 759,904 rows before the test, beside it

Protocol of the paper (arXiv 1604.06737, table IV) and of its code: rows with Sales > 0 in order of time, the last 10% as test,
200,000 rows drawn from the rest to train on; store, day of week, promo, year, month, day and state; the logarithm of sales as
target; mean absolute percentage error. Two things differ: the 200,000 rows are drawn without replacement (with it, one row could
stand on both sides of a fold), and the network never looks at test rows (the paper's scales its target by the test rows' maximum
too). "without" are integer codes, as in the paper's code; a line with one-hot (kNN) or native categories (trees) is added,
because a good baseline is not an integer code. Data: $CFEXT_DATA/rossmann (default ../shared/data)."""
import argparse,datetime,itertools,json,os,platform,sys,time,warnings
from pathlib import Path

import lightgbm as lgb
import numpy as np,pandas as pd,sklearn,torch
from fastai.tabular.all import (Categorify,L1LossFlat,Normalize,RegressionBlock,TabularDataLoaders,set_seed,tabular_config,
                                tabular_learner)
import fastai
from sklearn.ensemble import RandomForestRegressor
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import Normalizer,OneHotEncoder
from cfext.features import EmbeddingFeatures

warnings.filterwarnings('ignore')
here = Path(__file__).resolve()
out_file = here.with_suffix('.json')
data = Path(os.environ.get('CFEXT_DATA', here.parents[2]/'shared/data'))/'rossmann'
cats = ['Store','DayOfWeek','Year','Month','Day','State']
szs = dict(Store=10, DayOfWeek=6, Year=2, Month=6, Day=10, State=6)  # the paper's widths
n_jobs = int(os.environ.get('OMP_NUM_THREADS', 2))
paper = dict(knn=(.290,.116), forest=(.158,.108), trees=(.152,.115), network=(.101,.093))

def load():
    "Rows with sales, oldest first, with the paper's features"
    df = pd.read_csv(data/'train.csv.gz', usecols=['Store','DayOfWeek','Date','Sales','Promo'])
    df = df[df.Sales>0].iloc[::-1].reset_index(drop=True)
    dt = pd.to_datetime(df.Date)
    df = df.assign(Year=dt.dt.year, Month=dt.dt.month, Day=dt.dt.day, Promo=df.Promo.astype('float32'),
                   log_sales=np.log(df.Sales).astype('float32')).merge(pd.read_csv(data/'store_states.csv'), on='Store', how='left')
    return df[cats+['Promo','Sales','log_sales']]

def split(n_train=200_000, seed=123):
    "(training rows in order of time, test rows, training row at which the validation tail begins)"
    df = load()
    k = int(.9*len(df))
    idx = np.sort(np.random.default_rng(seed).choice(k, n_train, replace=False))
    return df.iloc[idx].reset_index(drop=True),df[k:].reset_index(drop=True),int(np.searchsorted(idx, int(.9*k)))

def mape(df, log_pred): return float(np.mean(np.abs(np.exp(log_pred)-df.Sales)/df.Sales))

def fit_net(df, seed=1, epochs=5, lr=5e-3, bs=512, layers=(1000,500), wd=.01, embed_p=0., ps=0., bn=True):
    "fastai's tabular learner on `df`, with the paper's widths, layers, loss and target"
    set_seed(seed)
    dls = TabularDataLoaders.from_df(df[cats+['Promo','log_sales']].reset_index(drop=True), procs=[Categorify,Normalize], cat_names=cats,
        cont_names=['Promo'], y_names='log_sales', y_block=RegressionBlock(), valid_idx=list(range(64)), bs=bs, val_bs=16384)
    learn = tabular_learner(dls, layers=list(layers), emb_szs=szs, y_range=(0,1.02*float(df.log_sales.max())), loss_func=L1LossFlat(),
                            wd=wd, config=tabular_config(embed_p=embed_p, ps=ps, use_bn=bn))
    with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn

def net_preds(learn, df):
    dl = learn.dls.test_dl(df[cats+['Promo']], bs=16384)
    learn.model.eval()
    with torch.no_grad(): return np.concatenate([learn.model(*b[:2])[:,0].cpu().numpy() for b in dl])

def knn(F, y, G, k=10, p=2, promo=1., norm=False):
    "k nearest neighbours, weighted by distance"
    def prep(o):
        o = np.array(o, dtype='float32')
        o[:,0] *= promo
        return Normalizer().fit_transform(o) if norm else o
    m = KNeighborsRegressor(k, weights='distance', p=p, n_jobs=n_jobs).fit(prep(F), y)
    return m.predict(prep(G))

def forest(F, y, G, n=100, leaf=1, mf=1., seed=1):
    return RandomForestRegressor(n, max_depth=35, min_samples_leaf=leaf, max_features=mf, n_jobs=n_jobs, random_state=seed).fit(F, y).predict(G)

def trees(F, y, G, rounds=1000, leaves=63, lr=.05, objective='l2', seed=1, at=None):
    "Boosted trees; the predictions after each of `at` rounds if that is given"
    m = lgb.LGBMRegressor(n_estimators=rounds, num_leaves=leaves, learning_rate=lr, objective=objective, subsample=.7, subsample_freq=1,
                          colsample_bytree=.7, random_state=seed, n_jobs=n_jobs, verbose=-1).fit(F, y)
    return m.predict(G) if at is None else [m.predict(G, num_iteration=r) for r in at]

net_tries = [dict(lr=5e-3), dict(lr=1e-2), dict(lr=5e-3, epochs=10, bs=256)]
models = dict(knn=knn, forest=forest, trees=trees)

def codes(fit, df, native=False):
    "Integer codes of the paper's features (promo first); as categories if `native`"
    res = pd.DataFrame(dict(Promo=df.Promo))
    for c in cats:
        vals = sorted(fit[c].unique())
        res[c] = pd.Categorical(df[c], categories=vals) if native else pd.Index(vals).get_indexer(df[c])
    return res

def one_hot(fit, df):
    enc = OneHotEncoder(handle_unknown='ignore', dtype=np.float32, sparse_output=False).fit(fit[cats])
    return np.hstack([df[['Promo']].to_numpy(), enc.transform(df[cats])])

def features(fit, dfs, source, cv=None):
    "Promo and the embeddings of `fit` (in sample, or out of fold) and of each of `dfs`"
    ef = EmbeddingFeatures(source, cv=cv, seed=1)
    X = ['Promo',*cats]
    F = ef.fit_transform(fit[X+['log_sales']] if cv else fit[X])
    if cv: print('agreement of the folds', ef.agreement_.mean().round(3).to_dict(), flush=True)
    return [F,*(ef.transform(o[X]) for o in dfs)]

def save(**new):
    old = json.loads(out_file.read_text()) if out_file.exists() else {}
    ram = os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30
    model = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine())
    info = dict(date=str(datetime.date.today()), machine=f'{os.cpu_count()} x {model}, {ram:.0f} GiB',
                versions={m.__name__: m.__version__ for m in (torch,fastai,sklearn,lgb,pd,np)})
    out_file.write_text(json.dumps({**old, **new, **info}, indent=1)+'\n')

def grid(**kwargs): return [dict(zip(kwargs, o)) for o in itertools.product(*kwargs.values())]

def select(args):
    "Try hyper-parameters on the validation tail; nothing of the test rows is read"
    df,_,v = split()
    fit,val = df[:v],df[v:].reset_index(drop=True)
    q = val.sample(min(len(val), 6000), random_state=0).reset_index(drop=True)
    print(len(fit), 'rows to fit,', len(val), 'in the tail', flush=True)
    res = json.loads(out_file.read_text()).get('selection', {}) if out_file.exists() else {}  # what was tried already is kept
    nets = res.setdefault('network', [])
    for kw in net_tries:
        if kw in [o['params'] for o in nets]: continue
        t,learn = time.time(),fit_net(fit, **kw)
        nets.append(dict(params=kw, mape=mape(val, net_preds(learn, val))))
        print('network', nets[-1], f'{time.time()-t:.0f}s', flush=True)
        save(selection=res)
    if all(o in res for o in ('knn_with','knn_without','knn_one_hot','trees_with','trees_without','trees_native','forest_with','forest_without')): return
    learn = fit_net(fit, **min(nets, key=lambda o: o['mape'])['params'])
    F,G = features(fit, [q], learn)
    C,D,N,M = codes(fit, fit),codes(fit, q),codes(fit, fit, True),codes(fit, q, True)
    tries = dict(
        knn_with=(knn, F, G, grid(k=[10,20], promo=[.3,1.])),
        knn_without=(knn, C, D, [dict(k=10, p=1, norm=True)]),  # as in the paper's code
        trees_with=(trees, F, G, grid(leaves=[31,127])),
        trees_without=(trees, C, D, grid(leaves=[127])),
        trees_native=(trees, N, M, grid(leaves=[31])),
        forest_with=(forest, F, G, grid(n=[10], leaf=[1,5], mf=[.3])),
        forest_without=(forest, C, D, grid(n=[10], leaf=[1,5], mf=[1.])),
        knn_one_hot=(knn, one_hot(fit, fit), one_hot(fit, q[:1000]), [dict(k=10)]))
    y = fit.log_sales.to_numpy()
    for name,(fn,A,B,kws) in tries.items():
        if name in res: continue
        res[name],sub = [],q[:len(B)]
        for kw in kws:
            t,at = time.time(),dict(trees_without=(500,1000,2000)).get(name, (250,500,1000)) if fn is trees else None
            preds = trees(A, y, B, rounds=at[-1], at=at, **kw) if at else [fn(A, y, B, **kw)]
            for r,pred in zip(at or [None], preds):
                res[name].append(dict(params={**kw, 'rounds':r} if r else kw, mape=mape(sub, pred)))
                print(name, res[name][-1], f'{time.time()-t:.0f}s', flush=True)
            save(selection=res)

def run(args):
    "Fit on all training rows with the chosen hyper-parameters; report on the test rows"
    sel = json.loads(out_file.read_text())['selection']
    best = {k: min(v, key=lambda o: o['mape'])['params'] for k,v in sel.items()}
    net_kw = {k: tuple(v) if isinstance(v, list) else v for k,v in best['network'].items()}
    best['forest_with']['n'] = best['forest_without']['n'] = args.n_trees
    df,test,_ = split()
    old = json.loads(out_file.read_text())
    y,res,nets = df.log_sales.to_numpy(),{},{}
    def table():
        mean = {k: float(np.mean(v)) for k,v in res.items()}
        return {m: dict(without=mean[f'{m}_without'], with_=mean[f'{m}_with'], ratio=mean[f'{m}_with']/mean[f'{m}_without'],
                        paper_ratio=paper[m][1]/paper[m][0]) for m in models if f'{m}_with' in mean}
    def note(name, pred, rows=test):
        res.setdefault(name, []).append(pred if isinstance(pred, float) else mape(rows, pred))
        print(f'{name:24} {res[name][-1]:.4f}', flush=True)
        save(mape=res, table=table(), chosen=best, paper={k: dict(zip(('without','with'), v)) for k,v in paper.items()},
             rows=dict(train=len(df), test=len(test)), command=f'python benchmarks/rossmann.py select && python benchmarks/rossmann.py run')
    def base(name, fn, rows=test):
        "A model that needs no network: kept from an earlier run with the same parameters"
        kept = name in old.get('mape', {}) and old.get('chosen', {}).get(name)==best[name]
        note(name, old['mape'][name][0] if kept else fn(), rows)
    C,D = codes(df, df),codes(df, test)
    sub = test.sample(5000, random_state=0).reset_index(drop=True)  # 1,183 columns: a sample of the queries
    base('knn_without', lambda: knn(C, y, D, **best['knn_without']))
    base('forest_without', lambda: forest(C, y, D, **best['forest_without']))
    base('trees_without', lambda: trees(C, y, D, **best['trees_without']))
    base('trees_native', lambda: trees(codes(df, df, True), y, codes(df, test, True), **best['trees_native']))
    base('knn_one_hot', lambda: knn(one_hot(df, df), y, one_hot(df, sub), **best['knn_one_hot']), sub)
    learns,preds = [],[]
    for seed in range(1, args.seeds+1):
        learns.append(fit_net(df, seed=seed, **net_kw))
        preds.append(net_preds(learns[-1], test))
        note('network', preds[-1])
    for learn in learns:
        F,G = features(df, [test], learn)
        for m,fn in models.items(): note(f'{m}_with', fn(F, y, G, **best[f'{m}_with']))
    recipe = lambda o: learns[0] if len(o)==len(df) else fit_net(o, **net_kw)
    F,G = features(df, [test], recipe, cv=args.folds)
    for m in ('knn','trees'): note(f'{m}_with_out_of_fold', models[m](F, y, G, **best[f'{m}_with']))
    print(pd.DataFrame(table()).T.round(3).to_string())

def networks(args):
    "Several networks on the 200,000 rows, each alone and the mean of their sales, as the paper's code averages five"
    best = min(json.loads(out_file.read_text())['selection']['network'], key=lambda o: o['mape'])['params']
    df,test,_ = split()
    preds = []
    for seed in range(1, args.networks+1):
        preds.append(net_preds(fit_net(df, seed=seed, **best), test))
        each,mean = [mape(test, p) for p in preds],mape(test, np.log(np.mean(np.exp(preds), 0)))
        print('networks', [round(o, 4) for o in each], 'mean of them', round(mean, 4), flush=True)
        save(networks=dict(params=best, each=each, mean_of_all=mean))

def all_rows(args):
    "The network on all rows before the test rows, four epochs in batches of 1,024"
    df = load()
    k = int(.9*len(df))
    m = mape(df[k:], net_preds(fit_net(df[:k], epochs=4, bs=1024), df[k:]))
    print('network, all rows', m)
    save(network_all_rows=dict(rows=k, epochs=4, bs=1024, lr=5e-3, mape=m))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=['select','run','networks','all_rows'])
    p.add_argument('--seeds', type=int, default=1, help='networks whose embeddings are given to kNN, forest and trees')
    p.add_argument('--networks', type=int, default=5, help='networks of `networks`')
    p.add_argument('--n-trees', type=int, default=40, help='trees of a forest (the paper grows 200)')
    p.add_argument('--folds', type=int, default=3, help='folds of the out-of-fold features (first seed)')
    args = p.parse_args()
    torch.set_num_threads(n_jobs)
    dict(select=select, run=run, networks=networks, all_rows=all_rows)[args.what](args)
