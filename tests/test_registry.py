"The door to every optimizer: flags, validation and its messages, groups, factories, rows."
import inspect,math,pickle,re
from functools import partial

import numpy as np,pytest,torch
from fastai.optimizer import Optimizer,sgd_step
from fastcore.all import L
from fastcore.docments import docments
from torch import nn
import oracles
from helpers import CORE

from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.definition import registry
from fastxtend_opt.optimizer.fused import FusedOptimizer
from fastxtend_opt.optimizer.native import NativeOptimizer
from fastxtend_opt.optimizer.traced import ForEachOptimizer, JitOptimizer, TapeOptimizer
from fastxtend_opt.definition.factories import factory
from fastxtend_opt.definition.groups import as_groups
from fastxtend_opt.definition.hypers import hyper_ranges, valid_hyper
from fastxtend_opt.definition.lessons import mode_differences, take_steps
from fastxtend_opt.definition.make import make_optimizer, MODES, OPTIONS, pick_mode
from fastxtend_opt.definition.registry import CATEGORIES, get_optimizer, KINDS, list_optimizers, OptimizerInfo, register

ROWS = list_optimizers()
NAMES = ('adam','adan','lamb','larc','lion','qhadam','radam','ranger','rmsprop','sgd','sophia','stableadam')
ORACLES = oracles.load()
FREE = ('adamw_schedulefree','radam_schedulefree','sgd_schedulefree')
NO_L2 = [r.name for r in ROWS if 'decouple_wd' not in r.hypers] # their decay is decoupled, always
FLAGS = [m for m in MODES if m!='native']
every = pytest.mark.parametrize('row', ROWS, ids=lambda r: r.name)

def params(): return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3,2))]
def inner(opt): return opt.opt if isinstance(opt, Lookahead) else opt
# a hyperparameter that it has
def own(row): return 'wd' if 'wd' in row.hypers else next(k for k,v in row.hypers.items() if isinstance(v, float))
def outcome(f):
    "Type and message of what `f` raises"
    with pytest.raises(Exception) as e: f()
    return e.type,str(e.value)

# ---------------------------------------------------------------- rows
def test_all_are_registered(): assert set(NAMES) <= {r.name for r in ROWS}

@every
def test_row_is_complete(row):
    assert isinstance(row, OptimizerInfo) and row.name.replace('_','')==row.func.__name__.lower()
    assert row.category in CATEGORIES and row.kind in KINDS and set(row.modes) <= set(MODES)
    assert row.title and row.paper and 1950 < row.year <= 2026
    assert re.fullmatch(r'\d{4}\.\d{4,5}', row.arxiv or '0000.00000')
    assert row.settings and all(len(s)==3 and all(s) for s in row.settings)
    assert row.factory is not None and row.factory.__name__==row.name
    assert row.name in repr(row) and '| for | settings | source |' in row.settings_table().data

@every
def test_oracle_exists_and_is_not_ours(row):
    mod,_,name = row.oracle.rpartition('.')
    f = getattr(pytest.importorskip(mod), name, None)
    if mod=='reference' and f is None: f = getattr(ORACLES[row.name], name) # its oracle module imports it
    assert not f.__module__.startswith('fastxtend_opt')
    if not mod.startswith('fastai'): return # other names for the same arguments
    theirs = set(inspect.signature(f).parameters) - {'kwargs'}
    assert theirs <= set(inspect.signature(row.func).parameters)

@every
def test_state_of_a_step_is_what_the_row_says(row):
    p = params()
    kw = dict(mom=.9) if 'mom' in row.hypers else {}
    opt = row.func(p, .1, **kw)
    for q in p: q.grad = torch.ones_like(q)
    opt.step()
    tensors = {k for q in p for k,v in opt.state[q].items() if isinstance(v, torch.Tensor)} # MARS keeps more for a matrix than for a vector
    tensors |= ({'slow_p'} if isinstance(opt, Lookahead) else set())
    assert tensors==set(row.state)

