"SAM and ASAM: davda54's numbers through pytorch_optimizer, a float64 reference, and the second pass in a Learner."
import copy,os,pickle,subprocess,sys
from functools import partial

import fastai.optimizer as fo,numpy as np,pytest,torch
from fastai.callback.core import CancelBackwardException,CancelBatchException,CancelStepException
from fastai.callback.fp16 import MixedPrecision,NonNativeMixedPrecision
from fastai.callback.schedule import ParamScheduler,SchedLin,lr_find
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.learner import Callback
from torch import nn
from torch.amp import GradScaler,autocast
from torch.nn import functional as F
from fastcore.all import L

from fastxtend_opt.algorithms.adahessian import AdaHessian
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.ranger import ranger
from fastxtend_opt.algorithms.sam import SAM,SAMPass,sam
from fastxtend_opt.algorithms.schedulefree import AdamWScheduleFree
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.algorithms.svrg import SVRG
from fastxtend_opt.tools.demo import digits_splitter
from fastxtend_opt.training.extra_pass import ExtraPass
from fastxtend_opt.training.gradient_release import GradientRelease,prepare_for_gradient_release
from fastxtend_opt.training.optimizer_accumulation import OptimizerAccumulation
from helpers import ALL_MODES,WithBackend,assert_bitwise,assert_same,backend_of,detach_copy,flags
from learner_utils import all_of,dropout_learner,fit

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # the last one never has a gradient
        self.body,self.head,self.unused = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8),
                                                        nn.Tanh()),nn.Linear(8, 3),nn.Linear(2, 2)
    def forward(self, x): return self.head(self.body(x))

def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)

def data(dtype=torch.float64, n=32):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=gen, dtype=torch.float64).to(dtype),torch.randint(0, 3, (n,), generator=gen)

def groups(m): return [list(m.body[0].parameters()), [*m.body[2].parameters(), *m.head.parameters(), *m.unused.parameters()]]

def closure_of(m, x, y):
    def f():
        for p in m.parameters(): p.grad = None
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        return loss
    return f

def weights(m): return [p.detach().clone() for p in m.parameters()]

