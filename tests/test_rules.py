"""Rules by name and kind of layer: each parameter is stepped as by its own optimizer, bit for bit, in every mode. Groups, schedules,
freezing, checkpoints and the Learner still work."""
import copy,pickle,warnings
import pytest,torch
from fastai.learner import load_learner
from fastai.optimizer import sgd_step
from fastai.torch_core import trainable_params
from torch import nn
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.adamp import adamp
from fastxtend_opt.algorithms.lamb import lamb
from fastxtend_opt.algorithms.lion import Lion,lion
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.ranger import ranger
from fastxtend_opt.algorithms.schedulefree import schedule_free
from fastxtend_opt.algorithms.muon import muon
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.algorithms.swats import SWATS,swats
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.definition.parameters import naming
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release,remove_gradient_release
from fastxtend_opt.training.rules import rules
from helpers import *
from learner_utils import learner,losses,no_warnings,weights

modes = pytest.mark.parametrize('mode', [pytest.param(m, marks=pytest.mark.slow if m in ('jit','triton') else ()) for m in ALL_MODES])
NOWD = '*.bias|*Norm*'
TABLE = {NOWD: dict(wd=0), nn.Embedding: adam(wd=.1), '3.*': dict(lr_mult=.5), '*': lion(wd=.2)}

def net(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11,6), nn.Linear(6,5), nn.LayerNorm(5), nn.Linear(5,3)).to(dtype)
def make(m, table, mode='native', groups=None, lr=.01, **kw):
    with backend_of(mode),naming(m): return rules(table, **kw, **flags(mode))(groups or m.parameters(), lr=lr)
def go(opt, r, skip=(), ps=None):
    ps,stream = ps or [p for pg in opt.param_lists for p in pg],GradStream(5)
    for i in r: stream.set(ps, i, skip=skip); opt.step()
    return opt
def values(ps): return [p.detach().clone() for p in ps]
def state(opt): return [{k:v for k,v in opt.state[p].items() if k!='rule'} for pg in opt.param_lists for p in pg]

# ---------------------------------------------------------------- what it does
OPTS = [({},torch.float64), (dict(decouple_lr=True),torch.float64), ({},torch.bfloat16),
        (dict(cautious=True, stochastic_rounding=True),torch.bfloat16)]
@pytest.mark.parametrize('mode,kw,dtype', [pytest.param(m, *o, marks=pytest.mark.slow if m in ('jit','triton')
                                                        or (i,m)==(3,'fused') else ()) for m in ALL_MODES for i,o in enumerate(OPTS)])
def test_as_with_an_optimizer_for_each(mode, kw, dtype):
    "Bitwise, parameters and state, over changing lr, mom and decay"
    if kw.get('decouple_lr'): t = {NOWD: dict(wd=0), nn.Embedding: adam(wd=1e-4), '3.*': dict(lr_mult=.5), '*': lion(wd=2e-4)}
    else: t = TABLE
    a,b = net(dtype),net(dtype); opt = make(a, t, mode, **kw)
    e,w1,b1,n1,n2,w2,b2 = b.parameters()
    wds = (1e-4,2e-4) if kw.get('decouple_lr') else (.1,.2)
    with backend_of(mode):
        def sub(f, ps, lr, wd): return f(ps, lr=lr, wd=wd, **kw, **flags(mode))
        subs = [(sub(Adam, [e], .01, wds[0]),1.), (sub(Lion, [w1], .01, wds[1]),1.), (sub(Lion, [b1,n1,n2], .01, 0.),1.),
                (sub(Lion, [w2], .005, wds[1]),.5), (sub(Lion, [b2], .005, 0.),.5)]
    pb = list(b.parameters())
    for i in range(10):
        lr = .01*(1+.05*i) if not kw.get('decouple_lr') else .01*(1-.05*i)
        opt.set_hypers(lr=lr, mom=.8+.01*i)
        for o,mult in subs: o.set_hypers(lr=lr*mult, mom=.8+.01*i)
        go(opt, [i]); GradStream(5).set(pb, i)
        for o,_ in subs: o.step()
    assert_bitwise(values(a.parameters()), values(pb))
    whose = {id(p):o for o,_ in subs for p in o.param_lists[0]}
    mine = [{k:v for k,v in whose[id(p)].state[p].items()} for p in pb]
    assert_bitwise(state(opt), mine)