def test_list_optimizers_filters():
    assert {r.name for r in list_optimizers(kind='reduction')} >= {'larc','lamb'}
    assert all(r.category=='adaptive' for r in list_optimizers(category='adaptive'))
    assert [r.name for r in list_optimizers(mode='fused')]==[r.name for r in ROWS if 'fused' in r.modes]
    assert [r.name for r in ROWS]==sorted(r.name for r in ROWS)

@pytest.mark.parametrize('kw,words', [(dict(kind='flat'), ("kind='flat'", 'elementwise')),
                                      (dict(category='x'), ("category='x'", 'adaptive')), (dict(mode='gpu'), ("mode='gpu'", 'native'))])
def test_list_optimizers_refuses_unknown_filters(kw, words):
    t,msg = outcome(lambda: list_optimizers(**kw))
    assert t is ValueError and all(w in msg for w in words)

def test_get_optimizer():
    assert get_optimizer('adam') is get_optimizer('Adam')
    t,msg = outcome(lambda: get_optimizer('adamm'))
    assert t is ValueError and "'adamm'" in msg and 'adam,' in msg

def test_register_refuses_bad_rows(monkeypatch):
    monkeypatch.setattr(registry, '_registry', dict(registry._registry))
    def Adam2(params, lr, mom=.9): "another"
    row = dict(title='t', paper='p', year=2000, category='fixed', kind='elementwise', state=(), oracle='')
    assert 'taken by Adam' in outcome(lambda: register(Adam2, **row, name='adam'))[1]
    assert "category='c'" in outcome(lambda: register(Adam2, **{**row, 'category':'c'}))[1]
    assert "kind='c'" in outcome(lambda: register(Adam2, **{**row, 'kind':'c'}))[1]
    assert register(Adam2, **row).page=='algorithms/adam2.html' and get_optimizer('adam2').hypers==dict(mom=.9)

# ---------------------------------------------------------------- signatures
@every
def test_signature_order(row):
    ps = list(inspect.signature(row.func).parameters)
    n = len(OPTIONS)
    assert ps[:2]==['params','lr'] and tuple(ps[-n:])==OPTIONS and OPTIONS[:3]==('foreach','jit','fused')
    assert ('decouple_wd' not in ps) if row.name in NO_L2 else ps[-n-1]=='decouple_wd'
    common = [p for p in ps[3 if row.name in FREE else 0:] if p in ('mom','sqr_mom','eps','wd','beta','decouple_wd')]
    assert common==sorted(common, key=['mom','sqr_mom','eps','wd','beta','decouple_wd'].index)
    sig = inspect.signature(row.func).parameters
    # schedule-free learning rates, and Prodigy's, are unlike others, so that they have defaults
    assert all(sig[m].default is False for m in FLAGS) and (row.name in FREE or row.kind=='model'
                                                            or sig['lr'].default is inspect.Parameter.empty)

@every
def test_every_parameter_has_a_docment(row):
    for f in (row.func, row.factory):
        missing = [k for k,v in docments(f, returns=False).items() if not v]
        assert not missing, f'{f.__name__}: {missing}'

SPEC = dict(
    sgd=dict(mom=0., wd=0.), rmsprop=dict(mom=0., sqr_mom=.99, eps=1e-8, wd=0.), adam=dict(mom=.9, sqr_mom=.99, eps=1e-5, wd=.01),
    radam=dict(mom=.9, sqr_mom=.99, eps=1e-5, wd=0., beta=0.), qhadam=dict(mom=.999, sqr_mom=.999, nu_1=.7, nu_2=1., eps=1e-8, wd=0.),
    larc=dict(mom=.9, clip=True, trust_coeff=.02, eps=1e-8, wd=0.), lamb=dict(mom=.9, sqr_mom=.99, eps=1e-5, wd=.01),
    ranger=dict(mom=.95, sqr_mom=.99, eps=1e-6, wd=.01, k=6, alpha=.5, beta=0.),
    adan=dict(beta1=.98, beta2=.92, beta3=.99, eps=1e-8, wd=.02, paper_init=True), lion=dict(beta1=.9, beta2=.99, wd=.1),
    stableadam=dict(mom=.9, sqr_mom=.99, eps=1e-6, wd=.01), sophia=dict(mom=.965, hess_mom=.99, rho=.04, eps=1e-15, wd=.1))