# ---------------------------------------------------------------- the step
@pytest.mark.parametrize('adaptive', [False, True])
@pytest.mark.parametrize('base', ['sgd','adam'])
def test_against_pytorch_optimizer(base, adaptive):
    po = pytest.importorskip('pytorch_optimizer')
    ms,(x,y) = [net(),net()],data()
    rho = .7 if adaptive else .1
    if base=='sgd': mine,theirs,kw = SGD(ms[0].parameters(), .1, mom=.9),torch.optim.SGD,dict(lr=.1, momentum=.9)
    else: mine,theirs,kw = Adam(ms[0].parameters(), .01, sqr_mom=.999, eps=1e-8, wd=.1),torch.optim.AdamW,dict(lr=.01, weight_decay=.1)
    mine,theirs = SAM(mine, rho, adaptive),po.SAM(ms[1].parameters(), theirs, rho=rho, adaptive=adaptive, **kw)
    for _ in range(30):
        for m,o in zip(ms, (mine,theirs)):
            f = closure_of(m, x, y)
            f(); o.first_step(zero_grad=True)
            f(); o.second_step(zero_grad=True)
        assert_same(weights(ms[0]), weights(ms[1]), rtol=1e-7, atol=2e-8) # its norm is float32

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('adaptive', [False, True])
def test_against_a_reference_with_a_rho_a_group(adaptive, mode):
    "float64 numpy, the norm over both groups, each with its own rho; SGD with momentum as base"
    m,(x,y) = net(),data()
    with backend_of(mode): opt = SAM(SGD(groups(m), lr=[.1,.05], mom=.9, **flags(mode)), rho=[.05,.2], adaptive=adaptive)
    ps,rhos,lrs = [p for g in groups(m) for p in g],[.05]*2+[.2]*6,[.1]*2+[.05]*6
    theta,v = [p.detach().numpy().copy() for p in ps],[0.]*8
    ref,f = net(),None
    def grads(theta):
        for q,t in zip([p for g in groups(ref) for p in g], theta): q.data.copy_(torch.from_numpy(t))
        closure_of(ref, x, y)()
        return [None if q.grad is None else q.grad.numpy().copy() for q in [p for g in groups(ref) for p in g]]
    f = closure_of(m, x, y)
    for _ in range(10):
        f(); opt.step(f)
        g = grads(theta)
        n = np.sqrt(sum(((np.abs(t) if adaptive else 1)*d).__pow__(2).sum() for t,d in zip(theta, g) if d is not None)) + 1e-12
        g2 = grads([t if d is None else t + r/n*(t**2 if adaptive else 1)*d for t,d,r in zip(theta, g, rhos)])
        for i,(d,lr) in enumerate(zip(g2, lrs)):
            if d is not None: v[i] = .9*v[i] + d; theta[i] = theta[i] - lr*v[i]
        assert_same([p.detach().numpy() for p in ps], theta, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_norm_and_way_back(dtype):
    "The norm is float32's, and the weights come back bit for bit, with Kahan's compensation"
    p = nn.Parameter(torch.full((1024,), .5, dtype=dtype))
    opt = SAM(Adam([p], 1e-3), rho=1.)
    for i in range(3):
        p.grad = torch.full_like(p, 60.) # the sum of its squares is beyond float16
        before = p.detach().clone()
        opt.first_step()
        assert_same((p.detach()-before).double().norm().item(), 1., rtol=1e-6 if i==0 else .1) # at first all numbers are powers of two
        opt.restore()
        assert_bitwise(p.detach(), before)
        opt.step()
    assert 'kahan_comp' in opt.state[p]

def test_gradients_that_come_or_go_between_the_passes():
    a,b = nn.Parameter(torch.ones(2)),nn.Parameter(torch.ones(2))
    opt = SAM(SGD([a,b], .1), rho=.5)
    a.grad = torch.ones(2); opt.first_step(zero_grad=True)
    assert a.grad is None and not torch.equal(a, torch.ones(2))
    b.grad = torch.ones(2); opt.second_step()
    assert_same(a.detach(), torch.ones(2)); assert_same(b.detach(), torch.full((2,), .9), rtol=1e-6)

def test_zero_gradient_goes_nowhere():
    p = nn.Parameter(torch.ones(2)); p.grad = torch.zeros(2)
    opt = SAM(SGD([p], .1)); opt.first_step()
    assert torch.equal(p.detach(), torch.ones(2))
    opt.second_step()
    assert torch.equal(p.detach(), torch.ones(2))

@pytest.mark.parametrize('make', [lambda ps: Lookahead(Adam(ps, .05), k=3), lambda ps: fo.Adam(ps, .05),
                                  lambda ps: Lookahead(Adam(ps, .05, fused=True), k=3)], ids=['lookahead','fastai','fused'])
def test_round_others_and_resume_bit_exactly(make):
    (x,y),runs = data(),[]
    m = net(); opt = SAM(make(list(m.parameters())), rho=.1); f = closure_of(m, x, y)
    for _ in range(4): f(); opt.step(f)
    sd,w = detach_copy(opt.state_dict()),copy.deepcopy(m.state_dict())
    for _ in range(5): f(); opt.step(f)
    m2 = net(seed=3); m2.load_state_dict(w)
    opt2 = SAM(make(list(m2.parameters())), rho=.3)
    if 'slow_weights' in sd: sd['slow_weights'] = L(L(o) for o in sd['slow_weights'])
    sd['hypers'] = L(sd['hypers'])
    opt2.load_state_dict(sd); f = closure_of(m2, x, y)
    for _ in range(5): f(); opt2.step(f)
    assert_bitwise(weights(m), weights(m2))
    if isinstance(opt.opt, Lookahead): assert opt.opt.count==9

def test_state_of_a_training_without_sam_is_taken():
    p = nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    plain = Adam([p], .1); plain.step()
    opt = SAM(Adam([p], .1), rho=.2)
    opt.load_state_dict(plain.state_dict())
    assert opt.hypers[0]['sam_rho']==.2 and opt.state[p]['step']==1

def test_copies_and_pickles():
    m,(x,y) = net(),data()
    opt = SAM(Adam(m.parameters(), .05), rho=.1); f = closure_of(m, x, y); f(); opt.step(f)
    m2,opt2 = copy.deepcopy((m,opt)); m3,opt3 = pickle.loads(pickle.dumps((m,opt)))
    for a,o in ((m,opt),(m2,opt2),(m3,opt3)):
        f = closure_of(a, x, y); f(); o.step(f)
    assert_bitwise(weights(m), weights(m2)); assert_bitwise(weights(m), weights(m3))
    assert pickle.loads(pickle.dumps(sam(adam(), rho=.2)))(list(net().parameters()), lr=.1).hypers[0]['sam_rho']==.2

def test_what_is_refused():
    p = nn.Parameter(torch.ones(2)); opt = SAM(SGD([p], .1))
    with pytest.raises(RuntimeError, match='there is no second gradient'): opt.step()
    with pytest.raises(RuntimeError, match='there is no second gradient'): opt.second_step()
    with pytest.raises(ValueError, match='no parameter has a gradient'): opt.first_step()
    for o in (SAM(SGD([p], .1)), SVRG(SGD([p], .1)), Lookahead(SAM(SGD([p], .1)))):
        with pytest.raises(ValueError, match='SAM around (SAM|SVRG|Lookahead)'): SAM(o)
    with pytest.raises(ValueError, match='SAM around AdaHessian'): SAM(AdaHessian([p], .1))
    with pytest.raises(ValueError, match='schedule-free'): SAM(AdamWScheduleFree([p], .1))
    with pytest.raises(TypeError, match='got a SGD'): SAM(torch.optim.SGD([p], .1))
    for bad in (-1, float('nan'), '.1', True):
        with pytest.raises(ValueError, match='rho='): SAM(SGD([p], .1), rho=bad)
        with pytest.raises(ValueError, match='rho='): sam(sgd(), rho=bad)
    with pytest.raises(ValueError, match='2 values for 1 parameter group'): SAM(SGD([p], .1), rho=[.1,.2])
    p.grad = torch.ones(2); opt.first_step()
    with pytest.raises(RuntimeError, match='twice in a row'): opt.first_step()
    with pytest.raises(RuntimeError, match='between first_step and second_step'): opt.state_dict()
    with pytest.raises(ValueError, match='gradient release: SAM'): prepare_for_gradient_release(nn.Linear(2, 2), opt)

def test_a_closure_that_fails_leaves_the_weights():
    m,(x,y) = net(),data(); opt = SAM(SGD(m.parameters(), .1)); f = closure_of(m, x, y); f()
    w = weights(m)
    def bad(): f(); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): opt.step(bad)
    assert_bitwise(weights(m), w)
    assert opt.state_dict()['state'] is not None

