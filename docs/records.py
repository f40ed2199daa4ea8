"""What each record in benchmarks/ compares: charts, figures that it is held against, and what is missing. Nothing is stated here that the
record or a publication does not state; a record of another shape is still shown whole, below."""
from dataclasses import dataclass,field
from typing import NamedTuple

from charts import Row,chart,is_num,lines,num,together

class Held(NamedTuple):
    "A figure beside one that it is held against"
    what:str
    got:float|None # None: not recorded
    want:float|None
    source:str
    less:bool = True # whether less is better
    sd:float|None = None # spread of `got` over seeds
    time:bool = False
    def outcome(self):
        "In words: ahead, behind, even"
        if not is_num(self.got): return 'not recorded yet'
        if not is_num(self.want) or not self.want or not self.got: return ''
        if self.time:
            r = self.want/self.got if self.less else self.got/self.want
            return f'ahead: {num(r, 3)} times as fast' if r>1 else f'behind: {num(1/r, 3)} times slower'
        d = (self.want-self.got if self.less else self.got-self.want)/abs(self.want)
        if self.sd and abs(self.got-self.want)<self.sd: return "even: within the seeds' spread"
        return f'ahead by {100*d:.1f}%' if d>0 else f'behind by {-100*d:.1f}%' if d<0 else 'even'

@dataclass
class View:
    "What a page says of a record before it shows it whole"
    title:str
    parts:list = field(default_factory=list) # HTML
    held:list = field(default_factory=list)
    short:list = field(default_factory=list) # sentences, Markdown: what is missing or fell short

def at(d, *path):
    "A value at a path, or None"
    for k in path:
        if not isinstance(d, dict) or k not in d: return None
        d = d[k]
    return d

def vals(o):
    "The numbers of one entry: its values by seed or fold, or the one that it is"
    if is_num(o): return [o]
    if isinstance(o, list): return [v for v in o if is_num(v)]
    if not isinstance(o, dict): return []
    return next((o[k] for k in ('values','folds','each') if isinstance(o.get(k), list)), [o['mean']] if is_num(o.get('mean')) else [])

def mean(o): return sum(v)/len(v) if (v := vals(o)) else None
def rows(d, ours=(), marks=lambda n: {}): return [Row(n, vals(o), marks(n), n in ours) for n,o in (d or {}).items() if vals(o)]

def lesson(d):
    v = View("The lesson's recipe on MovieLens")
    sets = {'ml-100k':'MovieLens 100K', 'ml-latest-small-2016':'MovieLens latest-small of 2016'}
    for s,shown in sets.items():
        res = at(d, 'results', s) or {}
        printed = lambda n: {('also ' if i else '')+'printed':p for i,p in enumerate(at(res, n, 'published') or [])}
        v.parts.append(chart(rows(res, ('cf_learner',), printed), f'{shown}: mean squared error on the validation rows after five epochs', 'error', less=True,
                             head='model', note='a dot a seed, diamonds: what the lesson or fastai printed, one run each'))
        a,b = at(res, 'fastai collab_learner'),at(res, 'cf_learner')
        v.held.append(Held(f'`cf_learner`, {shown}', mean(b), mean(a), "fastai's `collab_learner`, same rows and seeds", sd=at(b, 'sd')))
        v.held += [Held(f'{n}, {shown}', mean(o), p, 'printed, one run', sd=at(o, 'sd')) for n,o in res.items() if 'collab_learner' not in n for p in at(o, 'published') or []]
    res = at(d, 'results', 'ml-100k') or {}
    for n,o in res.items():
        if at(o, 'best_epoch') and mean(o)-mean(o['best_epoch'])>.01: v.short.append(f'{n}: it overfits; at its best epoch it had {num(mean(o["best_epoch"]))}, after the last {num(mean(o))}.')
    v.short.append('The lessons print one run each; here are three seeds, and their spread is about a hundredth. fastai\'s loader now draws rows with replacement, which is why '
                   'its learner no longer reaches what its pages print; with every row once it does (second line).')
    return v