SPEC.update({n: o.DEFAULTS for n,o in ORACLES.items()})

@pytest.mark.parametrize('name', [*NAMES, *ORACLES])
def test_defaults_are_those_of_the_spec(name):
    want = {**({} if name in NO_L2 else {'decouple_wd':True}), **SPEC[name]}
    assert get_optimizer(name).hypers==want and [k for k in get_optimizer(name).hypers if k!='decouple_wd']==[k
        for k in SPEC[name] if k!='decouple_wd']

# ---------------------------------------------------------------- factories
@every
def test_factory_keeps_names_defaults_and_docments(row):
    f,g = inspect.signature(row.func),inspect.signature(row.factory)
    assert list(g.parameters)==[k for k in f.parameters if k not in ('params','lr')]
    assert all(g.parameters[k].default==f.parameters[k].default for k in g.parameters)
    d,e = docments(row.func),docments(row.factory)
    assert all(e[k]==d[k] for k in g.parameters)
    assert row.title in row.factory.__doc__ and str(row.year) in row.factory.__doc__ and row.arxiv in row.factory.__doc__

@every
def test_factory_makes_a_picklable_opt_func(row):
    k = own(row)
    f = row.factory(**{k:.125})
    assert isinstance(f, partial) and 'lr' not in f.keywords # fastai would take it for the Learner's
    f = pickle.loads(pickle.dumps(f))
    opt = f(params(), lr=.25)
    assert opt.hypers[0][k]==.125 and opt.hypers[0]['lr']==.25
    assert pickle.loads(pickle.dumps(row.factory)) is row.factory
    import cloudpickle
    assert cloudpickle.loads(cloudpickle.dumps(f))(params(), lr=.25).hypers[0][k]==.125

@every
def test_factory_gives_what_the_function_gives(row):
    a,b = row.factory()(params(), lr=.1),row.func(params(), .1)
    assert type(a) is type(b) and a.hypers==b.hypers and [getattr(c, 'func', c) for c in a.cbs]==[getattr(c, 'func', c) for c in b.cbs]

@every
def test_factory_refuses_at_once(row):
    t,msg = outcome(lambda: row.factory(momentum=.9))
    assert t is TypeError and f'{row.name}()' in msg and "'momentum'" in msg and 'it takes' in msg
    t,msg = outcome(lambda: row.factory(foreach=True, fused=True))
    assert t is ValueError and 'foreach=True and fused=True' in msg
    t,msg = outcome(lambda: row.factory(**{own(row):-1.}))
    assert t is ValueError and f'{own(row)}=-1.0' in msg
    t,msg = outcome(lambda: row.factory(params(), lr=.1)) # opt_func=adam instead of opt_func=adam()
    assert t is TypeError and f'opt_func={row.name}()' in msg

def test_factory_of_an_unregistered_function():
    def Mine(params, lr, # Learning rate
             mom=.5 # Momentum
    ): return make_optimizer(params, [], lr=lr, mom=mom)
    mine = factory(Mine)
    assert mine.__name__=='mine' and 'Mine' in mine.__doc__ and docments(mine)['mom']=='Momentum'
    assert mine(.25)(params(), lr=.1).hypers[0]['mom']==.25