def test_grad_scaler_in_a_plain_loop():
    "The scale makes no difference; an overflow in the second pass skips the step and halves the scale"
    (x,y),res = data(torch.float32),[]
    for scale in (1., 2.**10):
        m = net(torch.float32); opt,scaler = SAM(SGD(m.parameters(), .1, mom=.9), rho=.1),GradScaler('cpu', init_scale=scale,
            growth_interval=100)
        for i in range(6):
            opt.zero_grad(); scaler.scale(F.cross_entropy(m(x), y)).backward(); opt.first_step(zero_grad=True)
            scaler.scale(F.cross_entropy(m(x), y)).backward(); opt.restore()
            if i==3: m.head.weight.grad[0,0] = float('inf'); w = weights(m)
            scaler.step(opt); scaler.update()
            if i==3: assert_bitwise(weights(m), w); assert scaler.get_scale()==scale/2
        res.append(weights(m))
    assert_same(*res, rtol=1e-4, atol=1e-6)

# ---------------------------------------------------------------- in a Learner
learner = partial(dropout_learner, n_train=96)

class Seen(Callback):
    "What each backward pass gave, the batch, and the losses after the batch"
    run_valid,order = False,99
    def __init__(self): self.losses,self.grads = [],[]
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])
    def after_batch(self): self.losses.append(self.learn.loss.item())