def loaders(d):
    v,m = View('Loaders from a frame of 20 million rows'),at(d, 'median') or {}
    gib = lambda x: x/2**30 if is_num(x) else None
    v.parts += [chart([Row(n, [o.get('secs')], ours=n=='cfext') for n,o in m.items()], 'Time from frame to loaders', 'seconds', bars=True, less=True),
                chart([Row(n, [gib(o.get('peak'))], {'the frame itself':gib(o.get('frame'))}, n=='cfext') for n,o in m.items()], 'Peak memory beyond what was there before', 'GiB', bars=True, less=True)]
    v.held += [Held('seconds', at(m, 'cfext', 'secs'), at(m, 'fastai', 'secs'), "fastai's loaders, in turn", time=True),
               Held('peak memory, in frames', at(d, 'peak_over_frame', 'cfext'), at(d, 'peak_over_frame', 'fastai'), "fastai's loaders")]
    return v

def timings(o, key, title):
    "A bar for each side: the time that the record reports, with the range of its repeats in words"
    span = lambda vs: f'{num(min(vs))} to {num(max(vs))}' if len(vs)>1 else ''
    return chart([Row(n, [s], ours=n.startswith('cfext'), note=span(vals(at(o, 'all', n)))) for n,s in (at(o, key) or {}).items()], title, 'seconds', bars=True, less=True, note='the median of its repeats, and their range' if at(o, 'all') else '')

def loop(d):
    v = View('Time of a training epoch' + ('' if at(d, 'machine', 'gpu') else ', on a processor'))
    sides = {k:o for k,o in d.items() if isinstance(o, dict) and 'seconds' in o}
    for k,o in sides.items():
        v.parts.append(timings(o, 'seconds', f'{k}: an epoch'))
        if 'cfext' in (f := at(o, 'times_faster') or {}):
            first = next(iter(f))
            v.parts.append(chart([Row(n, [s], ours=n=='cfext') for n,s in f.items()], f'{k}: how many times as fast as {first}', 'times', bars=True, less=False))
        v.held += [Held(f'{k}, seconds', at(o, 'seconds', 'cfext'), at(o, 'seconds', n), n, time=True) for n in o['seconds'] if n!='cfext' and 'cfext' in o['seconds']]
        if t := at(o, 'seconds', 'streamed'): v.short.append(f'{k}: an epoch takes {num(t/o["seconds"]["resident"])} times as long as with rows that lie on the device that trains.')
        if is_num(o.get('share_of_copy_bandwidth')): v.short.append(f'{k}: the epoch moves {100*o["share_of_copy_bandwidth"]:.0f}% of what a plain copy moves in that time ({num(o.get("copy_gib_s"))} GiB/s).')
    v.parts += growth(at(d, 'growth'))
    if not sides: v.short.append('No epochs side by side are in this record.')
    if not at(d, 'growth'): v.short.append('How the time grows with rows, catalogue and factors is not in this record: `python benchmarks/loop.py --only growth` measures it.')
    return v

def growth(g):
    "A chart for each thing that grows"
    if not g: return []
    names = dict(rows='ratings', catalogue='items in the catalogue', factors='factors')
    pick = lambda o,k: {float(n):r[k] for n,r in o.items() if isinstance(r, dict) and k in r}
    figs = [lines({what:pick(o, key)}, f'As {names.get(k, k)} grow', names.get(k, k), y) for k,o in g.items() for what,key,y in (('epoch','s','seconds an epoch'),('step','us_a_step','microseconds a batch'))]
    return ['<p>Growth of cfext alone, synthetic ratings, one thing at a time:</p>', together(figs)]