# ---------------------------------------------------------------- flags
@pytest.mark.parametrize('on', [('foreach','jit'), ('foreach','fused'), ('jit','fused'), ('foreach','jit','fused')])
@every
def test_two_flags(row, on):
    t,msg = outcome(lambda: row.func(params(), .1, **{o:True for o in on}))
    assert t is ValueError and all(f'{o}=True' in msg for o in on) and 'Keep one' in msg

def test_pick_mode(): assert [pick_mode(), *(pick_mode(**{m:True}) for m in FLAGS)]==list(MODES)

@every
def test_no_flag_steps_as_fastais_optimizer(row):
    opt = inner(row.func(params(), .1))
    assert isinstance(opt, NativeOptimizer) and (row.name in FREE or type(opt) is NativeOptimizer) and not isinstance(opt, TapeOptimizer)

@pytest.mark.parametrize('mode', FLAGS)
@every
def test_flag_picks_the_engine(row, mode):
    if mode not in row.modes: assert mode in outcome(lambda: row.func(params(), .1, **{mode:True}))[1]; return
    cls = dict(foreach=ForEachOptimizer, jit=JitOptimizer, fused=FusedOptimizer)[mode]
    opt = row.func(params(), .1, **{mode:True})
    # never falsy
    assert isinstance(inner(opt), cls) and (row.name in FREE or type(inner(opt)) is cls) and isinstance(opt, Optimizer) and opt

OURS = dict(betas=('mom and sqr_mom','mom and hess_mom','beta1, beta2 and beta3','beta1 and beta2'), weight_decay=('wd',),
            momentum=('mom',), learning_rate=('lr',), epsilon=('eps',))
@every
def test_names_of_other_libraries(row):
    "The message names ours, if the algorithm has them; of a function, a factory, and the dict of a group"
    takes = set(inspect.signature(row.func).parameters)
    for k,ours in OURS.items():
        if k in takes: continue # AggMo's betas
        own = next((o for o in ours if takes.issuperset(re.split(', | and ', o))), None)
        for name,f in ((row.func.__name__, lambda: row.func(params(), .1, **{k:.5})), (row.name, lambda: row.factory(**{k:.5}))):
            t,msg = outcome(f)
            assert t is TypeError and msg.startswith(f"{name}() got an unexpected keyword argument '{k}': it takes "), msg
            if own and not (own=='lr' and name==row.name): assert msg.endswith(f'. Write {own} instead of {k}.'), msg
            else: assert 'Write' not in msg
        t,msg = outcome(lambda: row.func([dict(params=params(), **{k:.5})], .1))
        assert t is ValueError and f'Parameter group 0 has {k}=0.5' in msg and (not own or f' Write {own}. ' in msg), msg

def test_what_is_missing_is_named():
    msg = outcome(lambda: get_optimizer('adam').func(params()))[1]
    assert msg.startswith("Adam() missing a required argument: 'lr': it takes params, lr, mom,")
    msg = outcome(lambda: get_optimizer('adam').func(params(), .1, betas=(.9,.99), weight_decay=0))[1]
    assert msg.endswith('Write mom and sqr_mom instead of betas. Write wd instead of weight_decay.')
    msg = outcome(lambda: get_optimizer('sgd').func([dict(params=params(), lr_decay=.1)], .1))[1]
    assert msg.endswith('Write a schedule. It knows wd, lr, mom.')

# ---------------------------------------------------------------- hyperparameters
nan,inf = float('nan'),float('inf')
BAD = dict(lr=(nan,inf,-1e-3,'fast',None,True,1j), eps=(-1e-8,nan,inf), wd=(-.1,nan,inf), mom=(1.,1.5,-.1,nan), sqr_mom=(1.,-.1,nan),
           nu_1=(nan,inf), nu_2=(-inf,), trust_coeff=(0.,-1.,nan), rho=(0.,-1.,nan,inf),
           **{k:(1.,-.1,nan) for k in ('beta1','beta2','beta3','hess_mom')}, warmup_steps=(-1,2.5,nan,True), r=(nan,inf),
           weight_lr_power=(-1.,nan,inf), k=(0,-1,2.5,nan,True), alpha=(0.,1.5,-.1,nan), beta=(-1.,inf))