def by_hand(n, lr, rho, mom=.9, clip=None, acc=None):
    "The training of `learner` with SAM around SGD as a plain loop: weights, statistics, losses and random state afterwards"
    learn = learner(sgd(), n_train=128)
    model,losses = learn.model,[]
    learn.create_opt()
    opt = SGD(learn.splitter(model), lr, mom=mom, wd=0.)
    bns = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.train()
    for _ in range(n):
        total = None
        for i,(x,y) in enumerate(learn.dls.train):
            start = torch.get_rng_state()
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            gs = torch.autograd.grad(loss, list(model.parameters()))
            after = torch.get_rng_state()
            norm = torch.cat([g.flatten() for g in gs]).norm()
            old,stats = [p.detach().clone() for p in model.parameters()],[(m.running_mean.clone(), m.running_var.clone(),
                                                                           m.num_batches_tracked.clone()) for m in bns]
            with torch.no_grad():
                for p,g in zip(model.parameters(), gs): p.add_(g, alpha=float(rho/(norm+1e-12)))
            torch.set_rng_state(start)
            gs = torch.autograd.grad(F.cross_entropy(model(x), y)*(1 if acc is None else len(x)/acc), list(model.parameters()))
            torch.set_rng_state(after)
            with torch.no_grad():
                for p,o in zip(model.parameters(), old): p.copy_(o)
                for m,(a,b,c) in zip(bns, stats): m.running_mean.copy_(a); m.running_var.copy_(b); m.num_batches_tracked.copy_(c)
            total = list(gs) if total is None else [a+b for a,b in zip(total, gs)]
            if acc and (i+1)*len(x)%acc: continue
            for p,g in zip(model.parameters(), total): p.grad = g
            total = None
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
        for _ in learn.dls.valid: pass # which takes a random number too
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())],losses

@pytest.mark.parametrize('kw,cbs', [({}, ()), (dict(clip=.1), (GradientClip(.1),)), (dict(acc=64), (GradientAccumulation(64),)),
                                    (dict(acc=64, clip=.1), (GradientAccumulation(64),GradientClip(.1)))],
                         ids=['plain','clip','accumulation','both'])
def test_learner_is_the_loop_by_hand(kw, cbs):
    "Same batch and dropout in both passes, statistics and losses of the first one, accumulation and clipping of the second gradient"
    ref,losses = by_hand(2, .1, .3, **kw)
    seen = Seen()
    learn = fit(learner(sam(sgd(mom=.9), rho=.3), [*map(copy.copy, cbs), seen], n_train=128), 2)
    assert_same(seen.losses, losses, rtol=1e-4, atol=1e-5)
    assert_same(all_of(learn), ref, rtol=1e-3, atol=1e-4)

def test_nobody_notices():
    "With rho=0: weights, statistics, random numbers and recorded losses of a training without SAM, to the last bit"
    runs = []
    for f in (adam(), sam(adam(), rho=0.)):
        learn = fit(learner(f, [Seen()]), 2)
        runs.append((all_of(learn), learn.seen.losses, learn.recorder.losses, torch.get_rng_state(), [v for v in learn.recorder.values]))
    assert_bitwise(runs[0][0], runs[1][0]); assert runs[0][1]==runs[1][1]
    assert_bitwise(runs[0][2], runs[1][2]); assert torch.equal(runs[0][3], runs[1][3]); assert_same(runs[0][4], runs[1][4])

@pytest.mark.parametrize('mode', ['foreach','fused'])
def test_modes_in_a_learner(mode):
    a,b = (fit(learner(WithBackend(sam(adam(**flags(m))), m)), 1, .01) for m in ('native', mode))
    assert_same(all_of(a), all_of(b), rtol=1e-4, atol=1e-5)

