"Gradient release: the same weights as with the ordinary step, bit for bit, and no gradient left; errors for what can't work."
import copy,gc,json,os,pickle,subprocess,sys,textwrap,warnings
from functools import partial

import fastai.callback.schedule,pytest,torch
from fastai.callback.core import CancelFitException
from fastai.callback.fp16 import MixedPrecision,ModelToHalf,NonNativeMixedPrecision
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.learner import Callback,Learner,load_learner
from fastai.losses import MSELossFlat
from fastai.optimizer import Optimizer,sgd_step,OptimWrapper
from fastai.test_utils import RegModel,synth_dbunch
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.ranger import Ranger,ranger
from fastxtend_opt.algorithms.sgd import SGD
from fastxtend_opt.algorithms.sophia import Sophia,update_hessian
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.training import gradient_release as gr
from fastxtend_opt.training.gradient_release import GradientRelease,keep_gradients,prepare_for_gradient_release,remove_gradient_release
from helpers import *

NAMES = [r.name for r in list_optimizers() if r.kind!='model'] # those need all gradients at once, and refuse

class Net(nn.Module):
    "A convolution, normalization, a branch that not every batch takes, a weight that is used twice, a 0-dim and a big parameter"
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv,self.bn = nn.Conv2d(2, 4, 3, padding=1),nn.GroupNorm(2, 4)
        self.twice,self.branch,self.scale = nn.Linear(4, 4, bias=False),nn.Linear(4, 4),nn.Parameter(torch.tensor(1.3))
        self.last = nn.Linear(4, BIG//4)
        self.to(dtype)
    def forward(self, x, branch):
        x = self.bn(self.conv(x)).relu().mean((2,3))
        x = self.twice(self.twice(x).relu())
        if branch: x = x + self.branch(x)
        return self.last(x*self.scale)

def net(dtype=torch.float32):
    torch.manual_seed(3)
    return Net(dtype)

def groups(m): return [[*m.conv.parameters(), *m.bn.parameters()], [m.twice.weight, *m.branch.parameters(), m.scale, *m.last.parameters()]]

def loss(m, i, dtype=torch.float32):
    gen = torch.Generator().manual_seed(i)
    return (m(torch.randn(5, 2, 6, 6, generator=gen).to(dtype), i%3 > 0)-1).float().pow(2).mean()

def train(name, mode, release, steps=9, dtype=torch.float32, call=True, **kw):
    m = net(dtype)
    with backend_of(mode): opt = get_optimizer(name).func(groups(m), lr=[.01,.02], **flags(mode), **kw)
    for p in (m.bn.weight, m.bn.bias): opt.state[p]['do_wd'] = False
    if release: prepare_for_gradient_release(m, opt)
    for i in range(steps):
        for j,h in enumerate(opt.hypers): h['lr'] = .02*(j+1)*(steps-i)/steps
        loss(m, i, dtype).backward()
        if release: assert all(p.grad is None for p in m.parameters())
        if call or not release:
            opt.step(); opt.zero_grad(set_to_none=True) if mode!='native' and not isinstance(opt, Lookahead) else [setattr(p, 'grad', None)
                for p in m.parameters()]
    if release: remove_gradient_release(m)
    return [p.detach().clone() for p in m.parameters()],detach_copy(opt.state_dict())

def in_turn(i, name, mode):
    "By default optimizers of `CORE` run in each mode, the others in one, and a few in Triton's interpreter"
    return name in INTERPRETED if mode=='triton' else name in CORE or mode==ALL_MODES[i%4]

@pytest.mark.parametrize('name,mode', [slow(n, m, when=not in_turn(i, n, m)) for i,n in enumerate(NAMES) for m in ALL_MODES])
def test_same_weights(name, mode):
    "Weights and state to the last bit, with two groups, a schedule, parameters without decay and some without a gradient now and then"
    kw = dict(mom=.9) if name=='sgd' else {}
    a,b = train(name, mode, False, **kw),train(name, mode, True, **kw)
    assert_bitwise(b, a)
    assert any((x!=y).any() for x,y in zip(a[0], net().parameters()))

STORAGES = dict(kahan={}, sround=dict(stochastic_rounding=True, seed=5), f32_state=dict(state_dtype=torch.float32),
                plain=dict(kahan_sum=False))
@pytest.mark.parametrize('storage,mode', [slow(v, m, id=f'{k}-{m}', when=m=='triton' and k!='sround') for k,
                                          v in STORAGES.items() for m in ALL_MODES])
def test_same_weights_bfloat16(storage, mode):
    for name in ('adam','ranger')[:1 if mode=='triton' else 2]:
        assert_bitwise(train(name, mode, True, dtype=torch.bfloat16, **storage), train(name, mode, False, dtype=torch.bfloat16, **storage),
                       name)

@pytest.mark.parametrize('name', ['adam','ranger'])
def test_without_calls_of_step(name):
    "In a loop that has no `opt.step()`: Lookahead counts backward passes"
    assert_bitwise(train(name, 'fused', True, call=False, steps=13), train(name, 'fused', False, steps=13))

# ---------------------------------------------------------------- the optimizer works as before
def one(mode='fused', f=Adam, lr=.1, **kw):
    m = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    opt = f([list(m[0].parameters()), list(m[1].parameters())], lr=lr, **flags(mode), **kw)
    prepare_for_gradient_release(m, opt)
    return m,opt

def back(m): m(torch.ones(2, 3)).sum().backward()

@pytest.mark.parametrize('mode', ALL_MODES)
def test_schedule_after_load(mode):
    "A learning rate that is set after `load_state_dict` counts (in optimi it does not)"
    m,opt = one(mode, wd=0.)
    back(m)
    opt.load_state_dict(detach_copy(opt.state_dict()))
    for set_lr in (lambda v: opt.set_hyper('lr', v), lambda v: [h.update(lr=v) for h in opt.hypers]):
        for lr in (0., .5):
            before = m[0].weight.detach().clone()
            set_lr(lr)
            back(m)
            assert ((m[0].weight-before).abs().max() > .1)==(lr > 0), lr

@pytest.mark.parametrize('mode', ALL_MODES)
def test_load_and_clear_state(mode):
    m,opt = one(mode)
    back(m); back(m)
    sd,weights = detach_copy(opt.state_dict()),detach_copy(m.state_dict())
    back(m)
    after = detach_copy((m.state_dict(), opt.state_dict()))
    m.load_state_dict(weights); opt.load_state_dict(sd)
    back(m)
    assert_bitwise(detach_copy((m.state_dict(), opt.state_dict())), after)
    opt.clear_state()
    back(m)
    assert {st['step'] for st in opt.state_dict()['state']}=={1}

@pytest.mark.parametrize('mode', ALL_MODES)
def test_freeze_and_unfreeze(mode):
    m,opt = one(mode)
    opt.freeze_to(1)
    start = detach_copy(m.state_dict())
    back(m)
    assert torch.equal(m[0].weight, start['0.weight']) and not torch.equal(m[1].weight, start['1.weight'])
    opt.unfreeze()
    back(m)
    assert not torch.equal(m[0].weight, start['0.weight']) and m[0].weight.grad is None

def test_frozen_when_prepared():
    m = nn.Linear(2, 2)
    m.weight.requires_grad_(False)
    opt = Adam(m.parameters(), lr=.1, fused=True)
    prepare_for_gradient_release(m, opt)
    assert not m.weight.requires_grad
    w = m.weight.detach().clone()
    m(torch.ones(1, 2)).sum().backward()
    assert torch.equal(w, m.weight)
    m.weight.requires_grad_(True)
    m(torch.ones(1, 2)).sum().backward()
    assert not torch.equal(w, m.weight) and m.weight.grad is None

def test_parameters_outside_of_the_model_and_of_the_optimizer():
    "`step` steps the optimizer's parameters that are not in the model; the model's that are not in the optimizer keep their gradients"
    m,other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),nn.Parameter(torch.ones(2))
    opt = SGD([*m[0].parameters(), other], lr=1., fused=True)
    prepare_for_gradient_release(m, opt)
    (m(torch.ones(1, 2))*other).sum().backward()
    assert m[0].weight.grad is None and m[1].weight.grad is not None and other.grad is not None
    before,w = other.detach().clone(),m[0].weight.detach().clone()
    opt.step()
    assert not torch.equal(other, before) and torch.equal(m[0].weight, w)

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('f', [Adam, Ranger])
def test_some_parameters_outside_of_the_model(f, mode):
    "As a loss function may have: `step` steps those, and counts one step in all"
    def run(release):
        torch.manual_seed(0)
        m,other = nn.Linear(3, 3),nn.Parameter(torch.ones(3))
        with backend_of(mode): opt = f([*m.parameters(), other], lr=.1, **flags(mode))
        if release: prepare_for_gradient_release(m, opt)
        for i in range(13):
            (m(torch.ones(2, 3)) * (other if i%4 else 1.)).square().sum().backward()
            opt.step()
            for p in (*m.parameters(), other): p.grad = None
        return snapshot([*m.parameters(), other], opt),getattr(opt, 'count', 13)
    a,b = run(False),run(True)
    assert_bitwise(b, a)
    assert a[1]==13