def host(d):
    v,names = View("What the processor does for a GPU's epoch"),dict(loop='one learner, its training part', epoch='one learner, all of the epoch', read='of it, while the device trains', eight='eight learners, `fit_many`', eight_read='of them, while the device trains')
    for k,o in d.items():
        if at(o, 'ms'): v.parts.append(chart([Row(names.get(n, n).replace('`', ''), [s], {'the least seen':at(o, 'least', n)}, True) for n,s in o['ms'].items()], f'{k}: an epoch with kernels that do nothing', 'milliseconds of the processor', bars=True, less=True))
    eight = {k:num(o['eight_by_one'], 2) for k,o in d.items() if is_num(at(o, 'eight_by_one'))}
    v.short.append('Schedules, rows, bookkeeping and callbacks: what is not done while the device trains is the least that an epoch takes, whatever the GPU.' + (f' Eight learners at once take {" and ".join(eight.values())} times as much of it as one ({", ".join(eight)}).' if eight else ''))
    return v

def rows_touched(d):
    v,figs = View('Where `RowAdam` begins to pay'),[]
    steps = d.get('steps') or []
    for bs in dict.fromkeys(s['bs'] for s in steps):
        mine = [s for s in steps if s['bs']==bs]
        figs.append(lines({n:{s['n_items']:s.get(f'{n}_ms') for s in mine} for n in ('Adam','RowAdam')}, f'{bs:,} rows a batch', 'items in the catalogue', 'milliseconds a step'))
        pays = next((s['n_items'] for s in mine if s['RowAdam_ms']<s['Adam_ms']), None)
        v.short.append(f'With {bs:,} rows a batch `RowAdam` ' + (f'is the faster of the two from {pays:,} items on, and the slower below.' if pays else 'is slower at every size that was measured.'))
    v.parts.append(together(figs))
    return v

def accumulate(d):
    v = View('Gradient accumulation')
    names = dict(plain='no accumulation', big='one big batch', ours='GradientAccumulator', fastai="fastai's GradientAccumulation", ours_each_batch='GradientAccumulator, window of one batch',
                 ours_in_fastais_loop="GradientAccumulator, fastai's loop", plain_in_fastais_loop="no accumulation, fastai's loop")
    kinds = dict(mlp='A small network', cnn='A convolutional network', dot='A dot product', cf_learner='`cf_learner`')
    for k,o in (at(d, 'time') or {}).items():
        if not at(o, 'us_a_row'): continue
        v.parts.append(chart([Row(names.get(n, n), [s], ours=n=='ours') for n,s in o['us_a_row'].items()], f'{kinds.get(k, k)}, batches of {o["bs"]}, windows of {o["window"]}: time of a row', 'microseconds', bars=True, less=True))
        other,what = ('ours_in_fastais_loop',"the same callback in fastai's loop") if k=='cf_learner' else ('fastai',"fastai's `GradientAccumulation`, paired runs")
        v.held.append(Held(f'{kinds.get(k, k)}, microseconds a row', at(o, 'us_a_row', 'ours'), at(o, 'us_a_row', other), what, time=True))
    m = at(d, 'memory', 'saved_for_backward_mib') or {}
    shown = dict(small='small batches', accumulated='small batches, accumulated', big='one big batch')
    v.parts.append(chart([Row(shown.get(n, n), [s], ours=n=='accumulated') for n,s in m.items()], 'Memory kept for the backward pass, at most', 'MiB', bars=True, less=True))
    v.held.append(Held('memory for the backward pass, MiB', m.get('accumulated'), m.get('big'), 'one big batch of the same gradient'))
    return v

