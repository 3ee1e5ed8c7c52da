"Sophia's estimate in a Learner: when, from what, and without a trace in the training."
import copy,re

import numpy as np,pytest,torch
from fastai.callback.core import CancelStepException
from fastai.callback.fp16 import MixedPrecision,NonNativeMixedPrecision
from fastai.callback.schedule import lr_find
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Callback,Learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,FocalLossFlat,LabelSmoothingCrossEntropyFlat,MSELossFlat
from functools import partial
from torch import nn
from torch.amp import GradScaler,autocast
from torch.nn import functional as F
from fastcore.all import L

import fastxtend_opt.algorithms.sophia as S
from fastxtend_opt.algorithms.adam import adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.algorithms.sam import SAMPass,sam
from fastxtend_opt.algorithms.sophia import Sophia,SophiaEstimate,sampled_binary_cross_entropy,sampled_cross_entropy,sophia,update_hessian
from fastxtend_opt.tools.demo import digits_splitter
from fastxtend_opt.training.gradient_release import GradientRelease
from fastxtend_opt.training.optimizer_accumulation import OptimizerAccumulation
from helpers import assert_bitwise,assert_same,detach_copy,flags
from learner_utils import all_of,dropout_learner as learner,fit

fit = partial(fit, lr=0.01)
def hessians(opt): return [s.get('hessian') for s in opt.state_dict()['state']]
def nothing(pred, *yb): return pred.sum(),0

class Spy(SophiaEstimate):
    "Says when it estimated, from what gradients and with which bs"
    at = ()
    def _estimate(self):
        real,self.at = S.update_hessian,[*self.at, self.learn.train_iter]
        def _update(opt, bs):
            self.bs,self.grads = bs,[None if p.grad is None else p.grad.clone() for pg in opt.param_lists for p in pg]
            real(opt, bs)
        S.update_hessian = _update
        try: return super()._estimate()
        finally: S.update_hessian = real

# ---------------------------------------------------------------- when
@pytest.mark.parametrize('k', [1, 3, 10])
def test_every_k_steps(k):
    "At the first step and each k-th after it, from fit to fit; the predecessor's never fired"
    spy = Spy(k)
    learn = fit(learner(sophia(), [spy]), 2)
    assert spy.at==list(range(0, 8, k))
    fit(learn, 1)
    assert len(spy.at)==len(range(0, 12, k))

def test_accumulated_batches_count_once():
    spy = Spy(2)
    fit(learner(sophia(), [spy,GradientAccumulation(64)], n_train=256))
    assert spy.at==[1,5] and spy.bs==32

def test_after_unfreezing_the_new_have_an_estimate_at_once():
    spy = Spy(100)
    learn = learner(sophia(), [spy], splitter=lambda m: digits_splitter(m[0]))
    learn.freeze(); fit(learn)
    learn.unfreeze(); fit(learn)
    assert spy.at==[0,0]
    assert all(h is not None and h.sum()>0 for h in hessians(learn.opt))

def test_it_comes_by_itself_and_once():
    learn = fit(learner(sophia(decouple_lr=True, wd=1e-5)))
    fit(learn)
    assert [type(c).__name__ for c in learn.cbs].count('SophiaEstimate')==1 and hasattr(learn, 'max_lr')
    learn.opt_func,learn.opt = adam(),None
    fit(learn)
    assert all('hess_age' not in h for h in learn.opt.hypers)

# ---------------------------------------------------------------- what
def test_the_estimate_is_that_of_the_formula():
    "bs times the square of the sampled labels' gradient, for the present weights, statistics frozen"
    spy = Spy(1)
    learn = fit(learner(sophia(), [spy], n_train=32))
    assert spy.bs==32
    for h,g in zip(hessians(learn.opt), spy.grads): assert_same(h, .01*32*g**2, rtol=1e-5, atol=1e-12)

def test_the_mean_over_draws_is_the_fisher_diagonal():
    "For a linear model: h_jc = mean of p_c(1-p_c) x_j^2, the Hessian of the cross entropy itself"
    gen = torch.Generator().manual_seed(0)
    x,m = torch.randn(64, 4, generator=gen, dtype=torch.float64),nn.Linear(4, 3, bias=False).double()
    with torch.no_grad(): p = F.softmax(m(x), 1)
    exact,total,n = torch.einsum('nc,nj->cj', p*(1-p), x**2)/64,0,3000
    torch.manual_seed(0)
    for _ in range(n):
        loss,bs = sampled_cross_entropy(m(x).float().double(), torch.zeros(64, dtype=torch.long))
        g, = torch.autograd.grad(loss, m.weight)
        total = total + bs*g**2/n
    assert_same(total, exact, rtol=.15)