def cases():
    for r in ROWS:
        for k in ('lr',*r.hypers):
            for v in BAD.get(k, ()):
                # this algorithm's own range
                if isinstance(v, (int,float)) and not isinstance(v, bool) and k in r.ranges and v in r.ranges[k]: continue
                yield pytest.param(r, k, v, id=f'{r.name}-{k}-{v}')

@pytest.mark.parametrize('row,name,value', list(cases()))
def test_bad_hyperparameter(row, name, value, monkeypatch):
    from fastxtend_opt.definition import make
    monkeypatch.setitem(make._classes, 'native', lambda *a,**k: pytest.fail('built an optimizer before it checked'))
    t,msg = outcome(lambda: row.func(params(), **{'lr':.1, name:value}))
    assert t is ValueError
    assert f'{name}={value!r}' in msg and str(row.ranges[name]) in msg and row.ranges[name].tip in msg # name, value, range, what to do

@every
def test_every_hyperparameter_has_a_range(row):
    missing = [k for k,v in row.hypers.items() if not isinstance(v, (bool,str,tuple)) and v is not None and k not in row.ranges]
    assert not missing, f'add {missing} to hyper_ranges'

@every
def test_edges_of_the_ranges_are_allowed(row):
    edge = dict(eps=0, wd=0, mom=0, sqr_mom=0, nu_1=-.5, nu_2=1.5, k=1, alpha=1, beta=.1 if row.name in FREE else 0, trust_coeff=1e-9,
                beta1=0, beta2=0, beta3=0, hess_mom=0, rho=1e-9)
    row.func(params(), 0., **{k:v for k,v in edge.items() if k in row.hypers})

def test_valid_hyper_of_an_unknown_name():
    assert valid_hyper('caution', True) is True and valid_hyper('how', 'fast')=='fast' and valid_hyper('n', 3)==3
    for v in (nan, None): assert outcome(lambda: valid_hyper('n', v))[0] is ValueError

@every
def test_hypers_are_plain_numbers(row):
    k = own(row)
    opt = row.func(params(), np.float32(.5), **{k:torch.tensor(.25)}, **(dict(eps=np.array(1e-3)) if 'eps' in row.hypers else {}))
    h = opt.hypers[0]
    assert h['lr']==.5 and h[k]==.25 and all(type(v) in (float,int) for v in h.values())

@every
def test_a_value_a_group(row):
    groups = [[p] for p in params()]
    assert [h['lr'] for h in row.func(groups, [.1,.2]).hypers]==[.1,.2]
    assert [h['lr'] for h in row.func(groups, slice(1e-2)).hypers]==[1e-3,1e-2]
    assert [h['lr'] for h in row.func(groups, np.array([.1,.2])).hypers]==[.1,.2]
    assert row.func(groups, slice(1e-3,1e-1)).hypers[0]['lr']==pytest.approx(1e-3)
    t,msg = outcome(lambda: row.func(groups, [.1,.2,.3]))
    assert t is ValueError and 'lr=[0.1, 0.2, 0.3]' in msg and '3 values for 2 parameter groups' in msg
    assert 'lr=-0.2' in outcome(lambda: row.func(groups, [.1,-.2]))[1]
    assert 'lr=inf' in outcome(lambda: row.func(groups, slice(.1,inf)))[1]

@pytest.mark.parametrize('s', [slice(1e-3), slice(1e-4,1e-2), slice(1e-2,1e-4)])
def test_slices_are_read_as_fastai_reads_them(s):
    groups = [[p] for p in params()] + [[nn.Parameter(torch.ones(1))]]
    ours,theirs = get_optimizer('sgd').func(groups, s),Optimizer(groups, [], lr=s)
    assert [h['lr'] for h in ours.hypers]==pytest.approx([h['lr'] for h in theirs.hypers], rel=1e-12)