def test_integer_parameter():
    m = nn.Linear(2, 2)
    m.q = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    opt = Adam(m.parameters(), lr=.1)
    prepare_for_gradient_release(m, opt)
    m(torch.ones(1, 2)).sum().backward()
    assert m.weight.grad is None

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('mode', ALL_MODES)
def test_autograd_sees_the_step(mode, dtype):
    """A second pass through the same graph, or a weight whose value is used elsewhere, would give gradients of the new weights: an error in
    each mode"""
    m,opt = one(mode)
    m.to(dtype)
    l = m(torch.ones(2, 3, dtype=dtype)).sum()
    l.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): l.backward()
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        m[1](m[0](x @ m[0].weight.detach().t() @ m[0].weight.detach())).sum().backward()

@pytest.mark.parametrize('mode', ALL_MODES)
def test_old_state_is_let_go(mode):
    "Also by frozen parameters, which are not stepped again"
    import weakref
    m,opt = one(mode)
    back(m); back(m)
    m[0].requires_grad_(False)
    sd = detach_copy(opt.state_dict())
    old = [weakref.ref(v) for st in opt.state.values() for v in st.values() if isinstance(v, torch.Tensor)]
    opt.load_state_dict(sd); del sd
    back(m)
    gc.collect()
    assert len(old)==8 and not any(o() is not None for o in old)