def test_language_models_have_a_label_a_token():
    "Ignored places stay out, of the loss and of the count"
    torch.manual_seed(0)
    toks = torch.randint(0, 9, (16, 6))
    class LM(nn.Module):
        def __init__(self): super().__init__(); self.e,self.o = nn.Embedding(9, 8),nn.Linear(8, 9)
        def forward(self, x): return self.o(torch.tanh(self.e(x)))
    ys = toks[:,1:].clone(); ys[:,3:] = -100
    dl = DataLoader(list(zip(toks[:,:-1], ys)), bs=8, shuffle=False, num_workers=0)
    spy = Spy(1)
    learn = Learner(DataLoaders(dl, dl), LM(), loss_func=CrossEntropyLossFlat(), opt_func=sophia(), cbs=[spy])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    assert spy.bs==8*3 and all(h.sum()>0 for h in hessians(learn.opt))

@pytest.mark.parametrize('loss,shape,target,n', [
    (nn.CrossEntropyLoss(), (4,3,5), torch.zeros(4, 5, dtype=torch.long), 20),
    (CrossEntropyLossFlat(axis=1), (4,3,5), torch.zeros(4, 5, dtype=torch.long), 20),
    (CrossEntropyLossFlat(ignore_index=0), (4,3), torch.tensor([0,1,0,2]), 2),
    (LabelSmoothingCrossEntropyFlat(), (4,3), torch.zeros(4, dtype=torch.long), 4),
    (F.cross_entropy, (4,3), torch.zeros(4, dtype=torch.long), 4),
    (partial(F.cross_entropy, ignore_index=1), (4,3), torch.tensor([1,1,1,0]), 1), (BCEWithLogitsLossFlat(), (4,3), torch.zeros(4, 3), 12),
    (nn.BCEWithLogitsLoss(), (4,), torch.zeros(4), 4)], ids=lambda o: re.sub(r' at 0x\w+', '', str(o))[:40])
def test_losses_that_are_known(loss, shape, target, n):
    pred = torch.randn(shape, requires_grad=True)
    l,k = S._sampler(loss)(pred, target)
    assert k==n and l.ndim==0
    l.backward()
    assert pred.grad.abs().sum()>0

def test_a_drawn_label_that_is_the_ignored_one_counts():
    "`ignore_index=1` leaves targets of 1 out, not labels of class 1 that were drawn for others"
    for i in range(30):
        torch.manual_seed(i)
        pred = torch.randn(4, 3, requires_grad=True)
        loss,n = S._sampler(partial(F.cross_entropy, ignore_index=1))(pred, torch.tensor([1,0,1,2]))
        loss.backward()
        assert n==2 and (pred.grad.abs().sum(1)>0).tolist()==[False,True,False,True]

@pytest.mark.parametrize('loss', [MSELossFlat(), FocalLossFlat(), F.mse_loss, lambda p,y: p.sum()], ids=['mse','focal','function','lambda'])
def test_losses_that_are_not(loss):
    "And how to give a sampler, or do without"
    learn = learner(sophia(), loss_func=loss)
    with pytest.raises(ValueError, match=r'it is not known how.*SophiaEstimate\(sampler=f\).*learn.create_opt\(\); '
                                         r'learn.remove_cb\(SophiaEstimate\)'): fit(learn)
    learn = learner(sophia(), loss_func=lambda p,y: F.cross_entropy(p, y))
    learn.create_opt(); learn.remove_cb(SophiaEstimate)
    fit(learn)
    assert not any(h.any() for h in hessians(learn.opt))

def test_a_sampler_of_ones_own():
    def sampler(pred, y): return F.mse_loss(pred, pred.detach()+torch.randn_like(pred))/2,pred.numel()
    spy = Spy(2, sampler)
    learn = learner(sophia(), [spy], loss_func=lambda p,y: F.mse_loss(p, F.one_hot(y, 10).float())/2)
    fit(learn)
    assert spy.bs==320 and spy.at==[0,2] and all(h.sum()>0 for h in hessians(learn.opt))

def test_bad_k():
    with pytest.raises(ValueError, match='k=0'): SophiaEstimate(0)

# ---------------------------------------------------------------- without a trace
class Seen(Callback):
    run_valid,order = False,99
    def __init__(self): self.losses,self.grads = [],[]
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])
    def after_batch(self): self.losses.append(self.learn.loss.item())