def test_first_match_decides():
    m = net()
    with pytest.raises(TypeError, match=r"eps is no setting of SGD, which '\*.bias' gives.*it takes mom, wd"):
        make(m, {'Linear': dict(eps=1e-3), '*.bias': sgd(), '*': adam()})
    opt = make(m, {'1.*': dict(wd=.3, lr_mult=2), 'Linear': dict(wd=.4), '*.bias': sgd(wd=.6), '*': adam(wd=.5)})
    rows = {r['rule']:r for r in opt.rules.rows}
    assert [(r['rule'],r['tensors'],r['elements'],r['algorithm'],r['wd'],r['lr_mult']) for r in opt.rules.rows]==[
        ('1.* + *.bias',1,5,'SGD(wd=0.6)',.3,2.), ('1.* + *',1,30,'Adam(wd=0.5)',.3,2.),
        ('Linear + *.bias',1,3,'SGD(wd=0.6)',.4,1.), ('Linear + *',1,15,'Adam(wd=0.5)',.4,1.), ('*.bias',1,5,'SGD(wd=0.6)',.6,1.),
        ('*',2,71,'Adam(wd=0.5)',.5,1.)]

def test_table_is_markdown():
    lines = str(make(net(), TABLE).rules).splitlines()
    assert lines[0].split('|')[1].strip()=='rule' and set(lines[1])<=set('|-') and len(lines)==2+5 and '*.bias\\|*Norm*' in lines[2]
    assert make(net(), TABLE).rules._repr_markdown_()==str(make(net(), TABLE).rules)

def test_a_lambda_a_tuple_and_names_alone():
    m = net()
    opt = rules({lambda o: o.param.ndim<2: dict(wd=0), '*': adam(wd=.1)})(m.parameters(), lr=.1) # needs no names
    assert [r['tensors'] for r in opt.rules.rows]==[4,3]
    opt = rules({('*.bias','2.*'): dict(wd=0), '*': adam(wd=.1)})(m.named_parameters(), lr=.1)
    assert [r['tensors'] for r in opt.rules.rows]==[4,3]
    opt = rules({'0.*': sgd(), '*': adam()})([list(m[:2].named_parameters()), list(m[2:].named_parameters())], lr=[.1,.2])
    assert [h['lr'] for h in opt.hypers]==[.1,.2]

def test_fused_launches_a_kernel_for_each_algorithm():
    m = net(torch.float32)
    opt = make(m, {'*.bias': dict(lr_mult=.3, sqr_mom=.9), nn.LayerNorm: dict(wd=.2), nn.Embedding: lion(wd=.1), '*': adam(wd=.1)}, 'fused',
               groups=[list(m[:2].parameters()), list(m[2:].parameters())])
    go(opt, range(3))
    assert len(opt._cohorts())==7 and len(opt._plan.launches)==2

# ---------------------------------------------------------------- groups and hyperparameters
@modes
def test_groups_schedules_and_set_hyper(mode):
    m = net(); opt = make(m, TABLE, mode, groups=[list(m[:2].parameters()), list(m[2:].parameters())], lr=slice(1e-3,1e-2))
    assert ([h['lr'] for h in opt.hypers]==[1e-3,1e-2] and [h['wd'] for h in opt.hypers]==[.2,.2]
            and [h['wd@adam'] for h in opt.hypers]==[.1,.1])
    opt.set_hyper('wd', [.3,.4])
    assert [(h['wd'],h['wd@adam']) for h in opt.hypers]==[(.3,.3),(.4,.4)]
    assert [r['wd'] for r in opt.rules.rows if r['rule']==NOWD+' + *']==[0]
    opt.set_hyper('wd@adam', 0.)
    assert opt.hypers[0]['wd']==.3 and [r['wd'] for r in opt.rules.rows if 'Embedding' in r['rule']]==[0.]
    opt.set_hyper('lr', 0.)
    before = values(m.parameters()); go(opt, range(2)); assert_bitwise(values(m.parameters()), before)

def test_a_group_has_its_own():
    m = net(); opt = make(m, {'*.bias': dict(wd=0), '*': adam(wd=.1)}, groups=[dict(params=list(m[:2].parameters()), wd=.7, lr=.5),
                                                                               dict(params=list(m[2:].parameters()))])
    assert [(r['rule'],r['wd']) for r in opt.rules.rows]==[('*.bias + *',0),('*',.7),('*',.1)] and [h['lr'] for h in opt.hypers]==[.5,.01]