class Fails(torch.autograd.Function):
    on = True
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g):
        if Fails.on: raise RuntimeError('in backward')
        return g

@pytest.mark.parametrize('f', [Adam, Ranger])
@pytest.mark.parametrize('mode', ALL_MODES)
def test_exception_in_backward(mode, f):
    """Parameters before the exception are stepped, those after it are not; the next backward passes work, and Lookahead has not counted the
    broken one"""
    m,opt = one(mode, f)
    start = detach_copy(m.state_dict())
    Fails.on = True
    with pytest.raises(RuntimeError, match='in backward'): m[1](Fails.apply(m[0](torch.ones(2, 3)))).sum().backward()
    assert torch.equal(m[0].weight, start['0.weight']) and not torch.equal(m[1].weight, start['1.weight'])
    for _ in range(7): back(m)
    assert not torch.equal(m[0].weight, start['0.weight'])
    steps = [s['step'] for s in opt.state_dict()['state']]
    assert steps==[7, 7, 8, 8] and (f is Adam or opt.count==7)

def test_kernel_that_fails_leaves_a_usable_optimizer():
    def choosy(p, ok=True, **kwargs):
        if not ok: raise ValueError('not this time')
        p.data.mul_(.5)
    from fastxtend_opt.optimizer.fused import FusedOptimizer
    m = nn.Linear(2, 1, bias=False)
    opt = FusedOptimizer(m.parameters(), [choosy], lr=.1, ok=False)
    prepare_for_gradient_release(m, opt)
    w = m.weight.detach().clone()
    with pytest.raises(ValueError, match='not this time'): m(torch.ones(1, 2)).sum().backward()
    assert torch.equal(w, m.weight)
    opt.set_hyper('ok', True)
    m.weight.grad = None
    m(torch.ones(1, 2)).sum().backward()
    assert torch.equal(w*.5, m.weight)

