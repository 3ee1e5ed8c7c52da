"SVRG: a float64 reference, its convergence, and snapshots and second passes in a Learner."
import copy,pickle

import fastai.optimizer as fo,numpy as np,pytest,random,torch
from fastai.callback.core import CancelBackwardException,CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import lr_find
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Callback
from torch import nn
from torch.amp import autocast
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from fastcore.all import L

from fastxtend_opt.algorithms.adahessian import AdaHessian
from fastxtend_opt.algorithms.adam import Adam,adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.sam import SAM
from fastxtend_opt.algorithms.schedulefree import SGDScheduleFree
from fastxtend_opt.algorithms.sgd import SGD,sgd
from fastxtend_opt.algorithms.svrg import SVRG,SVRGPass,svrg
from fastxtend_opt.training.gradient_release import GradientRelease,prepare_for_gradient_release
from helpers import ALL_MODES,WithBackend,assert_bitwise,assert_same,backend_of,detach_copy,flags
from learner_utils import all_of,dropout_learner as learner,fit
from reference.svrg import SVRG as Reference

gen = torch.Generator().manual_seed(0)
X,NOISE = torch.randn(96, 5, generator=gen, dtype=torch.float64),torch.randn(96, generator=gen, dtype=torch.float64)
Y = X@torch.randn(5, generator=gen, dtype=torch.float64) + NOISE
ALL = np.arange(96)
BEST = torch.linalg.lstsq(X, Y[:,None]).solution[:,0].numpy()
def grad(w, i): x,y = X.numpy()[i],Y.numpy()[i]; return 2*x.T@(x@w-y)/len(x)
def batches(epoch, bs=8): return np.random.RandomState(epoch).permutation(96).reshape(-1, bs)

def backward(p, i):
    p.grad = None
    ((X[i]@p-Y[i])**2).mean().backward()

def take_snapshot(opt, p, bs=32):
    with opt.snapshot() as add:
        for i in ALL.reshape(-1, bs): backward(p, i); add(len(i))

def run(opt, p, epochs, first=0, visit=None):
    for e in range(first, first+epochs):
        take_snapshot(opt, p)
        for i in batches(e):
            backward(p, i)
            if visit: visit(opt, p, i)
            else: opt.step(lambda: backward(p, i))

# ---------------------------------------------------------------- the step
@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('coef', [1., .75])
def test_against_the_reference(mode, coef):
    p,ref = nn.Parameter(torch.zeros(5, dtype=torch.float64)),None
    with backend_of(mode): opt = SVRG(SGD([p], lr=.02, mom=.5, **flags(mode)), coef)
    for e in range(3):
        take_snapshot(opt, p)
        if ref is None: ref = Reference(np.zeros(5), grad, ALL, coef, .5)
        else: ref.snapshot()
        assert_same(opt.snap_grad[0].numpy(), ref.mu, rtol=1e-9, atol=1e-12)
        for k,i in enumerate(batches(e)):
            backward(p, i)
            if k%2: opt.step(lambda: backward(p, i))
            else:
                with opt.at_snapshot(): backward(p, i)
                opt.correct(); opt.step()
            ref.step(i, .02)
            assert_same(p.detach().numpy(), ref.w, rtol=1e-9, atol=1e-12)

def test_it_converges_where_sgd_does_not():
    "At a constant learning rate"
    d = {}
    for c in (0.,1.):
        p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        run(SVRG(SGD([p], lr=.05), c), p, 30)
        d[c] = np.abs(p.detach().numpy()-BEST).max()
    assert d[1.] < 1e-6 and d[0.] > 1e-2

def test_gradients_of_the_model_are_left_alone_by_snapshot_and_swap():
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64)); opt = SVRG(SGD([p], .02))
    backward(p, ALL[:8]); g,w,ptr = p.grad,p.detach().clone(),p.data_ptr()
    take_snapshot(opt, p)
    assert p.grad is g and torch.equal(p, w)
    p.data += 1; w = p.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        with opt.at_snapshot():
            assert p.grad is None and not torch.equal(p, w)
            raise KeyboardInterrupt
    assert p.grad is g and torch.equal(p, w) and p.data_ptr()==ptr
    snap = opt.snap_grad
    with pytest.raises(KeyboardInterrupt):
        with opt.snapshot() as add: backward(p, ALL[:8]); add(8); raise KeyboardInterrupt
    assert opt.snap_grad is snap and p.grad is g