def tta(d):
    v = View('Test-time augmentation')
    names = dict(plain='one look', fastai_tta_4="fastai's tta, 4 draws", train_4='TTA, 4 draws', train_16='TTA, 16 draws', flip='TTA, mirror image', flips_4='TTA, 4 flips', flip_x_scale_4='TTA, flips and scales, 4')
    for k,o in (at(d, 'accuracy') or {}).items():
        seeds = list((at(o, 'per_seed') or {}).values())
        if not seeds: continue
        per = {n:[s[n] for s in seeds if n in s] for n in seeds[0]}
        v.parts.append(chart([Row(names.get(n, n), s, ours=n=='train_16') for n,s in per.items()], f'{k}: accuracy on the valid folder', 'accuracy', less=False, note='a dot a seed'))
        for n in ('train_4','train_16'):
            if n in per: v.held.append(Held(f'accuracy, {k}, {names[n]}', mean(per[n]), mean(per.get('fastai_tta_4')), "fastai's `tta`, same seeds", less=False, sd=_sd(per[n])))
    for k,o in (at(d, 'time') or {}).items():
        if not at(o, 'seconds'): continue
        v.parts.append(chart([Row(names.get(n, n), [s], ours=n not in ('plain','fastai_tta_4')) for n,s in o['seconds'].items()], f'{k.replace("_", " ")}, {o["n_images"]:,} images', 'seconds', bars=True, less=True))
        v.held.append(Held(f'seconds, {k.replace("_", " ")}, 4 draws', at(o, 'seconds', 'train_4'), at(o, 'seconds', 'fastai_tta_4'), "fastai's `tta`", time=True))
    return v

def _sd(vs): return (sum((x-mean(vs))**2 for x in vs)/(len(vs)-1))**0.5 if len(vs)>1 else None

def topk(d):
    v = View('Lists for everybody')
    v.parts.append(chart([Row(n, [s], ours=n=='cfext') for n,s in (at(d, 'seconds') or {}).items()], 'All lists', 'seconds', bars=True, less=True))
    v.held.append(Held('seconds for all lists', at(d, 'seconds', 'cfext'), at(d, 'seconds', 'implicit'), "implicit's `recommend`, same factors, slice by slice in turn", time=True))
    if is_num(d.get('equal_lists')): v.short.append(f'{100*d["equal_lists"]:.4f}% of the lists are the same; the largest difference of a score is {num(d.get("largest_score_difference"))}.')
    return v

def metrics_speed(d):
    v,r = View('Measures of lists for 100,000 users'),at(d, 'ratio_of_medians') or {}
    v.parts.append(chart(rows(at(d, 'seconds'), ('cfext',)), 'Recall, NDCG, average precision and hit rate of all users', 'seconds', bars=True, less=True))
    v.held += [Held('time, cfext = 1', 1., x, n.replace('_', ' ')+', median over median', time=True) for n,x in r.items()]
    a,b = at(d, 'values', 'cfext', 'MAP'),at(d, 'values', 'torchmetrics', 'MAP')
    if a and b: v.short.append(f'Recall, NDCG and hit rate agree to the last digit shown. Average precision does not ({num(a)} and {num(b)}): torchmetrics divides by the relevant items that are listed, ranx and cfext by all of them.')
    return v

def bpr_speed(d):
    v = View('Bayesian personalised ranking beside implicit and Cornac')
    for s,o in (at(d, 'results') or {}).items():
        v.parts += [chart([Row(n, [r['rows_per_cpu_second']/1e6], ours=n=='cfext') for n,r in o.items() if 'rows_per_cpu_second' in r], f'{s}: rows in a second of the processor', 'millions', bars=True, less=False),
                    chart([Row(n, [r['cpu_seconds']], ours=n=='cfext') for n,r in o.items() if 'cpu_seconds' in r], f'{s}: the whole fit', 'processor seconds', bars=True, less=True),
                    chart([Row(n, [r['ndcg']], ours=n=='cfext') for n,r in o.items() if 'ndcg' in r], f'{s}: NDCG@10 on the held-out rows', 'NDCG@10', less=False)]
        for n,lib in (('implicit','implicit'),('cornac','Cornac')):
            v.held += [Held(f'rows a second, {s}', at(o, 'cfext', 'rows_per_cpu_second'), at(o, n, 'rows_per_cpu_second'), lib, less=False, time=True),
                       Held(f'processor seconds of the fit, {s}', at(o, 'cfext', 'cpu_seconds'), at(o, n, 'cpu_seconds'), lib, time=True),
                       Held(f'NDCG@10, {s}', at(o, 'cfext', 'ndcg'), at(o, n, 'ndcg'), lib, less=False)]
    v.short.append('implicit and Cornac step after each row, in C; a step of Adam after each batch costs more a row and needs fewer epochs.')
    if 'ml1m' not in (at(d, 'results') or {}): v.short.append('MovieLens 1M is not in this record.')
    return v