@modes
def test_state_stays_and_checkpoints_resume(mode):
    a,b = net(),net(); x,y = make(a, TABLE, mode),make(b, TABLE)
    go(x, range(5)); y.load_state_dict(copy.deepcopy(x.state_dict())); b.load_state_dict(a.state_dict())
    x2 = make(a2 := net(), TABLE, mode); x2.load_state_dict(pickle.loads(pickle.dumps(x.state_dict()))); a2.load_state_dict(a.state_dict())
    go(x, range(5,9)); go(y, range(5,9)); go(x2, range(5,9))
    assert_bitwise(values(a.parameters()), values(a2.parameters()))
    assert_same(values(a.parameters()), values(b.parameters()), **TOL[torch.float64])
    numbers = [x.state[p]['rule'] for p in a.parameters()]
    x.clear_state()
    assert [x.state[p] for p in a.parameters()]==[{'rule':n} for n in numbers] and len(set(numbers))==5
    go(x, range(2))

@modes
def test_state_that_was_thrown_away_by_hand(mode):
    "A parameter without its number would silently not be stepped"
    m = net(); opt = go(make(m, TABLE, mode), range(2)); before = values(m.parameters())
    opt.state = {}; go(opt, [2])
    del opt.state[m[1].weight]; go(opt, [3])
    assert all((a!=b).any() for a,b in zip(m.parameters(), before)) and len({opt.state[p]['rule'] for p in m.parameters()})==5

def test_state_of_another_optimizer():
    m = net(); opt = make(m, TABLE); plain = go(Adam(net().parameters(), lr=.1), range(2))
    with no_warnings(): opt.load_state_dict(plain.state_dict())
    assert len({opt.state[p]['rule'] for p in m.parameters()})==5
    other = go(make(net(), {'0.*|1.*': sgd(mom=.9), '*': adam()}), range(2))
    with pytest.warns(UserWarning, match=r'other rules for \d of 7'): opt.load_state_dict(other.state_dict())
    assert 'rule' in other.state_dict()['state'][0]

@modes
def test_pickle_and_deepcopy(mode):
    m = net(); opt = go(make(m, TABLE, mode), range(3))
    for other in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        qs = [p for pg in other.param_lists for p in pg]
        with backend_of(mode): go(other, range(3,6))
        mine = copy.deepcopy(opt)
        with backend_of(mode): go(mine, range(3,6))
        assert_bitwise(values(qs), values(p for pg in mine.param_lists for p in pg))
    f = pickle.loads(pickle.dumps(rules({'*.bias': dict(wd=0), '*': adam(fused=True)})))
    assert type(f(net().named_parameters(), lr=.1)).__name__=='FusedOptimizer'

# ---------------------------------------------------------------- freezing
@modes
def test_frozen(mode):
    m = net(); opt = make(m, {'1.*': dict(freeze=True), '*': adam()}, mode, groups=[list(m[:2].parameters()), list(m[2:].parameters())])
    def on(): return [p.requires_grad for p in m.parameters()]
    only = [True,False,False,True,True,True,True]
    assert on()==only
    opt.freeze_to(1); assert on()==[False]*3+[True]*4
    opt.unfreeze(); assert on()==only
    before = values(m[1].parameters())
    m(torch.arange(8)).square().sum().backward(); opt.step()
    assert_bitwise(values(m[1].parameters()), before) and m[1].weight.grad is None
    assert [(r['rule'],r['frozen']) for r in opt.rules.rows]==[('1.* + *','yes'),('*','')]
    with naming(m): rules({'3.*': dict(freeze=True), '*': adam()})(m.parameters(), lr=.1)
    assert on()==[True]*5+[False]*2
    make(m, {'0.*': dict(freeze=True), '1.*|2.*|3.*': adam()})
    assert on()==[False]+[True]*6

def test_nothing_left_to_train():
    with pytest.raises(ValueError, match='all parameters are frozen'),pytest.warns(UserWarning, match='matches no parameter'):
        make(net(), {'*': dict(freeze=True), '0.*x': adam()})