def test_accumulated_micro_batches():
    "Two halves are the whole batch"
    ps = [nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2)]
    opts = [SVRG(SGD([p], .02, mom=.9)) for p in ps]
    for p,o in zip(ps, opts): take_snapshot(o, p)
    for i in batches(0):
        opts[0].zero_grad(); backward(ps[0], i); opts[0].step(lambda: backward(ps[0], i))
        opts[1].zero_grad()
        for h in (i[:4], i[4:]):
            (((X[h]@ps[1]-Y[h])**2).mean()/2).backward()
            with opts[1].at_snapshot(): (((X[h]@ps[1]-Y[h])**2).mean()/2).backward()
        opts[1].step()
        assert_same(ps[1].detach(), ps[0].detach(), rtol=1e-9, atol=1e-12)

def test_frozen_and_unused_parameters():
    a,b,c = (nn.Parameter(torch.ones(2)) for _ in range(3)); opt = SVRG(SGD([a,b,c], .1, wd=.1))
    with opt.snapshot() as add: (a.sum()+b.sum()).backward(); add(1)
    b.requires_grad_(False); b.grad = torch.zeros(2)
    a.grad = None; a.sum().backward()
    with opt.at_snapshot(): a.sum().backward()
    opt.correct()
    assert torch.equal(b.grad, torch.zeros(2)) and c.grad is None

@pytest.mark.parametrize('make', [lambda p: Adam([p], .05), lambda p: Lookahead(Adam([p], .05, fused=True), k=3),
                                  lambda p: fo.Adam([p], .05)], ids=['adam','lookahead','fastai'])
def test_resume_is_bit_exact(make):
    "In the middle of an epoch"
    def go(opt, p, part, e=0):
        for i in batches(e)[part]: backward(p, i); opt.step(lambda: backward(p, i))
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64)); opt = SVRG(make(p), .5)
    take_snapshot(opt, p); go(opt, p, slice(0, 5))
    sd,w = detach_copy(opt.state_dict()),p.detach().clone()
    o2,p2 = copy.deepcopy((opt,p)); o3,p3 = pickle.loads(pickle.dumps((opt,p)))
    go(opt, p, slice(5, 12))
    p4 = nn.Parameter(w); o4 = SVRG(make(p4), 1.)
    if 'slow_weights' in sd: sd['slow_weights'] = L(L(o) for o in sd['slow_weights'])
    sd['hypers'] = L(sd['hypers'])
    o4.load_state_dict(sd)
    assert 'snap_p' in sd
    for o,q in ((o2,p2),(o3,p3),(o4,p4)): go(o, q, slice(5, 12)); assert_bitwise(q.detach(), p.detach())
    opt.clear_state()
    assert opt.snap_p is None and opt.coef==.5

def test_what_is_refused():
    p = nn.Parameter(torch.ones(5)); opt = SVRG(SGD([p], .1))
    p.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match='there is no second gradient'): opt.step()
    with pytest.raises(RuntimeError, match='there is no snapshot'):
        with opt.at_snapshot(): pass
    with pytest.raises(ValueError, match='was not called'):
        with opt.snapshot(): pass
    with pytest.raises(ValueError, match='bs=0'):
        with opt.snapshot() as add: add(0)
    for bad in (-1, float('nan'), (.5,-1)):
        with pytest.raises(ValueError, match='coef='): SVRG(SGD([p], .1), bad)
        with pytest.raises(ValueError, match='coef='): svrg(sgd(), bad)
    for o in (SVRG(SGD([p], .1)), SAM(SGD([p], .1))):
        with pytest.raises(ValueError, match='SVRG around (SAM|SVRG)'): SVRG(o)
    with pytest.raises(ValueError, match='around AdaHessian'): SVRG(AdaHessian([p], .1))
    with pytest.raises(ValueError, match='schedule-free'): SVRG(SGDScheduleFree([p]))
    with pytest.raises(TypeError, match='got a SGD'): SVRG(torch.optim.SGD([p], .1))
    with pytest.raises(ValueError, match='gradient release: SAM and SVRG'): prepare_for_gradient_release(nn.Linear(2, 2), opt)
    other = nn.Parameter(torch.ones(4)); a = SVRG(SGD([other], .1)); other.grad = torch.ones(4)
    with a.snapshot() as add: other.sum().backward(); add(1)
    with pytest.raises(ValueError, match='different shapes'): opt.load_state_dict(a.state_dict())
    assert opt.snap_p is None

