"""Wrappers around each other: as native in every mode, as the formulas say, one fused step; checkpoints continue bit for bit; what has no
meaning is refused with a reason."""
import copy,pickle,warnings
import fastai.optimizer as fo,pytest,torch
from torch import nn
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.cautious import cautious
from fastxtend_opt.algorithms.centralize import centralize,centralize_grad
from fastxtend_opt.algorithms.lamb import lamb
from fastxtend_opt.algorithms.lion import lion
from fastxtend_opt.algorithms.lookahead import Lookahead,lookahead
from fastxtend_opt.algorithms.ranger import ranger
from fastxtend_opt.algorithms.schedulefree import ScheduleFree,schedule_free
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.definition.registry import list_optimizers
from fastxtend_opt.tools.composition import algorithm_refusals, composition_table, why_not, wrappers
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from fastxtend_opt.training.rules import rules
from helpers import *
from learner_utils import learner,losses

SHAPES_C = ((), (9,), (5,3), (4,3,2,2))
def small(dtype=torch.float64): return make_params(SHAPES_C, dtype, seed=11, big=False, channels_last=False)
def flat(o): return o.param.ndim<2
def matrix(o): return o.param.ndim>=2
RULES = {flat: dict(wd=0, lr_mult=2), (lambda o: o.param.ndim==2): cautious(adam(wd=.1)), matrix: centralize(sgd(mom=.9)), '*': lion(wd=.1)}
PAIRS = {
    'lookahead(cautious(adam))': lookahead(cautious(adam(wd=.1)), k=3),
    'lookahead(centralize(lion))': lookahead(centralize(lion()), k=2, alpha=.8),
    'cautious(centralize(adam))': cautious(centralize(adam(wd=.1))),
    'centralize(cautious(sgd))': centralize(cautious(sgd(mom=.9))),
    'schedule_free(centralize(adam))': schedule_free(centralize(adam()), warmup_steps=3),
    'centralize(schedule_free(lion))': centralize(schedule_free(lion())),
    'centralize(lamb)': centralize(lamb()),
    'lookahead(rules)': lookahead(rules(RULES), k=3),
    'centralize(rules)': centralize(rules({flat: adam(), '*': lion()})),
    'cautious(rules)': cautious(rules({flat: dict(wd=0), '*': adam(wd=.1)})),
    'schedule_free(rules)': schedule_free(rules({flat: adam(wd=.1), '*': lion(wd=.1)})),
    'lookahead(cautious(centralize(rules)))': lookahead(cautious(centralize(rules({flat: dict(wd=0), '*': adam(wd=.1)}))), k=3)}
pairs = pytest.mark.parametrize('pair', list(PAIRS))
modes = pytest.mark.parametrize('mode', [pytest.param(m, marks=pytest.mark.slow if m in ('jit','triton') else ()) for m in ALL_MODES])
QUICK = ('lookahead(cautious(adam))','schedule_free(rules)')
both = pytest.mark.parametrize('pair,mode', [pytest.param(p, m, marks=() if m in ('native','foreach')
    or (p in QUICK and m!='triton') else pytest.mark.slow) for p in PAIRS for m in ALL_MODES])

def make(f, ps, mode='native', **kw):
    with backend_of(mode): return f(two_groups(ps), **{'lr':[.01,.02], **kw}, **flags(mode))
def go(opt, r, skip=()):
    ps,stream = [p for pg in opt.param_lists for p in pg],GradStream(5)
    for i in r: stream.set(ps, i, skip=skip); opt.step()
    return opt
def values(ps): return [p.detach().clone() for p in ps]
def tol(mode): return dict(rtol=1e-9, atol=1e-11) if mode=='triton' else TOL[torch.float64]

@both
def test_modes_agree_and_checkpoints_resume(pair, mode):
    "As native; a checkpoint continues bit for bit in a new optimizer"
    f = PAIRS[pair]
    def run(mode, save=True):
        ps = small(); opt = go(make(f, ps, mode), range(5), skip=[3])
        if save:
            sd = pickle.loads(pickle.dumps(opt.state_dict())); qs = copy_params(ps); other = make(f, qs, mode); other.load_state_dict(sd)
            go(opt, range(5, 12)); go(other, range(5, 12))
            assert_bitwise(values(qs), values(ps)); assert_bitwise(snapshot(qs, other), snapshot(ps, opt))
        else: go(opt, range(5, 12))
        return values(ps)
    assert_same(run(mode), run('native', False), **tol(mode))