def ncf_ml1m(d):
    v,res,pub = View('Lists on the split of the NCF paper'),at(d, 'results') or {},at(d, 'published') or {}
    for m in ('HR','NDCG'):
        marks = lambda n: {} if n=='popularity' else {p:o[m] for p,o in pub.items()}
        v.parts.append(chart(rows({n:o.get(m) for n,o in res.items()}, marks=marks), f'{m}@10 of the held-out film among 99 sampled ones', f'{m}@10', less=False, note='diamonds: published'))
        for n,o in res.items():
            if n!='popularity': v.held.append(Held(f'{m}@10, {n}', mean(o.get(m)), at(pub, 'MF (Rendle 2020)', m), 'a well-tuned dot product, Rendle 2020', less=False, sd=at(o, m, 'sd')))
    if not any('dot' in n or 'ALS' in n for n in res): v.short.append('The dot products and iALS are not in this record yet, only the closed forms and popularity.')
    v.short.append('Popularity is the check of the protocol: published .4538 and .2545. A sample of 99 says less than the whole catalogue; the protocol is kept for comparison only.')
    return v

def ensembles_ml100k(d):
    v,folds = View('Ensembles on the published folds of MovieLens 100K'),at(d, 'folds') or {}
    pub = {'GC-MC':.905, 'GLocal-K (epoch picked on its test rows)':.8889}
    v.parts.append(chart(rows(at(d, 'rmse'), ('best, chosen on training rows',)), f'RMSE on the test rows of {", ".join(folds)}', 'RMSE', less=True, head='model or ensemble', note='a dot a fold' if len(folds)>1 else 'one fold'))
    u1 = at(folds, 'u1', 'test', at(folds, 'u1', 'best') or '')
    v.held += [Held('RMSE on u1, the best by its training rows', u1, p, f'{n}, published') for n,p in pub.items()]
    v.held.append(Held('the same, beside one model', u1, at(folds, 'u1', 'test', 'DotProductBias'), 'one tuned `DotProductBias`'))
    if len(folds)==5:
        best = mean(at(d, 'rmse', 'best, chosen on training rows'))
        v.held += [Held('RMSE, mean of the five folds, the best by training rows', best, x, what) for x,what in
                   ((mean(at(d, 'rmse', 'DotProductBias')),'one tuned `DotProductBias`'), (.900,'Cornac MF, published, other folds'), (.919,'SVD++ of Surprise, published, other folds'))]
    if at(folds, 'u1', 'test'):
        one,mean_of = at(folds, 'u1', 'test', 'DotProductBias'),at(folds, 'u1', 'test', 'seeds')
        worse = [n for n,x in folds['u1']['test'].items() if mean_of and x>mean_of and n not in ('DotProductBias','seeds')]
        if worse: v.short.append(f'On u1 the plain mean of several seeds ({num(mean_of)}; one model {num(one)}) is better than {", ".join(worse)}.')
    if len(folds)<5: v.short.append(f'Of the five published folds, {", ".join(folds)} is in this record.')
    return v

def features_10m(d):
    v,res = View('Ten million rows through `EmbeddingFeatures.transform`'),at(d, 'results') or {}
    v.parts += [chart([Row(n, [o.get('cpu_seconds')], ours=True) for n,o in res.items()], 'Ten million rows, by the type of the ids', 'processor seconds', bars=True, less=True),
                chart([Row(n, [o.get('peak_beyond_output_mb')], {'the output':o.get('output_mb')}, True) for n,o in res.items()], 'Memory beyond the output', 'MB', bars=True, less=True)]
    if is_num(d.get('load_average')): v.short.append(f'The machine was busy (load {d["load_average"]:.1f}), so seconds of the processor are drawn; those by the clock are in the record.')
    return v

