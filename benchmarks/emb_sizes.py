"""Which rule for the widths of embeddings, at an equal budget of parameters? ML-100K, Adult and Rossmann, over seeds.

    CFEXT_DATA=<folder> python benchmarks/emb_sizes.py [--seeds 5] [--sets ml100k adult rossmann]

Each rule spreads the same budget over the columns (`get_emb_szs(dls, rule, budget=...)`); `equal` gives every column one width
and is the control. The rest of the network, the rows, the order of the batches and the schedule of a seed are the same for all
rules; rules that come to the same widths share one run. The loop is a plain one over tensors (AdamW, one cycle, every row once
an epoch); the models are those of `cf_learner(model='nn')` and `tabular_learner`. Nothing is chosen on the rows that are
reported: epochs, rates and layers are fixed in `SETS`, and the loss is that of the last epoch.

A difference is called noise unless a paired t-test over the seeds, corrected by Holm for the rules compared, is below .05."""
import argparse,json,sys,time
from pathlib import Path
import numpy as np,pandas as pd,torch
from scipy import stats
from fastai.tabular.all import *
from cfext.sources import read_ratings
from cfext.data import CFDataLoaders
from cfext.embed import cat_counts,emb_rules,get_emb_szs
from cfext.learner import cf_learner
from datetime import date
from common import data_dir,machine

HERE = Path(__file__).parent
RULES = {'equal': lambda n: 1, **emb_rules}
SETS = dict(ml100k=dict(metric='MSE', budgets=(20_000,80_000), epochs=5, bs=128, lr=5e-3, wd=.1),
            adult=dict(metric='log loss', budgets=(300,1_500), epochs=4, bs=256, lr=5e-3, wd=.01),
            rossmann=dict(metric='MSE of standardised log sales', budgets=(8_000,24_000), epochs=6, bs=512, lr=5e-3, wd=.01))

def ml100k(seed):
    df = read_ratings(data_dir('ml-100k'))
    dls = CFDataLoaders.from_df(df, user_name='user', item_name='item', rating_name='rating', valid_pct=.2, seed=seed, device='cpu')
    make = lambda szs: cf_learner(dls, model='nn', emb_szs=szs, y_range=(0,5.5), config=dict(layers=[100])).model
    (tr,va) = [((ds.x.long(),), ds.y) for ds in (dls.train_ds, dls.valid_ds)]
    return dls,make,F.mse_loss,tr,va

def tabular(df, cats, conts, y, splits, loss, seed, **kwargs):
    dls = TabularPandas(df, [Categorify,FillMissing,Normalize], cats, conts, y_names=y, splits=splits, **kwargs).dataloaders(bs=64, device='cpu')
    make = lambda szs: tabular_learner(dls, layers=[100,50], emb_szs=szs).model
    part = lambda to: (torch.tensor(to.cats.to_numpy(np.int64)), torch.tensor(to.conts.to_numpy(np.float32)))
    ys = lambda to: torch.tensor(to.ys.to_numpy())[:,0].long() if loss is F.cross_entropy else torch.tensor(to.ys.to_numpy(np.float32))
    return dls,make,loss,(part(dls.train_ds),ys(dls.train_ds)),(part(dls.valid_ds),ys(dls.valid_ds))

def adult(seed):
    df = pd.read_csv(data_dir('adult_sample')/'adult.csv.gz', skipinitialspace=True)
    cats = ['workclass','education','marital-status','occupation','relationship','race','sex','native-country']
    return tabular(df, cats, ['age','fnlwgt','education-num','capital-gain','capital-loss','hours-per-week'], 'salary',
                   RandomSplitter(.2, seed=seed)(range_of(df)), F.cross_entropy, seed, y_block=CategoryBlock())

def rossmann(seed, n_train=100_000):
    "The features of the entity-embedding paper; the last tenth of the days is held out, the training rows are a sample of the rest"
    df = pd.read_csv(data_dir('rossmann')/'train.csv.gz', dtype={'StateHoliday':str}, parse_dates=['Date'])
    df = df[df.Sales>0].merge(pd.read_csv(data_dir('rossmann')/'store_states.csv'), on='Store').sort_values('Date', kind='stable').reset_index(drop=True)
    cut = df.Date.iloc[int(len(df)*.9)]
    train,valid = np.flatnonzero(df.Date<cut),np.flatnonzero(df.Date>=cut)
    keep = np.random.default_rng(seed).choice(train, n_train, replace=False)
    df['Year'],df['Month'],df['Day'] = df.Date.dt.year,df.Date.dt.month,df.Date.dt.day
    y = np.log(df.Sales)
    df['target'] = ((y-y[train].mean())/y[train].std()).astype('float32')
    rows = np.concatenate([keep,valid])
    df = df.iloc[rows].reset_index(drop=True)
    return tabular(df, ['Store','DayOfWeek','Promo','Year','Month','Day','State'], [], 'target',
                   (list(range(n_train)),list(range(n_train,len(df)))), F.mse_loss, seed)