@pairs
def test_checkpoints_cross_modes(pair):
    f,ps = PAIRS[pair],small(); opt = go(make(f, ps, 'foreach'),
        range(5)); qs = copy_params(ps); other = make(f, qs); other.load_state_dict(copy.deepcopy(opt.state_dict()))
    go(opt, range(5, 9)); go(other, range(5, 9)); assert_same(values(ps), values(qs), **TOL[torch.float64])

@pairs
def test_pickle_deepcopy_clear(pair):
    f,ps = pickle.loads(pickle.dumps(PAIRS[pair])) if 'rules' not in pair else PAIRS[pair],small(); opt = go(make(f, ps), range(4))
    a = copy.deepcopy(opt); go(a, range(4, 7)); go(opt, range(4, 7))
    assert_bitwise(values(p for pg in a.param_lists for p in pg), values(ps))
    opt.clear_state(); go(opt, range(2))

# ---------------------------------------------------------------- formulas
@pytest.mark.parametrize('mode', ['native','foreach','fused'])
def test_centralize(mode):
    "The plain formula, and pytorch_optimizer's function"
    from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
    ps = make_params(((), (9,), (5,3), (4,3,2,2), (3,1), (2,0), (1,4)), torch.float64, seed=1, big=False,
                     channels_last=False); qs,rs = copy_params(ps),copy_params(ps)
    opt,plain,port = make(centralize(adam(wd=.1)), ps, mode),make(adam(wd=.1), qs, mode),make(adam(wd=.1), rs, mode)
    for i in range(6):
        for o in (ps,qs,rs): GradStream(3).set(o, i)
        for q in qs:
            if q.ndim>=2: q.grad = q.grad - q.grad.sum(tuple(range(1, q.ndim)), keepdim=True)/max(q[0].numel(), 1)
        for r in rs: centralize_gradient(r.grad)
        for o in (opt,plain,port): o.step()
        assert_same([p.grad for p in ps], [q.grad for q in qs], **TOL[torch.float64])
        assert_same(values(ps), values(qs), **TOL[torch.float64]); assert_same(values(ps), values(rs), **TOL[torch.float64])

def test_mean_of_a_neuron_stays():
    ps = small(); start = values(ps); go(make(centralize(sgd(mom=.9)), ps), range(9))
    for p,s in zip(ps[2:], start[2:]): assert_same(p.detach().flatten(1).mean(1), s.flatten(1).mean(1), **TOL[torch.float64])

@modes
def test_lookahead_round_cautious_by_hand(mode):
    ps = small(); qs = copy_params(ps); opt = make(lookahead(cautious(adam(wd=.1)), k=3), ps,
                                                   mode); inner = make(adam(wd=.1, cautious=True), qs); slow = values(qs)
    for i in range(8):
        go(opt, [i]); go(inner, [i])
        if i%3==2:
            for q,s in zip(qs, slow): s += .5*(q.detach()-s); q.data.copy_(s)
        assert_same(values(ps), values(qs), **tol(mode))

def test_centralize_round_fastais_own():
    ps = small(); qs = copy_params(ps)
    a,b = centralize(lambda p, lr: fo.SGD(p, lr, mom=.9))(ps, lr=.1),centralize(sgd(mom=.9))(qs, lr=.1)
    go(a, range(4)); go(b, range(4)); assert_same(values(ps), values(qs), **TOL[torch.float64])

# ---------------------------------------------------------------- one step
@pytest.mark.parametrize('pair', ['lookahead(cautious(adam))','centralize(schedule_free(lion))','lookahead(cautious(centralize(rules)))'])
def test_one_launch_when_fused(pair):
    "One launch for all parameters, and no more with a wrapper"
    ps = [p for p in small(torch.float32) if p.ndim>1]
    with backend_of('fused'),warnings.catch_warnings():
        warnings.simplefilter('ignore') # of rules for what has fewer axes
        opt = PAIRS[pair](ps, lr=.01, fused=True)
    inner = getattr(go(opt, range(8)), 'opt', opt)
    assert all(inner._plan.forms) and len(inner._plan.launches)==1