def features_ml100k(d):
    v,r = View('Boosted trees on MovieLens 100K'),at(d, 'rmse') or {}
    best = 'embeddings out of fold, aligned'
    v.parts.append(chart(rows(r, (best,)), 'RMSE on the five published test folds', 'RMSE', less=True, head='what the trees get', note='a dot a fold'))
    v.held += [Held(f'RMSE, {best}', mean(r.get(best)), mean(r.get(n)), f'{n}, same folds') for n in ('ids as categories','target encoding','dot model alone','embeddings in sample') if n in r]
    v.short.append('Settings were chosen once, on rows of u1.base, and used for all five folds.')
    return v

def rossmann(d):
    v,m,paper = View('Entity embeddings on Rossmann'),at(d, 'mape') or {},at(d, 'paper') or {}
    names = dict(knn='nearest neighbours', forest='random forest', trees='boosted trees')
    res = []
    for k,shown in names.items():
        res.append(Row(f'{shown}, integer codes', vals(m.get(f'{k}_without')), {'paper':at(paper, k, 'without')}))
        for more,what in (('one_hot','one-hot'),('native','native categories')):
            if vals(m.get(f'{k}_{more}')): res.append(Row(f'{shown}, {what}', vals(m[f'{k}_{more}'])))
        res.append(Row(f'{shown}, embeddings', vals(m.get(f'{k}_with')), {'paper':at(paper, k, 'with')}, True))
        v.held.append(Held(f'{shown} with embeddings, error', mean(m.get(f'{k}_with')), at(paper, k, 'with'), 'Guo & Berkhahn, table IV'))
        a,b = at(d, 'table', k, 'ratio'),at(d, 'table', k, 'paper_ratio')
        v.held.append(Held(f'{shown}: error with over error without', a, b, "the paper's ratio"))
        if a and b and a>b: v.short.append(f'{shown.capitalize()}: the ratio is above the paper\'s; without embeddings the error is {num(mean(m.get(f"{k}_without")))} here and {num(at(paper, k, "without"))} there, and a better start leaves less to gain.')
    nets = at(d, 'networks', 'each') or vals(m.get('network'))
    res.append(Row('network', nets, {'paper':at(paper, 'network', 'with')}))
    v.parts.append(chart(res, 'Mean absolute percentage error on the last tenth of the time', 'error', less=True, head='model', note='diamonds: the paper'))
    v.held.append(Held('network, mean of five', mean(nets), at(paper, 'network', 'with'), 'Guo & Berkhahn, table IV'))
    if is_num(x := at(d, 'networks', 'mean_of_all')): v.held.append(Held("network, the mean of five networks' sales", x, at(paper, 'network', 'with'), 'Guo & Berkhahn, table IV'))
    return v

def emb_sizes(d):
    v,verdicts = View('Which rule for the widths of embeddings?'),[]
    for s,o in d.items():
        for r in at(o, 'results') or []:
            unit = at(o, 'settings', 'metric') or 'loss'
            losses = lambda n: [x['loss'] for x in o.get('runs') or [] if x['rule']==n and x['budget']==r['budget']]
            v.parts.append(chart([Row(x['rule'], losses(x['rule']) or [x['mean']], ours=x['rule']=='equal', note=f'{x["params"]:,} parameters') for x in r['rules']],
                                 f'{s}: {unit}, about {r["budget"]:,} parameters', unit, less=True, head='rule', note='a dot a seed; in bold the control, one width for all'))
            verdicts += [x.get('verdict') for x in r['rules'] if x['rule']!='fastai' and x.get('verdict')]
    other = [x for x in verdicts if x!='same widths']
    beyond,same = sum(x!='noise' for x in other),len(verdicts)-len(other)
    v.short.append(f'{beyond or "None"} of the {len(other)} comparisons at an equal budget differ{"s" if beyond==1 else ""} by more than noise (paired over seeds, corrected for their number); '
                   f'{same} more come to the same widths as fastai\'s rule.')
    return v

def closed_defaults(d):
    v = View('Defaults of the closed forms')
    now = {f'{n}, {o}' for n,o in (d.get('defaults') or {}).items()}
    for s,res in (d.get('results') or {}).items():
        v.parts.append(chart(rows(res, now), f'{s}: NDCG@10', 'NDCG@10', less=False, head='model', note='a dot a split; in bold the defaults'))
    return v