def test_checkpointing():
    "Without reentrance a segment is the same; reentrant, it is refused"
    def run(release, reentrant, twice=False):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        opt = Adam(m.parameters(), lr=.1, fused=True)
        if release: prepare_for_gradient_release(m, opt)
        for _ in range(3):
            x = torch.ones(2, 3, requires_grad=True)
            for _ in range(1+twice): x = checkpoint(m, x, use_reentrant=reentrant)
            x.sum().backward()
            opt.step(); opt.zero_grad()
        return [p.detach().clone() for p in m.parameters()]
    assert_bitwise(run(True, False), run(False, False))
    assert_bitwise(run(True, False, True), run(False, False, True))
    with pytest.raises(RuntimeError, match='use_reentrant=False'): run(True, True)

def test_keep_gradients():
    "Sophia's second backward pass"
    m = nn.Linear(3, 2)
    opt = Sophia(m.parameters(), lr=.1, fused=True)
    prepare_for_gradient_release(m, opt)
    m(torch.ones(4, 3)).sum().backward()
    w = m.weight.detach().clone()
    with keep_gradients(opt): m(torch.ones(4, 3)).sum().backward()
    update_hessian(opt, 4)
    opt.zero_grad(set_to_none=True)
    assert torch.equal(w, m.weight) and (opt.state[m.weight]['hessian'] > 0).all()
    m(torch.ones(4, 3)).sum().backward()
    assert not torch.equal(w, m.weight)
    with keep_gradients(Adam(nn.Linear(2, 2).parameters(), lr=.1)): pass

def test_gradients_from_elsewhere_are_stepped():
    "`step` skips no gradient that the hooks have not seen"
    m,opt = one('fused', Ranger)
    w = m[0].weight.detach().clone()
    for p in m.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    assert opt.count==1 and not torch.equal(w, m[0].weight)
    opt.zero_grad(set_to_none=True); opt.step()
    assert opt.count==1

# ---------------------------------------------------------------- hooks never outlive their optimizer
def n_hooks(m): return sum(len(p._post_accumulate_grad_hooks or ()) for p in m.parameters())

@pytest.mark.parametrize('f', [Adam, Ranger])
@pytest.mark.parametrize('mode', ALL_MODES)
def test_lifetime(mode, f):
    m,opt = one(mode, f)
    assert n_hooks(m)==4 and len(gr._releases)==1
    m2 = copy.deepcopy(m)
    pickle.loads(pickle.dumps(m)); both = copy.deepcopy((m, opt)); pickle.loads(pickle.dumps(opt))
    assert n_hooks(m2)==n_hooks(both[0])==0
    w = both[0][0].weight.detach().clone()
    back(both[0]) # copies are stepped in the ordinary way
    assert torch.equal(w, both[0][0].weight)
    both[1].step()
    assert not torch.equal(w, both[0][0].weight) and (f is Adam or both[1].count==1)
    prepare_for_gradient_release(m, opt)
    assert n_hooks(m)==4
    del opt
    gc.collect()
    assert not gr._releases
    w = m[0].weight.detach().clone()
    back(m)
    assert torch.equal(w, m[0].weight) and m[0].weight.grad is not None
    remove_gradient_release(m)

def test_remove():
    m,opt = one('fused', Ranger)
    remove_gradient_release(m); remove_gradient_release(m)
    assert n_hooks(m)==0 and not gr._releases and not opt.released
    back(m)
    assert m[0].weight.grad is not None
    opt.step()
    assert opt.count==1