# ---------------------------------------------------------------- what else an optimizer does
@modes
def test_gradient_release(mode):
    def run(release):
        m = net(); opt = make(m, TABLE, mode)
        if release: prepare_for_gradient_release(m, opt)
        for i in range(4):
            m((torch.arange(8)+i)%11).square().sum().backward()
            opt.step(); opt.zero_grad()
        if release: remove_gradient_release(m)
        return values(m.parameters()),state(opt)
    assert_same(run(True), run(False), **TOL[torch.float64])

@modes
def test_optimizer_accumulation(mode):
    m = net(); opt = make(m, TABLE, mode)
    opt.optimizer_accumulation = True; before = values(m.parameters()); go(opt, range(2))
    assert_bitwise(values(m.parameters()), before) and all('grad_avg' in s for s in state(opt))
    opt.optimizer_accumulation = False; go(opt, [2]); assert (m[0].weight!=before[0]).any()
    with pytest.raises(NotImplementedError, match='keep no average'):
        make(net(), {'*.bias': sgd(), '*': adam()}).optimizer_accumulation = True

@modes
def test_round_it(mode):
    "Lookahead and schedule-free work around rules as they do around each algorithm"
    for wrap in (lambda o: Lookahead(o, k=3), None):
        a,b = net(),net(); t = {nn.Embedding: adam(wd=.1), '*': sgd(mom=.9)}
        with backend_of(mode):
            if wrap: opt,subs = wrap(make(a, t, mode)),[wrap(Adam([b[0].weight], lr=.01, wd=.1, **flags(mode))),
                                                        wrap(SGD(list(b[1:].parameters()), lr=.01, mom=.9, **flags(mode)))]
            else:
                with naming(a): opt = schedule_free(rules(t, **flags(mode)))(a.parameters(), lr=.01)
                subs = [schedule_free(adam(wd=.1, **flags(mode)))([b[0].weight], lr=.01),
                        schedule_free(sgd(mom=.9, **flags(mode)))(list(b[1:].parameters()), lr=.01)]
        for i in range(8):
            go(opt, [i]); GradStream(5).set(list(b.parameters()), i)
            for o in subs: o.step()
        assert_bitwise(values(a.parameters()), values(b.parameters()))
        if not wrap: assert opt.eval()._averaged and opt.rules.rows

@modes
def test_groups_that_agree_after_a_step(mode):
    "SWATS twice, with two tolerances: one rate for the tensors of each"
    a,b = net(),net(); opt = make(a, {'0.*|1.*': swats(switch_tol=1.), '*': swats(switch_tol=.5)}, mode)
    with backend_of(mode): subs = [SWATS(list(b[:2].parameters()), lr=.01, switch_tol=1., **flags(mode)),
                                   SWATS(list(b[2:].parameters()), lr=.01, switch_tol=.5, **flags(mode))]
    for i in range(8):
        go(opt, [i]); GradStream(5).set(list(b.parameters()), i)
        for o in subs: o.step()
    assert_same(values(a.parameters()), values(b.parameters()), **TOL[torch.float64])
    assert float(opt.state[a[0].weight]['sgd_rate'])!=float(opt.state[a[3].weight]['sgd_rate'])

@modes
def test_reductions_and_signs_together(mode):
    a,b = net(),net(); opt = make(a, {nn.Embedding: adamp(), '*': lamb(wd=.1)}, mode)
    with backend_of(mode): subs = [adamp(**flags(mode))([b[0].weight], lr=.01),lamb(wd=.1, **flags(mode))(list(b[1:].parameters()), lr=.01)]
    for i in range(5):
        go(opt, [i]); GradStream(5).set(list(b.parameters()), i)
        for o in subs: o.step()
    assert_same(values(a.parameters()), values(b.parameters()), **(dict(rtol=1e-9, atol=1e-11) if mode=='triton' else TOL[torch.float64]))

def hidden(p, lr, eps=1., **kwargs): p.data.sub_(p.grad.data, alpha=lr*eps)

@modes
def test_hyperparameters_of_others_are_hidden(mode):
    "A stepper with its own default does not see another algorithm's hyperparameter of the same name"
    m = net(); ps = list(m.parameters())
    opt = make(m, {'*.bias': lambda p, lr, **kw: make_optimizer(p, [hidden], lr=lr, **kw), '*': adam(eps=1e-3)},
               mode); assert 'eps' in opt.hypers[0]
    before = values(ps); go(opt, [0]); assert_same(ps[2].detach(), before[2]-.01*ps[2].grad, **TOL[torch.float64])