# ---------------------------------------------------------------- in a Learner

class Seen(Callback):
    run_valid,order = False,99
    def __init__(self): self.losses,self.coefs = [],[]
    def after_batch(self): self.losses.append(self.learn.loss.item()); self.coefs.append(getattr(self.learn.opt, 'coef', None))

def stats(model): return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

def by_hand(n, lr, coefs, clip=None, acc=None):
    "The same training as a plain loop of torch"
    learn = learner(sgd()); m = learn.model; m.train()
    opt,ps,losses,k = SGD(learn.splitter(m), lr, mom=.9, wd=0.),list(m.parameters()),[],0
    def quiet(x, y, scale=1.):
        for b in stats(m): b.track_running_stats = False
        g = torch.autograd.grad(F.cross_entropy(m(x), y)*scale, ps)
        for b in stats(m): b.track_running_stats = True
        return g
    for _ in range(n):
        rng = torch.get_rng_state()
        full = learn.dls.train.new(shuffle=False, drop_last=False)
        mu = [torch.zeros_like(p) for p in ps]; total = 0
        for x,y in full:
            for a,g in zip(mu, quiet(x, y)): a.add_(g, alpha=len(x))
            total += len(x)
        mu = [a/total for a in mu]
        torch.set_rng_state(rng)
        snap,part = [p.detach().clone() for p in ps],None
        for i,(x,y) in enumerate(learn.dls.train):
            c = coefs[k]; k += 1
            scale = len(x)/acc if acc else 1.
            start = torch.get_rng_state()
            loss = F.cross_entropy(m(x), y); losses.append(loss.item())
            g = torch.autograd.grad(loss*scale, ps)
            after = torch.get_rng_state()
            now = [p.detach().clone() for p in ps]
            with torch.no_grad(): [p.copy_(s) for p,s in zip(ps, snap)]
            torch.set_rng_state(start); b = quiet(x, y, scale); torch.set_rng_state(after)
            with torch.no_grad(): [p.copy_(s) for p,s in zip(ps, now)]
            d = [*g, *(q-scale*u for q,u in zip(b, mu))]
            part = d if part is None else [o+q for o,q in zip(part, d)]
            if acc and (i+1)*len(x)%acc: continue
            for p,a,q in zip(ps, part, part[len(ps):]): p.grad = a - c*q # the coefficient is the step's
            part = None
            if clip: nn.utils.clip_grad_norm_(ps, clip)
            opt.step()
        for _ in learn.dls.valid: pass
    return [t.detach().clone() for t in (*m.parameters(), *m.buffers())],losses

@pytest.mark.parametrize('kw,cbs,coef', [({}, (), 1.), ({}, (), (.75,0.)),
    (dict(acc=64, clip=.2), (GradientAccumulation(64),GradientClip(.2)), (.75,0.))], ids=['one','falling','accumulated and clipped'])
def test_learner_is_the_loop_by_hand(kw, cbs, coef):
    "Snapshots, dropout of both passes, statistics, schedule, accumulation, clipping of the corrected gradient"
    seen = Seen()
    learn = fit(learner(svrg(sgd(mom=.9), coef), [*map(copy.copy, cbs), seen]), 2, .05)
    coefs = [1.]*8 if coef==1. else [.75*(1-i/8) for i in range(8)]
    assert_same(seen.coefs, coefs, rtol=1e-6)
    ref,losses = by_hand(2, .05, coefs, **kw)
    assert_same(seen.losses, losses, rtol=1e-3, atol=1e-4)
    assert_same(all_of(learn), ref, rtol=1e-3, atol=1e-4)

def test_nobody_notices():
    "With a correction of 1e-30 the full passes are made, and the training is that of Adam, to rounding; the random numbers exactly"
    runs = []
    for f in (adam(), svrg(adam(), 1e-30)):
        random.seed(3); np.random.seed(4)
        learn = fit(learner(f, [Seen()]), 2)
        runs.append((all_of(learn), learn.seen.losses, torch.get_rng_state(), random.random(), np.random.rand()))
    assert_same(runs[0][:2], runs[1][:2], rtol=1e-5, atol=1e-6)
    assert torch.equal(runs[0][2], runs[1][2]) and runs[0][3:]==runs[1][3:]