def test_two_optimizers():
    "As for a generator and a critic: each model is released separately"
    (a,oa),(b,ob) = one(),one()
    assert len(gr._releases)==2
    wa,wb = a[0].weight.detach().clone(),b[0].weight.detach().clone()
    back(a)
    assert not torch.equal(a[0].weight, wa) and torch.equal(b[0].weight, wb)
    with pytest.raises(ValueError, match='another optimizer steps'): prepare_for_gradient_release(a, Adam(a.parameters(), lr=.1))
    remove_gradient_release(a)
    assert n_hooks(a)==0 and n_hooks(b)==4

@pytest.mark.parametrize('how', ['freeze','keep'])
def test_generator_and_critic(how):
    "The generator's backward pass goes through the critic, which must not learn from it"
    def run(release):
        torch.manual_seed(0)
        G,D = nn.Linear(2, 3),nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        g,d = Adam(G.parameters(), lr=.01, fused=True),Ranger(D.parameters(), lr=.02, fused=True)
        if release: prepare_for_gradient_release(G, g); prepare_for_gradient_release(D, d)
        for i in range(8):
            z,real = (torch.randn(4, n, generator=torch.Generator().manual_seed(i+n)) for n in (2, 3))
            (D(G(z).detach()).mean() - D(real).mean()).backward()
            d.step()
            for p in D.parameters(): p.grad = None
            if release and how=='freeze':
                D.requires_grad_(False); (-D(G(z)).mean()).backward(); D.requires_grad_(True)
            elif release:
                with keep_gradients(d): (-D(G(z)).mean()).backward()
            else: (-D(G(z)).mean()).backward()
            g.step()
            for p in (*G.parameters(), *D.parameters()): p.grad = None
        return snapshot([*G.parameters(), *D.parameters()], d)
    assert_bitwise(run(True), run(False))

def test_keep_gradients_nested_and_inner():
    m,opt = one('fused', Ranger)
    w = m[0].weight.detach().clone()
    with keep_gradients(opt):
        with keep_gradients(opt.opt): back(m)
        back(m)
    assert torch.equal(w, m[0].weight) and m[0].weight.grad is not None
    for p in m.parameters(): p.grad = None
    back(m)
    assert not torch.equal(w, m[0].weight)

# ---------------------------------------------------------------- what can't work says so
def test_refusals():
    m = nn.Linear(2, 2)
    with pytest.raises(TypeError, match='is a AdamW'): prepare_for_gradient_release(m, torch.optim.AdamW(m.parameters()))
    with pytest.raises(TypeError, match='is a OptimWrapper'):
        prepare_for_gradient_release(m, OptimWrapper(m.parameters(), torch.optim.SGD, lr=.1))
    with pytest.raises(TypeError, match='is a Optimizer'): prepare_for_gradient_release(m, Optimizer(m.parameters(), [sgd_step], lr=.1))
    with pytest.raises(ValueError, match='no parameter of the model'):
        prepare_for_gradient_release(nn.Linear(2, 2), Adam(m.parameters(), lr=.1))
    tied = nn.ParameterList([nn.Parameter(torch.ones(4))])
    tied.append(nn.Parameter(tied[0].data[:2]))
    with pytest.raises(ValueError, match='share memory'): prepare_for_gradient_release(tied, Adam(tied.parameters(), lr=.1))
    opt = Adam(m.parameters(), lr=.1, fused=True)
    opt.amp_scaling = True
    with pytest.raises(ValueError, match='amp_scaling'): prepare_for_gradient_release(m, opt)
    def global_step(p, **kwargs): pass
    global_step.whole_model = True
    from fastxtend_opt.optimizer.fused import FusedOptimizer
    with pytest.raises(ValueError, match="'global_step' needs the gradients of all"):
        prepare_for_gradient_release(m, FusedOptimizer(m.parameters(), [global_step], lr=.1))
    assert n_hooks(m)==0 and not gr._releases