@pytest.mark.parametrize('cbs', [(), (GradientAccumulation(64),GradientClip(.1))], ids=['plain','both'])
def test_nobody_notices(cbs):
    "rho=0 makes the estimate worthless to the step: the trainings with and without one are the same to the last bit"
    runs = []
    for s in (None, nothing):
        learn = learner(sophia(rho=1e-30), [SophiaEstimate(2, s), Seen(), *map(copy.copy, cbs)])
        fit(learn, 2)
        runs.append((all_of(learn), learn.seen.losses, learn.seen.grads, learn.recorder.losses, torch.get_rng_state()))
        assert any(h.any() for h in hessians(learn.opt))==(s is None)
    assert_bitwise(*runs)

@pytest.mark.parametrize('mode', ['native','fused'])
def test_save_and_load_in_the_middle_is_bit_exact(tmp_path, mode):
    "Between two estimates"
    f = sophia(**flags(mode))
    a = fit(learner(f, [SophiaEstimate(3)], path=tmp_path)); a.save('mid'); rng = torch.get_rng_state()
    def go(l): torch.set_rng_state(rng); l.dls.train.rng.seed(7); return all_of(fit(l, 2))
    ref = go(a)
    b = learner(f, [SophiaEstimate(3)], path=tmp_path); b.create_opt(); b.load('mid')
    assert b.opt.hypers[0]['hess_age']==1
    assert_bitwise(go(b), ref)

def test_lr_find_and_one_cycle(tmp_path):
    learn = learner(sophia(fused=True), path=tmp_path, splitter=lambda m: digits_splitter(m[0]))
    with learn.no_bar(): learn.fit_one_cycle(1, slice(1e-3,1e-2))
    before = all_of(learn)
    with learn.no_bar(): learn.lr_find(num_it=12, show_plot=False, stop_div=False)
    assert_bitwise(all_of(learn), before)

class CPUMixed(MixedPrecision):
    def __init__(self, scale=2.**10): super().__init__('fp16'); self.scale = scale
    def before_fit(self): self.autocast,self.learn.scaler,self.scales = autocast('cpu', dtype=torch.bfloat16),GradScaler('cpu',
        init_scale=self.scale, growth_interval=1000),L()
    name = 'mixed_precision'

def test_mixed_precision():
    "Under autocast, and the scale, a power of two, makes no difference"
    dtypes,hs = [],[]
    for scale in (1., 2.**12):
        spy = Spy(2)
        learn = learner(sophia(), [CPUMixed(scale), spy])
        h = learn.model[0][0].register_forward_hook(lambda m,i,o: dtypes.append(o.dtype) if learn.training else None)
        fit(learn); h.remove()
        hs.append(hessians(learn.opt))
    assert set(dtypes)=={torch.bfloat16} and len(dtypes)==2*(4+2)
    assert_same(*hs, rtol=1e-3, atol=1e-9)

def test_an_overflow_of_the_estimate_is_left_out():
    class Once(Spy):
        def _estimate(self):
            if len(self.at)==0: self._draw,real = (lambda p,*y: (p.sum()*float('inf'), 1)),self._draw
            else: real = None
            res = super()._estimate()
            if real: self._draw = real
            assert res==(len(self.at)>1)
            return res
    spy = Once(3)
    learn = fit(learner(sophia(), [CPUMixed(), spy]))
    assert spy.at==[0,1] and all(h.isfinite().all() for h in hessians(learn.opt)) # again at the next step

def test_gradient_release():
    spy = Spy(2)
    learn = fit(learner(sophia(fused=True), [GradientRelease(), spy]))
    assert spy.at==[0,2] and all(h.sum()>0 for h in hessians(learn.opt)) and all(p.grad is None for p in learn.model.parameters())

def test_optimizer_accumulation():
    fit(learner(sophia(), [OptimizerAccumulation(64), SophiaEstimate(2)]))

def test_inside_of_wrappers():
    spy = Spy(2)
    learn = fit(learner(sam(lambda p,lr: Lookahead(Sophia(p, lr), k=2)), [spy]))
    assert spy.at==[0,2] and {type(c).__name__ for c in learn.cbs}>={'SAMPass','Spy'} and all(h.sum()>0 for h in hessians(learn.opt))

def test_non_native_mixed_precision_is_refused():
    cb = NonNativeMixedPrecision(); cb.before_fit = lambda: None
    with pytest.raises((ValueError,AssertionError), match='non-native'): fit(learner(sophia(), [cb]))