@pytest.mark.parametrize('k,at', [(None, [0,4]), (3, [0,3,6])])
def test_when_snapshots_are_taken(k, at):
    taken = []
    class Look(SVRGPass):
        def _full_pass(self, svrg): taken.append(self.learn.train_iter); super()._full_pass(svrg)
    fit(learner(svrg(sgd()), [Look(k)]), 2)
    assert taken==at

def test_the_callback_comes_once_and_serves_any_opt():
    learn = fit(learner(svrg(adam(fused=True))))
    fit(learn)
    assert len([c for c in learn.cbs if isinstance(c, SVRGPass)])==1
    learn.opt_func,learn.opt = adam(),None
    fit(learn)

def test_save_load_lr_find(tmp_path):
    learn = fit(learner(svrg(adam()), path=tmp_path), 1, .01)
    before,state = all_of(learn),detach_copy({k:v for k,v in learn.opt.state_dict().items() if k!='hypers'})
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
    assert_bitwise(all_of(learn), before); assert_bitwise(detach_copy({k:v for k,v in learn.opt.state_dict().items() if k!='hypers'}),
                                                          state)
    learn.save('a'); rng = torch.get_rng_state()
    def go(l): torch.set_rng_state(rng); l.dls.train.rng.seed(3); return all_of(fit(l, 1, .01))
    ref = go(learn)
    other = learner(svrg(adam()), path=tmp_path); other.create_opt(); other.load('a')
    assert_bitwise(detach_copy(other.opt.snap_p), state['snap_p'])
    assert_bitwise(go(other), ref)

@pytest.mark.parametrize('ex', [CancelBackwardException, CancelStepException])
def test_cancelled(ex):
    class Cancel(Callback):
        run_valid,order,n,extra_pass = False,7,0,False
        def before_backward(self):
            self.n += 1
            if self.n==2 and ex is CancelBackwardException: raise ex
        def before_step(self):
            if self.n==2 and ex is CancelStepException: raise ex
    learn = fit(learner(svrg(sgd()), [Cancel()]))
    assert learn.opt._batch is None

def test_interrupted_in_the_full_pass_or_the_second():
    class Fail(Callback):
        n = 0
        def after_loss(self):
            if not self.training: return
            self.n += 1
            if self.n==self.at: raise KeyboardInterrupt
    for at in (2, 6): # the second of four batches of the full pass; the second pass of the first batch
        fail = Fail(); fail.at = at
        learn = learner(svrg(sgd()), [fail]); w = [p.detach().clone() for p in learn.model.parameters()]
        with pytest.raises(KeyboardInterrupt): fit(learn)
        assert_bitwise([p.detach() for p in learn.model.parameters()], w)
        assert all(m.track_running_stats for m in stats(learn.model))
        learn.remove_cb(fail); fit(learn)

class CPUMixed(MixedPrecision):
    "bfloat16 under the CPU's autocast"
    def __init__(self): super().__init__('bf16')
    def before_fit(self): super().before_fit(); self.autocast = autocast('cpu', dtype=torch.bfloat16)
    name = 'mixed_precision'

@pytest.mark.filterwarnings('ignore')
def test_bfloat16_mixed_precision():
    learn = fit(learner(svrg(sgd(mom=.9)), [CPUMixed()]), 3)
    assert not torch.is_autocast_enabled('cpu') and learn.recorder.losses[-1] < learn.recorder.losses[0]

@pytest.mark.parametrize('cb,words', [(MixedPrecision(), 'float16'), (MixUp(), "MixUp: the mean gradient"),
    (GradientRelease(), "can't work with GradientRelease|gradient release: SAM")], ids=['fp16','mixup','release'])
def test_learner_refuses(cb, words):
    with pytest.raises(ValueError, match=words): fit(learner(svrg(sgd()), [cb]))

def test_refuses_ddp_and_other_dataloaders():
    learn = learner(svrg(sgd()))
    learn.create_opt()
    cb = next(o for o in learn.cbs if isinstance(o, SVRGPass))
    learn.model = DistributedDataParallel.__new__(DistributedDataParallel) # enough for `isinstance`
    with pytest.raises(ValueError, match='DistributedDataParallel: the pass over all data'): cb.before_train()
    learn.dls = DataLoaders(*(torch.utils.data.DataLoader([(torch.ones(1),torch.ones(1))]) for _ in range(2)))
    with pytest.raises(TypeError, match='needs a fastai DataLoader'): cb.before_fit()