def fit(model, loss, tr, va, epochs, bs, lr, wd, seed):
    "Train on `tr`, return the loss on `va`"
    (xs,y),(vx,vy) = tr,va
    gen,n = torch.Generator().manual_seed(seed),len(y)
    steps = epochs*math.ceil(n/bs)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=wd)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=.25)
    call = lambda xs: model(*xs) if len(xs)>1 or hasattr(model, 'user_factors') else model(xs[0], None)
    model.train()
    for _ in range(epochs):
        for idx in torch.randperm(n, generator=gen).split(bs):
            loss(call([x[idx] for x in xs]), y[idx]).backward()
            opt.step(); sched.step(); opt.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        outs = torch.cat([call(b) for b in zip(*(x.split(16_384) for x in vx))])
        return loss(outs, vy).item()

def holm(ps):
    "Holm's step-down correction"
    ps,res,most = np.asarray(ps),np.ones(len(ps)),0.
    for rank,i in enumerate(np.argsort(ps)):
        most = max(most, min(1, ps[i]*(len(ps)-rank)))
        res[i] = most
    return res

def summary(runs, ref):
    "A row for each rule: mean, deviation over seeds, paired difference to `ref` with its Holm p-value, and the verdict"
    tab = runs.pivot(index='seed', columns='rule', values='loss')
    rows = [dict(rule=r, widths=runs[runs.rule==r].widths.iloc[0], params=int(runs[runs.rule==r].params.iloc[0]), mean=tab[r].mean(), sd=tab[r].std(),
                 diff=(tab[r]-tab[ref]).mean(), se=(tab[r]-tab[ref]).std()/len(tab)**.5) for r in RULES]
    distinct = {}
    for r in RULES:
        if not (tab[r]==tab[ref]).all(): distinct.setdefault(tuple(tab[r]), []).append(r)
    for rs,p in zip(distinct.values(), holm([stats.ttest_rel(tab[rs[0]], tab[ref]).pvalue for rs in distinct.values()])):
        for r in rows: r['p_holm'] = p if r['rule'] in rs else r.get('p_holm')
    for r in rows:
        p = r.setdefault('p_holm', None)
        r['verdict'] = 'reference' if r['rule']==ref else 'same widths' if p is None else 'noise' if p>=.05 else 'better' if r['diff']<0 else 'worse'
    return pd.DataFrame(rows)

def bench(name, seeds, log):
    cfg = SETS[name]
    runs,cache = [],{}
    for seed in range(1, seeds+1):
        dls,make,loss,tr,va = globals()[name](seed)
        ns = {k:len(c) for k,c in cat_counts(dls).items()}
        for budget in cfg['budgets']:
            for rule,f in RULES.items():
                szs = get_emb_szs(dls, f, budget=budget)
                key = (seed,tuple(szs.values()))
                if key not in cache:
                    torch.manual_seed(seed)
                    cache[key] = fit(make(szs), loss, tr, va, seed=seed, **{k:cfg[k] for k in ('epochs','bs','lr','wd')})
                runs.append(dict(budget=budget, seed=seed, rule=rule, widths=list(szs.values()), params=sum(ns[k]*w for k,w in szs.items()), loss=cache[key]))
        log(f'{name}: seed {seed} done, {len(cache)} models so far')
    return dict(settings={**cfg, 'columns':ns, 'seeds':seeds}, results=tables(name, runs, log), runs=runs)

def tables(name, runs, log):
    "The summaries of the recorded runs, a budget each"
    runs,res = pd.DataFrame(runs),[]
    for budget in SETS[name]['budgets']:
        tab = summary(runs[runs.budget==budget], 'fastai')
        log(f"\n{name}, budget {budget:,} ({SETS[name]['metric']}, lower is better)\n{tab.to_string(index=False, float_format=lambda v: f'{v:.5f}')}\n")
        res.append(dict(budget=budget, rules=json.loads(tab.to_json(orient='records'))))
    return res

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--sets', nargs='+', default=list(SETS), choices=list(SETS))
    ap.add_argument('--out', type=Path, default=HERE/'emb_sizes.json')
    ap.add_argument('--tables', action='store_true', help='only compute the tables anew from the recorded runs')
    args = ap.parse_args()
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.tables:
        for s in old: old[s]['results'] = tables(s, old[s]['runs'], print)
        args.out.write_text(json.dumps(old, indent=1))
        sys.exit()
    for s in args.sets:
        start = time.perf_counter()
        old[s] = {**bench(s, args.seeds, lambda t: print(t, flush=True)), 'date':date.today().isoformat(), 'machine':machine(),
                  'command':f'OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/emb_sizes.py --seeds {args.seeds} --sets {s}', 'seconds':round(time.perf_counter()-start)}
        args.out.write_text(json.dumps(old, indent=1))