@pytest.mark.parametrize('mode', ['native','foreach','fused'])
def test_muon_decides_in_view_of_the_whole_model(mode):
    "Rules for some of its matrices, and Adam for others, don't change which parameters Muon takes; one rule for all is the optimizer alone"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.l1,self.norm,self.l2,self.head = nn.Embedding(9,6),nn.Linear(6,5),nn.LayerNorm(5),nn.Linear(5,5),nn.Linear(5,3)
    def run(f):
        torch.manual_seed(1); m = Net().double()
        with backend_of(mode),naming(m): opt = f(m.parameters(), lr=.01, **flags(mode))
        go(opt, range(4)); return m,opt
    (a,x),(b,y),(c,_) = run(muon(wd=.1)),run(rules({'*': muon(wd=.1)})),run(rules({'head.*': adam(), 'l1.*': dict(lr_mult=.5),
                                                                                   '*bias': dict(wd=0), '*': muon(wd=.1)}))
    assert_bitwise(values(a.parameters()), values(b.parameters()))
    assert_bitwise(values([a.l2.weight, a.emb.weight]), values([c.l2.weight, c.emb.weight]))
    assert any('use_muon=True' in r['algorithm'] for r in y.rules.rows) and any('use_muon=False' in r['algorithm'] for r in y.rules.rows)

# ---------------------------------------------------------------- errors and warnings
def errors():
    yield {}, TypeError, 'takes a dict'
    yield [('*',adam())], TypeError, 'takes a dict'
    yield {'*.bias': dict(wd=0)}, ValueError, 'no rule names an algorithm'
    yield {'*.bias': adam()}, ValueError, r"no rule gives an algorithm for 4 parameters \(0.weight, 1.weight"
    yield {'*': 3}, TypeError, r"'\*' has a int \(3\)"
    yield {'*': dict(opt_func=3)}, TypeError, 'opt_func=3'
    yield {'*': {}}, ValueError, 'is empty: give it an opt_func'
    yield {'*.bias': dict(lr=.1), '*': adam()}, ValueError, 'Write lr_mult'
    yield {'*.bias': dict(fused=True), '*': adam()}, ValueError, r'Write rules\(\{...\}, fused=True\)'
    yield {'*.bias': dict(max_lr=1), '*': adam()}, ValueError, "can't be set by a rule"
    yield {'*.bias': dict(freeze=1), '*': adam()}, ValueError, 'freeze=1: it must be True or False'
    yield {'*.bias': dict(lr_mult=-1), '*': adam()}, ValueError, 'lr_mult=-1 is out of range'
    yield {'*.bias': dict(mom=1.5), '*': adam()}, ValueError, 'mom=1.5 is out of range'
    yield {'*.bias': dict(foo=1.5), '*': adam()}, TypeError, 'foo is no setting of Adam'
    yield {3: adam()}, TypeError, 'pattern 3 is a int'
    yield {'*.bias': adam(fused=True), '*': adam()}, ValueError, r'one mode.*rules\(\{...\}, fused=True\)'
    yield {'*.bias': adam(kahan_sum=True), '*': adam()}, ValueError, 'storage='
    yield {'*.bias': adam(decouple_lr=True, wd=1e-5), '*': adam()}, ValueError, 'decouple_lr='
    yield {'*.bias': ranger(), '*': adam()}, TypeError, 'put the wrapper around the rules'
    yield {'*.bias': schedule_free(adam()), '*': adam()}, TypeError, 'put the wrapper around the rules'
    yield {'*.bias': torch.optim.Adam, '*': adam()}, TypeError, 'Use one of this package'
    yield {'*.bias': lambda ps, lr: keeps(ps, lr), '*': adam()}, TypeError, 'keeps thing for the whole model'
    yield {'*.bias': lambda ps, lr: make_optimizer(ps, [whole], lr=lr), '*': adam()}, TypeError, 'several passes over the whole model'
def keeps(ps, lr): opt = SGD(ps, lr); opt.thing = 1; return opt
def whole(p, lr, **kwargs): pass
whole.whole_model = True

@pytest.mark.parametrize('table,exc,words', list(errors()), ids=[w for *_,w in errors()])
def test_errors(table, exc, words):
    m = net(); before = values(m.parameters())
    with pytest.raises(exc, match=words): make(m, table)
    assert all(p.requires_grad for p in m.parameters())