def test_the_callback_comes_once_and_serves_any_opt():
    learn = fit(learner(sam(ranger())))
    fit(learn)
    assert len([c for c in learn.cbs if isinstance(c, SAMPass)])==1
    learn.opt_func,learn.opt = adam(),None # SAM is gone, its callback does nothing
    ref = learner(adam()); ref.model.load_state_dict(learn.model.state_dict())
    torch.manual_seed(5); fit(learn)
    learn.opt_func,learn.opt = sam(adam(decouple_lr=True, wd=1e-5)),None
    fit(learn)
    assert hasattr(learn, 'max_lr') and learn.opt.decouple_lr

def test_one_cycle_frozen_groups_and_lr_find(tmp_path):
    from fastxtend_opt.tools.demo import digits_splitter
    learn = learner(sam(adam(fused=True)), path=tmp_path, splitter=lambda m: digits_splitter(m[0]))
    learn.freeze()
    frozen = [p.detach().clone() for p in learn.opt.param_lists[0]]
    with learn.no_bar(): learn.fit_one_cycle(1, 1e-2)
    trained = {id(p) for p in learn.opt.param_lists[0] if p.requires_grad}
    assert all(torch.equal(a, p.detach()) for a,p in zip(frozen, learn.opt.param_lists[0]) if id(p) not in trained)
    learn.unfreeze()
    with learn.no_bar(): learn.fit_one_cycle(1, slice(1e-3,1e-2))
    before,state = all_of(learn),detach_copy(learn.opt.state_dict()['state'])
    with learn.no_bar(): learn.lr_find(num_it=8, show_plot=False, stop_div=False)
    assert_bitwise(all_of(learn), before); assert_bitwise(detach_copy(learn.opt.state_dict()['state']), state)

def test_rho_has_a_schedule():
    learn = learner(sam(sgd(), rho=.1))
    seen = []
    class Rho(Callback):
        order = 61
        def before_batch(self):
            if self.training: seen.append(self.opt.hypers[0]['sam_rho'])
    fit(learn, 1, cbs=[ParamScheduler({'sam_rho': SchedLin(.3, 0.)}), Rho()])
    assert seen[0]==pytest.approx(.3) and seen[-1]<.15

@pytest.mark.parametrize('mode', ['native','fused'])
def test_save_and_load_in_the_middle_is_bit_exact(tmp_path, mode):
    f = WithBackend(sam(adam(**flags(mode)), rho=.2), mode)
    a = fit(learner(f, path=tmp_path), 1, .01)
    rng = torch.get_rng_state(); a.save('mid')
    def go(learn):
        torch.set_rng_state(rng); learn.dls.train.rng.seed(7)
        return all_of(fit(learn, 1, .01))
    ra = go(a)
    b = learner(f, path=tmp_path); b.create_opt(); b.load('mid')
    assert_bitwise(ra, go(b))

class Fail(Callback):
    "Raises `ex` in the second pass of a batch"
    def __init__(self, ex, at=1, event='after_loss'): self.ex,self.at,self.n,self.start = ex,at,0,None
    def before_batch(self):
        if not self.training: return
        self.n,self.iters = 0,getattr(self, 'iters', -1) + 1
        if self.iters==self.at: self.start = [p.detach().clone() for p in self.learn.model.parameters()]
    def after_loss(self):
        if not self.training: return
        self.n += 1
        if self.n==2 and self.iters==self.at:
            assert not torch.equal(next(self.learn.model.parameters()), self.start[0])
            raise self.ex