# ---------------------------------------------------------------- parameters
@every
def test_forms_of_params(row):
    a,b = params()
    ids = lambda o: [[id(p) for p in g] for g in o.param_lists]
    one,two = [[id(a),id(b)]],[[id(a)],[id(b)]]
    for ps in ([a,b], (a,b), L(a,b), iter([a,b]), (p for p in (a,b)), [[a,b]], dict(params=[a,b]), {'params':iter([a,b])}):
        assert ids(row.func(ps, .1))==one
    for ps in ([[a],[b]], L(L(a),L(b)), [(a,),(b,)], [iter([a]),iter([b])], [dict(params=[a]),dict(params=b)], [[a],dict(params=[b])]):
        assert ids(row.func(ps, .1))==two
    assert ids(row.func(a, .1))==[[id(a)]]
    assert ids(row.func([[],[a]], .1))==[[],[id(a)]] # a group may be empty

def refused():
    a,b = params()
    m = nn.Linear(2,2)
    yield 'empty', [], ValueError, 'params is empty'
    yield 'used-up', iter([]), ValueError, 'params is empty'
    yield 'empty-groups', [[],[]], ValueError, 'params is empty'
    yield 'twice', [a,b,a], ValueError, 'params[0] and at params[2]'
    yield 'two-groups', [[a],[b,a]], ValueError, 'params[0] of group 0 and at params[1] of group 1'
    yield 'two-dicts', [dict(params=a),dict(params=a)], ValueError, 'stepped twice'
    yield 'mixed', [a,[b]], ValueError, 'mixes parameters and groups'
    yield 'no-params', [dict(lr=.1)], ValueError, "without 'params'"
    yield 'non-leaf', [a*2], ValueError, 'never gets a gradient'
    yield 'module', m, TypeError, 'model.parameters()'
    yield 'modules', [m], TypeError, 'model.parameters()'
    yield 'half named', [*m.named_parameters()][:1] + [*m.parameters()][1:], TypeError, 'Pass pairs (name, parameter)'
    yield 'number', [1.], TypeError, 'is a float, not a parameter'
    yield 'none', [None], TypeError, 'is a NoneType'
REFUSED = [(i,t,w) for i,_,t,w in refused()]

@pytest.mark.parametrize('case,exc,words', REFUSED, ids=[o[0] for o in REFUSED])
@every
def test_refused_params(row, case, exc, words):
    ps = next(p for i,p,*_ in refused() if i==case)
    t,msg = outcome(lambda: row.func(ps, .1))
    assert t is exc and words in msg, msg

DIRECT = ('empty','empty-groups','twice','two-groups','non-leaf','number','none')
@pytest.mark.parametrize('case,exc,words', [o for o in REFUSED if o[0] in DIRECT], ids=DIRECT)
@pytest.mark.parametrize('cls', [NativeOptimizer,ForEachOptimizer,JitOptimizer,FusedOptimizer])
def test_classes_refuse_the_same(cls, case, exc, words):
    "An optimizer that is made from steppers alone checks its parameters as the functions do"
    ps = next(p for i,p,*_ in refused() if i==case)
    t,msg = outcome(lambda: cls(ps, [sgd_step], lr=.1))
    assert t is exc and words in msg, msg

@pytest.mark.parametrize('make', [get_optimizer('sgd').func, lambda ps, lr: NativeOptimizer(ps, [sgd_step], lr=lr)])
def test_complex_is_refused(make):
    with pytest.raises(NotImplementedError, match=r'params\[0\] is complex .* pass torch.view_as_real'):
        make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], .1)

def test_names_are_as_many_as_parameters():
    with pytest.raises(ValueError, match="Parameter group 0 has 2 parameters and 1 names in 'param_names'"):
        as_groups([dict(params=params(), param_names=['w'])])