def test_other_errors():
    with pytest.raises(ValueError, match='names of 7 of 7 parameters are not known.*with naming'): rules(TABLE)(net().parameters(), lr=.1)
    with pytest.raises(TypeError, match='needs a learning rate'): rules(TABLE)(net().named_parameters())
    with pytest.raises(TypeError, match="doesn't know mom"): rules(TABLE, mom=.9)
    with pytest.raises(ValueError, match='1 dicts for 7'): make(net(), TABLE).fix_state([{}])

def test_warnings():
    names = r'whole names \(0.weight, 1.weight, 1.bias, ...\)'
    with pytest.warns(UserWarning, match=f"'bias' matches no parameter. It is compared with {names}"):
        make(net(), {'bias': dict(wd=0), '*': adam()})
    with pytest.warns(UserWarning, match=r"'\*.bias' has no effect.*rules above"): make(net(), {'*': adam(), '*.bias': lion()})
    with pytest.warns(UserWarning, match="kinds of layers are not known: use `with naming"):
        rules({nn.Embedding: dict(wd=0), '*': adam()})(net().named_parameters(), lr=.1)
    with no_warnings(): make(net(), TABLE); make(net(), {'*.bias': dict(wd=0), '*': undecayed})

def undecayed(params, lr): return make_optimizer(params, [sgd_step], lr=lr)

# ---------------------------------------------------------------- in a Learner
def ruled(path, table=None, mode='native', **kw):
    learn = learner('adam', mode, path)
    with backend_of(mode): learn.opt_func = rules(table or {'*.bias|*Norm*': dict(wd=0), 'Conv2d': lion(wd=.1),
                                                            '*': dict(opt_func=adam(), lr_mult=2)}, **kw, **flags(mode))
    return learn

def test_learner_knows_the_names_and_prints_the_table(tmp_path, capsys):
    learn = ruled(tmp_path); learn.fit(1, 1e-3)
    out = capsys.readouterr().out
    assert out.count('| rule') == 1 and 'Lion(wd=0.1)' in out and 'Conv2d' in out
    learn.fit(1, 1e-3); learn.validate(); assert '| rule' not in capsys.readouterr().out
    assert [type(c).__name__ for c in learn.cbs].count('ShowRules')==1
    ruled(tmp_path, show=False).fit(1, 1e-3); assert '| rule' not in capsys.readouterr().out

def test_wd_bn_bias_is_shown(tmp_path):
    learn = ruled(tmp_path, {'*Norm*': dict(do_wd=True), '*': adam(wd=.3)}); learn.create_opt()
    wds = [(r['rule'],r['wd']) for r in learn.opt.rules.rows]
    assert ('*Norm* + *',.3) in wds and ('*','0 (do_wd)') in wds and ('*',.3) in wds

@pytest.mark.parametrize('mode', ['foreach','fused'])
def test_training_as_in_native_mode(mode, tmp_path):
    def run(mode):
        learn = ruled(tmp_path, mode=mode)
        learn.freeze_to(1); learn.fit_one_cycle(1, slice(1e-4,1e-3)); learn.unfreeze(); learn.fit_one_cycle(1, slice(1e-4,1e-3), wd=.05)
        assert learn.opt.hypers[0]['wd']==.05 and abs(learn.opt.hypers[0]['mom']-.95)<.01
        return losses(learn)
    assert_same(run(mode), run('native'), rtol=1e-4)

def test_save_load_export(tmp_path):
    table = {'*.bias|*Norm*': dict(wd=0), '0.*': dict(freeze=True), '*': adam()}
    learn = ruled(tmp_path, table); learn.splitter = trainable_params; learn.fit(1, 1e-3)
    learn.save('m'); w,n = weights(learn),len([p for p in learn.model.parameters() if not p.requires_grad])
    assert n>0
    with no_warnings(ignore=('numpy.core',)): learn.load('m', with_opt=True)
    learn.export('m.pkl')
    assert (len([p for p in learn.model.parameters() if not p.requires_grad])==n
            and sum(map(len, learn.opt.param_lists))==len(list(learn.model.parameters())))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); other = load_learner(tmp_path/'m.pkl')
    assert_bitwise(weights(other), w)
    other.dls = learn.dls
    other.fit(1, 1e-3); learn.fit(1, 1e-3)
    learn.opt_func,learn.opt = adam(),None
    learn.create_opt(); assert all(p.requires_grad for p in learn.model.parameters()) and learn.opt.rules is None