@pytest.mark.parametrize('ex', [CancelBatchException, CancelStepException, KeyboardInterrupt, RuntimeError('boom')], ids=str)
def test_interrupted_between_the_passes(ex):
    "Weights, statistics and random state are restored, and training continues"
    fail = Fail(ex)
    learn = learner(sam(sgd(mom=.9), rho=1.), [fail])
    try: fit(learn)
    except (KeyboardInterrupt, RuntimeError, CancelStepException): assert not isinstance(ex, type) or ex is not CancelBatchException
    if ex is not CancelBatchException: assert_bitwise([p.detach() for p in learn.model.parameters()], fail.start)
    assert all(m.track_running_stats for m in learn.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    learn.remove_cb(fail)
    learn.opt.state_dict()
    fit(learn)

@pytest.mark.parametrize('event', ['before_backward','before_step'])
def test_cancelled_backward_and_step(event):
    "A cancelled backward pass steps with the gradients there are, as in fastai; a cancelled step leaves the weights"
    class Cancel(Callback):
        run_valid,order = False,9
        n = 0
        def _go(self, ex):
            self.n += 1
            if self.n==2: self.w = [p.detach().clone() for p in self.learn.model.parameters()]; raise ex
        def before_backward(self):
            if event=='before_backward': self._go(CancelBackwardException)
        def before_step(self):
            if event=='before_step': self._go(CancelStepException)
        def after_step(self):
            if event=='before_step' and self.n==2: assert_bitwise([p.detach() for p in self.learn.model.parameters()], self.w); self.n += 1
    Cancel.extra_pass = False
    fit(learner(sam(sgd(mom=.9)), [Cancel()]))

class CPUMixed(MixedPrecision):
    "Mixed precision on the CPU, with a real scaler"
    def __init__(self, dtype=torch.bfloat16, scale=2.**10): super().__init__('fp16'); self.dt,self.scale = dtype,scale
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = autocast('cpu', dtype=self.dt),GradScaler('cpu',
        init_scale=self.scale, growth_interval=1000),L()
    name = 'mixed_precision'

def test_mixed_precision():
    "Both passes under autocast, whose dtype the layers see; the scale, a power of two, makes no difference"
    dtypes = []
    class Look(Callback):
        run_valid = False
        def before_fit(self): self.h = self.learn.model[0][0].register_forward_hook(lambda m,i,
            o: dtypes.append((o[0] if isinstance(o, tuple) else o).dtype) if self.learn.training else None)
        def after_fit(self): self.h.remove()
    a,b = (fit(learner(sam(sgd(mom=.9), rho=.2), [CPUMixed(scale=s), Look()])) for s in (1., 2.**12))
    assert set(dtypes)=={torch.bfloat16} and len(dtypes)==2*2*3
    assert_same(all_of(a), all_of(b), rtol=1e-3, atol=1e-4)
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('which', [1, 2])
def test_overflow_in_either_pass_skips_the_step(which):
    scales = []
    class Inf(Callback):
        "Makes one of the passes of the second batch overflow"
        run_valid,order = False,50
        n = 0
        def before_batch(self): self.k = 0; self.n += 1; self.w = [p.detach().clone() for p in self.learn.model.parameters()]
        def before_backward(self):
            self.k += 1
            if self.n==2 and self.k==which: self.learn.loss_grad = self.learn.loss_grad*float('inf')
        def after_batch(self):
            scales.append(self.learn.scaler.get_scale())
            same = all(torch.equal(a, p) for a,p in zip(self.w, self.learn.model.parameters()))
            assert same==(self.n==2)
            assert all(t.isfinite().all() for t in (*self.learn.model.parameters(), *self.learn.model.buffers()))
    fit(learner(sam(sgd(mom=.9), rho=.2), [CPUMixed(scale=1024.), Inf()]))
    assert scales==[1024., 512., 512.]

def test_optimizer_accumulation():
    learn = fit(learner(sam(adam(fused=True), rho=.1), [OptimizerAccumulation(64)], n_train=128))
    assert learn.opt.state_dict()['state'][0]['step']==4

@pytest.mark.parametrize('cb,words', [(GradientRelease(), 'gradient release: SAM'),
                                      (NonNativeMixedPrecision(), 'non-native mixed precision')], ids=['release','non-native'])
def test_learner_refuses(cb, words):
    if isinstance(cb, NonNativeMixedPrecision): cb.before_fit = lambda: None # it wants a GPU
    with pytest.raises((ValueError,AssertionError), match=words): fit(learner(sam(sgd()), [cb]))

class Stateful(nn.Module):
    "Carries its hidden state from batch to batch, as fastai's AWD-LSTM does"
    def __init__(self):
        super().__init__()
        self.emb,self.rnn,self.out,self.hidden = nn.Embedding(20, 8),nn.LSTM(8, 8, batch_first=True),nn.Linear(8, 20),None
    def reset(self): self.hidden = None
    def forward(self, x):
        o,h = self.rnn(F.dropout(self.emb(x), .2, self.training), self.hidden)
        self.hidden = tuple(t.detach() for t in h)
        return self.out(o),o,o

def test_recurrent_models_go_on_from_where_the_first_pass_began():
    "A regularizer that adds to the loss also counts in the second pass"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.callback.rnn import rnn_cbs
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    res = []
    for f in (sgd(), sam(sgd(), rho=0.)):
        torch.manual_seed(0)
        toks = torch.randint(0, 20, (40, 7))
        dl = DataLoader([(t[:-1], t[1:]) for t in toks], bs=8, shuffle=False, num_workers=0)
        learn = Learner(DataLoaders(dl, dl), Stateful(), loss_func=CrossEntropyLossFlat(), opt_func=f, cbs=rnn_cbs(alpha=2., beta=1.))
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .1)
        res.append((all_of(learn), learn.recorder.losses))
    assert_bitwise(res[0][0], res[1][0]); assert_bitwise(res[0][1], res[1][1])