def test_changed_parameter_lists():
    m,opt = one()
    opt.param_lists = opt.param_lists[:1]
    with pytest.raises(RuntimeError, match='other parameters than when it was prepared'): back(m)

# ---------------------------------------------------------------- in a Learner
def learner(opt_func, cbs=None, **kwargs):
    set_seed(5)
    learn = Learner(synth_dbunch(n_train=4, n_valid=1), nn.Sequential(RegModel(), nn.Linear(1, 1)), loss_func=MSELossFlat(),
                    opt_func=opt_func,
                    splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], cbs=cbs, **kwargs)
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__=='ProgressCallback'])
    learn.logger = lambda *a: None
    return learn

def weights(learn): return detach_copy(learn.model.state_dict())

FITS = dict(one_cycle=lambda l: l.fit_one_cycle(2, .1), fine_tune=lambda l: l.fine_tune(1, .05),
            twice=lambda l: (l.fit(1, slice(.001,.1)), l.fit_flat_cos(1, .05)))

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('how', FITS)
def test_fit(how, mode):
    res = []
    for cbs in (None, GradientRelease()):
        with backend_of(mode):
            learn = learner(ranger(**flags(mode)), cbs)
            set_seed(7); FITS[how](learn)
        res.append((weights(learn), detach_copy(learn.opt.state_dict())))
        assert n_hooks(learn.model)==0 and not gr._releases
    assert_bitwise(*[dict(w=w, state=o['state']) for w,o in res])

def test_lr_find_save_load_export(tmp_path):
    import learner_utils
    learn = learner_utils.learner('adam', 'fused', tmp_path)
    learn.add_cb(GradientRelease())
    learn.fit(1, .01)
    assert learn.opt.state_dict()['state'][0]['step']==len(learn.dls.train) and n_hooks(learn.model)==0
    w = weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=5, show_plot=False)
    assert_bitwise(weights(learn), w)
    learn.save('m')
    learn.dls.train.rng.seed(1); learn.fit(1, .01); a = weights(learn)
    learn.load('m')
    learn.dls.train.rng.seed(1); learn.fit(1, .01)
    assert_bitwise(weights(learn), a)
    learn.export('e.pkl')
    other = load_learner(tmp_path/'e.pkl')
    assert n_hooks(other.model)==0
    with other.no_bar(): preds = other.get_preds(dl=learn.dls.valid)[0] # the callback was exported with it
    assert len(preds)==len(learn.dls.valid_ds)
    set_seed(2); learn.fit(1, .01)
    twin = copy.deepcopy(learn)
    assert n_hooks(twin.model)==0

class At(Callback):
    run_valid = False
    def __init__(self, event, f): self.event,self.f,self.done = event,f,False
    def __call__(self, event_name):
        if event_name==self.event and not self.done: self.done = True; self.f(self)

@pytest.mark.parametrize('alive', [False, True])
def test_new_optimizer_in_the_middle_of_a_fit(alive):
    "Whether or not something keeps the old one alive"
    learn = learner(adam(fused=True))
    learn.create_opt()
    old = learn.opt if alive else None
    learn.fit(1, .01, cbs=[GradientRelease(), At('after_batch', lambda cb: cb.learn.create_opt())])
    assert old is not learn.opt and learn.opt.state_dict()['state'][0]['step']==3 and n_hooks(learn.model)==0

def test_without_an_optimizer():
    learn = learner(adam(fused=True), GradientRelease())
    learn.validate(); learn.get_preds()
    assert learn.opt is None

class Hooks(Callback):
    run_valid = False
    def before_fit(self): self.n = []
    def after_backward(self): self.n.append((n_hooks(self.learn.model), sum(p.grad is not None for p in self.learn.model.parameters())))