def test_as_groups_is_idempotent():
    a,b = params()
    g = as_groups([dict(params=[a], lr=.1), [b]])
    assert [list(o) for o in as_groups(g)]==[list(o) for o in g] and as_groups(g)[0]['params'][0] is a

# ---------------------------------------------------------------- groups as dicts
@pytest.mark.parametrize('mode', MODES)
@every
def test_dict_groups_keep_their_hypers(row, mode):
    if mode not in row.modes: pytest.skip(f'no {mode}')
    (a,b),k = params(),own(row)
    low = 0 if k=='wd' else .125
    given = [{'params':[a], 'lr':.5, k:low}, dict(params=[b])]
    opt = row.func(given, .1, **{k:.25}, **({} if mode=='native' else {mode:True}))
    assert [(h['lr'],h[k]) for h in opt.hypers]==[(.5,low),(.1,.25)]
    assert given==[{'params':[a], 'lr':.5, k:low}, dict(params=[b])] # left as they were
    opt = row.func([dict(params=[a], lr=.5), dict(params=[b])], slice(.1,.2))
    assert [h['lr'] for h in opt.hypers]==pytest.approx([.5,.2])

@every
def test_dict_groups_refuse_unknown_and_bad_hypers(row):
    a,b = params()
    t,msg = outcome(lambda: row.func([dict(params=[a]), dict(params=[b], weight_decay=.1)], .1))
    assert t is ValueError and 'Parameter group 1 has weight_decay=0.1' in msg and 'Write wd.' in msg and 'lr' in msg
    t,msg = outcome(lambda: row.func([dict(params=[a], foo=1)], .1))
    assert t is ValueError and 'foo=1' in msg
    t,msg = outcome(lambda: row.func([dict(params=[a], lr=-1.)], .1))
    assert t is ValueError and 'lr=-1.0' in msg

@pytest.mark.parametrize('name', ['sgd','rmsprop','larc'])
def test_momentum_of_one_group_alone(name):
    "`mom=0` leaves a stepper out unless a group has its own `mom`"
    f = get_optimizer(name).func
    def run(ps, **kw):
        opt = f(ps, .1, **kw)
        for i in range(3):
            for g in opt.param_lists:
                for p in g: p.grad = torch.full_like(p, 1.+i)
            opt.step()
        return [p.detach().clone() for g in opt.param_lists for p in g]
    ones = lambda: nn.Parameter(torch.ones(2))
    x,y = run([dict(params=ones()), dict(params=ones(), mom=.9)], mom=0.)
    assert torch.equal(x, run([ones()], mom=0.)[0]) and torch.equal(y, run([ones()], mom=.9)[0])

# ---------------------------------------------------------------- small tools
def test_take_steps(): assert take_steps(get_optimizer('sgd').func, [1.,2.], [1.,0.]).tolist()==[.9,2.]

@pytest.mark.parametrize('row,mode', [pytest.param(r, m, id=f'{r.name}-{m}', marks=() if r.name in CORE else pytest.mark.slow)
                                      for r in ROWS for m in FLAGS if m in r.modes])
def test_modes_agree(row, mode):
    for kw in (dict(wd=.1) if 'wd' in row.hypers else {}, *([] if row.name in NO_L2 else [dict(wd=.1, decouple_wd=False)])):
        assert mode_differences(row.func, modes=(mode,), **kw)[mode] < 1e-10
    # every step of Sophia without an estimate moves each weight by lr, so what is left close to 0 keeps fewer digits
    assert mode_differences(row.func, modes=(mode,), dtype=torch.float32)[mode] < (1e-3 if row.name=='sophia' else 2e-4)

def test_mode_differences_sees_a_difference():
    def Wrong(params, lr, fused=False): return get_optimizer('sgd').func(params, [l*(1+fused) for l in lr])
    assert mode_differences(Wrong, modes=('fused',))['fused'] > 1e-2