DDP = '''
import os,sys,torch,torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method='file://'+sys.argv[2], rank=rank, world_size=2)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastxtend_opt.algorithms.sam import SAM,sam
from fastxtend_opt.algorithms.sgd import sgd
torch.manual_seed(0)
x,y = torch.randn(32, 6),torch.randint(0, 3, (32,))
m = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
mine = [(a,b) for a,b in zip(x[rank::2], y[rank::2])]
dl = DataLoader(mine, bs=8, shuffle=False, num_workers=0)
learn = Learner(DataLoaders(dl, dl), DistributedDataParallel(m), loss_func=F.cross_entropy, opt_func=sam(sgd(mom=.9), rho=.5))
with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
# the same by hand, in each process for both
torch.manual_seed(0); torch.randn(32, 6); torch.randint(0, 3, (32,))
r = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
vs = [torch.zeros_like(p) for p in r.parameters()]
for i in range(2):
    tot = [torch.zeros_like(p) for p in r.parameters()]
    for k in range(2):
        bx,by = x[k::2][i*8:i*8+8],y[k::2][i*8:i*8+8]
        g = torch.autograd.grad(F.cross_entropy(r(bx), by), list(r.parameters()))
        n = torch.cat([o.flatten() for o in g]).norm()
        with torch.no_grad():
            for p,o in zip(r.parameters(), g): p.add_(o*.5/n)
        h = torch.autograd.grad(F.cross_entropy(r(bx), by), list(r.parameters()))
        with torch.no_grad():
            for p,o in zip(r.parameters(), g): p.sub_(o*.5/n)
        for t,o in zip(tot, h): t.add_(o/2)
    with torch.no_grad():
        for p,v,t in zip(r.parameters(), vs, tot): v.mul_(.9).add_(t); p.sub_(v, alpha=.1)
for p,q in zip(m.parameters(), r.parameters()): assert torch.allclose(p, q, atol=1e-5), (p-q).abs().max()
others = [torch.zeros_like(p) for p in m.parameters()]
for o,p in zip(others, m.parameters()): o.copy_(p.detach()); dist.broadcast(o, 0); assert torch.equal(o, p.detach())
print('fine')
dist.destroy_process_group()
'''

@pytest.mark.slow
def test_two_processes(tmp_path):
    "Each process moves by its own batch's gradient, the second gradients are averaged, and the replicas stay equal"
    ps = [subprocess.Popen([sys.executable, '-c', DDP, str(r), str(tmp_path/'rendezvous')], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True) for r in (0,1)]
    outs = [p.communicate(timeout=300)[0] for p in ps]
    assert all(p.returncode==0 and 'fine' in o for p,o in zip(ps, outs)), '\n'.join(outs)