@pytest.mark.parametrize('what', [lambda l: l.get_preds(), lambda l: l.validate()], ids=['get_preds','validate'])
def test_predictions_inside_of_a_fit(what):
    "They run the events of a fit and leave the release on"
    learn = learner(adam(fused=True), GradientRelease())
    hooks = Hooks()
    def at(cb): what(cb.learn)
    learn.fit(2, .01, cbs=[hooks, At('before_epoch', lambda cb: None), At('after_epoch', at)])
    assert len(hooks.n) in (4, 8) and set(hooks.n)=={(4, 0)} and n_hooks(learn.model)==0

def test_added_to_a_running_fit():
    learn = learner(adam(fused=True))
    def add(cb): cb.learn.add_cb(GradientRelease())
    learn.fit(2, .01, cbs=At('before_epoch', add))
    assert learn.opt.state_dict()['state'][0]['step']==8 and n_hooks(learn.model)==0

@pytest.mark.parametrize('exc', [CancelFitException, KeyboardInterrupt])
def test_interrupted_fit(exc):
    "The callback leaves with the fit, and its hooks with it"
    def stop(cb): raise exc()
    learn = learner(adam(fused=True))
    try: learn.fit(1, .01, cbs=[GradientRelease(), At('after_backward', stop)])
    except KeyboardInterrupt: pass
    assert n_hooks(learn.model)==0 and not gr._releases
    learn.fit(1, .01)
    perm = GradientRelease()
    learn.add_cb(perm)
    try: learn.fit(1, .01, cbs=At('after_backward', stop))
    except KeyboardInterrupt: pass
    learn.remove_cb(perm)
    assert n_hooks(learn.model)==0

@pytest.mark.parametrize('cb,what', [(MixedPrecision(), 'float16'), (GradientClip(), 'GradientClip'),
    (GradientAccumulation(4), 'GradientAccumulation'), (NonNativeMixedPrecision(), 'non-native'), (ModelToHalf(), 'non-native')],
                         ids=lambda o: o if isinstance(o, str) else type(o).__name__)
def test_refused_before_fit(cb, what):
    learn = learner(adam(fused=True))
    learn.create_opt()
    release = GradientRelease()
    learn.add_cbs([release])
    release.learn,learn.cbs = learn,learn.cbs+[cb]
    with pytest.raises(ValueError, match=f"can't work with {what}"): release.before_fit()
    assert n_hooks(learn.model)==0
    if what in ('GradientClip','GradientAccumulation'):
        learn = learner(adam(fused=True))
        with pytest.raises(ValueError, match=what): learn.fit(1, .01, cbs=[GradientRelease(), cb])

def test_bfloat16_mixed_precision_is_welcome():
    from fastai.callback.fp16 import AMPMode
    learn = learner(adam(fused=True))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # no CUDA
        learn.fit(1, .01, cbs=[GradientRelease(), MixedPrecision(AMPMode.BF16)])
    assert learn.opt.state_dict()['state'][0]['step']==4