@modes
def test_gradient_release(mode):
    def run(release):
        torch.manual_seed(1); m = nn.Sequential(nn.Linear(6,5), nn.Linear(5,3)).double()
        with backend_of(mode): opt = lookahead(cautious(centralize(adam())), k=2)(m.parameters(), lr=.01, **flags(mode))
        if release: prepare_for_gradient_release(m, opt)
        for i in range(5): m(torch.full((2,6), i-1., dtype=torch.float64)).square().sum().backward(); opt.step(); opt.zero_grad()
        if release: remove_gradient_release(m)
        return values(m.parameters())
    assert_same(run(True), run(False), **TOL[torch.float64])

def test_in_a_learner(tmp_path):
    def run(**kw):
        learn = learner('adam', 'native', tmp_path); learn.opt_func = lookahead(
            cautious(centralize(rules({'*.bias': dict(wd=0), '*': adam(wd=.1)}, show=False, **kw))), k=4)
        learn.fit_one_cycle(1, 4e-3); learn.save('c'); learn.load('c'); learn.fit(1, 1e-3)
        return losses(learn)
    assert_same(run(fused=True), run(), rtol=1e-4)

# ---------------------------------------------------------------- which wrapper takes which
YES = ('lookahead:cautious centralize rules sam|cautious:centralize rules sam|schedule_free:centralize rules|'
       'centralize:lookahead cautious schedule_free rules sam|rules:cautious centralize rules|sam:lookahead cautious centralize rules')

@pytest.mark.parametrize('base', [adam,lion,sgd])
def test_the_table(base):
    want = {k:v.split() for k,v in (o.split(':') for o in YES.split('|'))}
    kw = dict(mom=.9) if base is sgd else {}
    for r in composition_table(lambda: base(**kw)).rows:
        for w in wrappers: assert (r[w]=='yes')==(r['inside']=='an algorithm' or r['inside'][:-5] in want[w]), (w,r['inside'])

@pytest.mark.parametrize('f,words', [
    (lambda: lookahead(ranger()), "lookahead can't wrap Lookahead: one inside the other"),
    (lambda: lookahead(schedule_free(adam())), 'averages the weights itself'),
    (lambda: schedule_free(lookahead(adam())), 'both average the weights'),
    (lambda: schedule_free(schedule_free(adam())), 'schedule-free already'),
    (lambda: schedule_free(cautious(adam())), 'nothing to mask'), (lambda: cautious(schedule_free(adam())), 'nothing to mask'),
    (lambda: cautious(cautious(adam())), 'cautious already'),
    (lambda: cautious(adam(cautious=True)), 'cautious already'), (lambda: cautious(lookahead(adam())), r'Write lookahead\(cautious'),
    (lambda: centralize(centralize(adam())), 'Leave one out'),
    (lambda: centralize(torch.optim.SGD), 'no list of steppers'), (lambda: lookahead(3), 'takes an opt_func'),
    (lambda: cautious(3), 'takes an opt_func'), (lambda: centralize(3), 'takes an opt_func'),
    (lambda: schedule_free(3), 'takes an opt_func'), (lambda: schedule_free(lambda p, lr: make_optimizer(p, [whole], lr=lr)),
                                                      'several passes')])
def test_refused(f, words):
    with pytest.raises(TypeError, match=words): f()(small(), lr=.1)
def whole(p, **kwargs): pass
whole.whole_model = True

def test_refused_algorithms():
    "By name; everything else in the registry works, except steps of several passes and those that need more than a gradient"
    rows = [r for r in list_optimizers() if r.kind!='model' and not why_not(lambda f: f, r.factory())]
    no = {r.name:why for r in rows if (why := why_not(schedule_free, r.factory()))}
    assert set(no)=={'adabelief','apollo','madgrad','mars','swats','cadamw','clion','ranger','sgd_schedulefree','adamw_schedulefree',
                     'radam_schedulefree'}, set(no)
    assert all("can't wrap" in w and len(w)>50 for w in no.values()) and len(rows)>=45
    assert {r.name for r in rows if why_not(centralize, r.factory())}==set()
    assert {r.name for r in rows if why_not(lookahead, r.factory())}=={'ranger','sgd_schedulefree','adamw_schedulefree',
                                                                       'radam_schedulefree'}
    assert algorithm_refusals().rows

def test_values_of_lookahead_are_checked_at_once():
    with pytest.raises(ValueError, match='k=0'): lookahead(adam(), k=0)
    with pytest.raises(ValueError, match='alpha=2'): lookahead(adam(), alpha=2)