def char_rnn(d):
    v,r = View("The lesson's character networks"),at(d, 'rows') or {}
    mark = lambda n: {'printed':r[n]['printed']} if at(r, n, 'printed') else {}
    like = {n:o for n,o in r.items() if 'over time' not in n}
    v.parts.append(chart([Row(n, [o.get('valid_nll')], mark(n)) for n,o in like.items()], 'Validation loss after the epochs of the lesson', 'nats a character', less=True, head='network', note='diamonds: printed in the lesson'))
    v.held += [Held(f'{n}, loss', o.get('valid_nll'), o.get('printed'), 'printed in the lesson, one run') for n,o in r.items() if o.get('printed') and n!='CharNet3'] # printed for a single row
    v.short += [f'{n}: {o["note"]}.' for n,o in r.items() if o.get('note')]
    v.short += [f'{n}: not recorded yet.' for n in ('CharNet3','CharRnn') if not any(k.startswith(n) for k in r)]
    return v

def sasrec(d):
    v,runs = View('What comes next, on MovieLens 1M'),at(d, 'runs') or {}
    pub = {'test':{'gSASRec':(.300,.173), 'SASRec':(.239,.126)}, 'sampled_100':{'SASRec':(.825,.591)}}
    shown = dict(test='every item ranked but those already seen', sampled_100='against 100 sampled items')
    fitted = {n:o for n,o in runs.items() if is_num(at(o, 'valid', 'ndcg@10')) and n!='most popular'}
    best = max(fitted, key=lambda n: fitted[n]['valid']['ndcg@10'], default=None)
    for part in shown:
        for j,m in enumerate(('recall@10','ndcg@10')):
            marks = lambda n: {} if n=='most popular' else {p:o[j] for p,o in pub[part].items()}
            v.parts.append(chart([Row(n, [at(o, part, m)], marks(n), n==best) for n,o in runs.items()], f'{m} of the test items, {shown[part]}', m, less=False, head='run', note='diamonds: published'))
            v.held += [Held(f'{m}, {shown[part]}: {best or "no run"}', at(fitted, best, part, m) if best else None, o[j], f'{p}, published', less=False) for p,o in pub[part].items()]
    v.short.append('The run in bold is the best on the validation items; its epoch was chosen there too.')
    t = at(d, 'throughput') or {}
    for k,o in t.items():
        v.parts.append(timings(o, 's_per_epoch', f'Time of an epoch beside a plain padded loop ({k})'))
    if not t: v.short.append('Time of an epoch beside a plain PyTorch SASRec is not in this record.')
    if not any(at(o, 'machine', 'gpu') for o in runs.values()): v.short.append('All runs are of a processor; the wider configurations, made for a GPU, have not run.')
    return v

def fit_many(d):
    n = d.get('n')
    v = View(f'{n} models fitted at once')
    if not is_num(d.get('one')): return v
    v.parts.append(chart([Row('one model', [o[0] for o in d['pairs']]), Row(f'{n} models, one after another', [n*o[0] for o in d['pairs']], note='worked out from the first'), Row(f'{n} models with fit_many', [o[1] for o in d['pairs']], ours=True)],
                         f'An epoch of MovieLens 100K, 64 rows a batch, on {d.get("device")}', 'seconds', bars=True, less=True))
    v.held.append(Held(f'seconds for {n} models', d.get('many'), n*d['one'], 'one after another', time=True))
    if is_num(d.get('largest_difference')): v.short.append(f'The largest difference of any weight from a fit alone, after {d.get("epochs")} epoch(s): {num(d.get("largest_difference"), 2)}.')
    return v