# ---------------------------------------------------------------- several processes
DDP_SCRIPT = '''
import sys,torch,torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from fastxtend_opt.algorithms.ranger import Ranger
from fastxtend_opt.training.gradient_release import keep_gradients,prepare_for_gradient_release,remove_gradient_release
torch.set_num_threads(1)
rank,file = int(sys.argv[1]),sys.argv[2]
dist.init_process_group('gloo', init_method='file://'+file, rank=rank, world_size=2)
def run(how):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    opt = Ranger(m.parameters(), lr=.01, fused=True)
    if how=='refused':
        prepare_for_gradient_release(m, opt)
        try: DDP(m)(torch.ones(1, 8))
        except RuntimeError as e: assert 'wrapped in DistributedDataParallel after it was prepared' in str(e), e
        else: raise AssertionError('not refused')
        remove_gradient_release(m)
    d = DDP(m, bucket_cap_mb=.0005, gradient_as_bucket_view=how=='view') # several buckets
    if how not in ('ordinary','late'): prepare_for_gradient_release(d, opt)
    for i in range(12):
        if how=='late' and i in (3,8): prepare_for_gradient_release(d, opt)
        if how=='late' and i==6: remove_gradient_release(m)
        released = how in ('wrapped','view','refused') or (how=='late' and i in (3,4,5,8,9,10,11))
        batch = lambda j: d(torch.randn(4, 8, generator=torch.Generator().manual_seed(100*i+10*j+rank))).square().mean()
        if i%4==3: # a micro-batch that is not reduced must not step
            w = m[0].weight.detach().clone()
            with d.no_sync(): batch(1).backward()
            assert torch.equal(w, m[0].weight)
        batch(0).backward()
        assert all((p.grad is None)==released for p in m.parameters()), (how, i)
        opt.step()
        for p in m.parameters(): p.grad = None
    w = torch.cat([p.detach().view(-1) for p in m.parameters()])
    ws = [torch.empty_like(w) for _ in range(2)]
    dist.all_gather(ws, w)
    assert torch.equal(*ws), how
    return w
ref = run('ordinary')
for how in ('wrapped','view','late','refused'): assert torch.equal(run(how), ref), how
m = nn.Linear(2, 1)
opt = Ranger(m.parameters(), lr=.1)
for kw in (dict(find_unused_parameters=True), dict(static_graph=True)):
    try: prepare_for_gradient_release(DDP(m, **kw), opt)
    except ValueError as e: assert 'find_unused_parameters' in str(e)
    else: raise AssertionError('not refused')
prepare_for_gradient_release(m, opt) # no DDP: each process steps its own model
m(torch.ones(1, 2)).sum().backward()
assert m.weight.grad is None
dist.barrier()
dist.destroy_process_group()
m = nn.Linear(2, 1)
opt = Ranger(m.parameters(), lr=.1)
prepare_for_gradient_release(m, opt)
dist.init_process_group('gloo', init_method='file://'+file+'2', rank=rank, world_size=2)
try: m(torch.ones(1, 2)).sum().backward()
except RuntimeError as e: assert 'after init_process_group' in str(e)
else: raise AssertionError('not refused')
dist.barrier() # a process that is done and leaves while the other one still connects would break its connection
dist.destroy_process_group()
print('fine')
'''

def test_distributed_data_parallel(tmp_path):
    "Two processes: gradients are reduced before they are used, with the weights of ordinary DDP, bit for bit"
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', DDP_SCRIPT, str(r), str(tmp_path/'store')], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True) for r in range(2)]
    outs = [p.communicate(timeout=300) for p in ps]
    assert all('fine' in o for o,_ in outs), [e[-2000:] for _,e in outs]

# ---------------------------------------------------------------- memory
SCRIPT = '''
import json,sys
import torch
from torch import nn
from fastxtend_opt.algorithms.adam import Adam
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release
torch.set_num_threads(1)
def status(k): return int(next(l for l in open('/proc/self/status') if l.startswith(k)).split()[1])*1024
release,mode = sys.argv[1]=='True',sys.argv[2]
m = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(24)])
opt = Adam(m.parameters(), lr=1e-3, **({} if mode=='native' else {mode: True}))
if release: prepare_for_gradient_release(m, opt)
def step():
    m(torch.ones(1, 1024)).sum().backward()
    opt.step()
    for p in m.parameters(): p.grad = None
step()
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5') # the peak starts anew
step()
n = sum(p.numel() for p in m.parameters())
print(json.dumps(dict(n=n, gained=status('VmHWM')-before)))
'''

@pytest.mark.parametrize('mode', [*(pytest.param(m, marks=pytest.mark.slow) for m in ('native','jit')), 'fused'])
def test_peak_memory(mode):
    "Peak memory of a backward pass and a step, above what stays: 4 bytes of gradients per parameter are gone, a fourth of Adam's training"
    def peak(release): return json.loads(subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT, str(release), mode],
                                                        capture_output=True, text=True, check=True,
        env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}).stdout)
    a,b = peak(False),peak(True)
    saved = (a['gained']-b['gained'])/a['n']
    assert saved > 3.5, (a, b)
    assert saved/(12 + a['gained']/a['n']) >= .2