def newcomers(d):
    v,r,g = View('Newcomers, folded in'),at(d, 'rmse') or {},at(d, 'ndcg') or {}
    v.parts += [chart(rows(r, ('folded in',)), 'Error for users who came after the training', 'RMSE', less=True, note='a dot a seed'),
                chart(rows(g, [n for n in g if 'folded in' in n]), 'Lists for the same users', 'NDCG@10', less=False, note='a dot a seed')]
    v.held += [Held('RMSE, folded in', mean(r.get('folded in')), mean(r.get(n)), n, sd=at(r, 'folded in', 'sd')) for n in ('unknown row','item mean','trained again') if n in r]
    return v

def ranking_ml100k(d):
    v,res = View('Lists on MovieLens 100K'),at(d, 'results') or {}
    for m,shown in (('ndcg','NDCG@10'),('recall','recall@10')):
        v.parts.append(chart(rows({n:o.get(m) for n,o in res.items()}, [n for n in res if n.startswith(('dot','cosine'))]), f'{shown}, a quarter of each user held out, all items ranked', shown, less=False, head='model', note='a dot a seed'))
    first = next((n for n in ('cosine, full softmax','dot, full softmax') if n in res), None)
    if first: v.held += [Held(f'NDCG@10, {first}', mean(res[first].get('ndcg')), mean(res[n].get('ndcg')), f'{n}, same splits', less=False, sd=at(res, first, 'ndcg', 'sd')) for n in res if n!=first]
    return v

def lightgcn_layout(d):
    v,res,s = View("Lists on data in LightGCN's layout"),at(d, 'results') or {},d.get('size') or {}
    pub = {'gowalla':(.1830,.1554), 'yelp2018':(.0649,.0530), 'amazon-book':(.0411,.0315)}.get(str(d.get('data')).lower())
    what = f'{d.get("data")}, {num(s.get("users"))} users, {num(s.get("items"))} items'
    for j,m in enumerate(('recall','ndcg')):
        v.parts.append(chart([Row(n, vals(o.get(m)), {'LightGCN, published':pub[j]} if pub and n!='popularity' else {}, n=='mf') for n,o in res.items()], f'{m}@20, every item ranked ({what})', f'{m}@20', less=False, head='model', note='a dot a seed'))
        if pub: v.held += [Held(f'{m}@20, {n}', mean(o.get(m)), pub[j], 'LightGCN, He et al. 2020', less=False) for n,o in res.items() if n!='popularity']
        elif 'mf' in res: v.held += [Held(f'{m}@20, mf', mean(res['mf'].get(m)), mean(o.get(m)), f'{n}, same splits', less=False, sd=at(res, 'mf', m, 'sd')) for n,o in res.items() if n!='mf']
    if d.get('data')=='synthetic':
        v.title += ', made up'
        v.short.append('The data are made up, of the size of a public set: the record is for the time that it takes, nothing published is held against it.')
    return v

views = dict(lesson=lesson, loaders=loaders, loop=loop, loop_cpu=loop, host_cpu=host, rows=rows_touched, rows_cpu=rows_touched, accumulate=accumulate, tta=tta, topk=topk, metrics_speed=metrics_speed,
             bpr_speed=bpr_speed, ncf_ml1m=ncf_ml1m, ensembles_ml100k=ensembles_ml100k, features_10m=features_10m, features_ml100k=features_ml100k, rossmann=rossmann, emb_sizes=emb_sizes, closed_defaults=closed_defaults,
             char_rnn=char_rnn, sasrec=sasrec, fit_many=fit_many, newcomers=newcomers, ranking_ml100k=ranking_ml100k, lightgcn_layout=lightgcn_layout, lightgcn_layout_synthetic=lightgcn_layout)

def view(name, d):
    "The view of a record; an empty one where there is none for it, or where the record has another shape"
    f = views.get(name) or next((o for n,o in views.items() if name.startswith(n+'_')), None)
    if f is None: return View('')
    try:
        v = f(d)
        if name.endswith('_gpu'): v.title += ', on a GPU'
        return v
    except (KeyError,TypeError,AttributeError,IndexError,ValueError,StopIteration) as e:
        return View('', short=[f'This record has another shape than this page expects ({type(e).__name__}: {e}); it is shown as it is.'])
