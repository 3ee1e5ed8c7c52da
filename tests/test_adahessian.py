"""AdaHessian with estimates: timm's and pytorch_optimizer's numbers, a diagonal quadratic, and the callback. (With gradients in their
place: the shared tests.)"""
import copy,gc,pickle,weakref

from functools import partial

import numpy as np,pytest,torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.learner import Callback
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastxtend_opt.algorithms.adahessian import AdaHessian,AdaHessianPass,adahessian,estimate_hessian,hessian_due,hutchinson
from fastxtend_opt.algorithms.adam import adam
from fastxtend_opt.algorithms.lookahead import Lookahead
from fastxtend_opt.optimizer.passes import dry_run
from fastxtend_opt.tools.demo import digits_splitter
from fastxtend_opt.training.gradient_release import GradientRelease,prepare_for_gradient_release
from fastxtend_opt.training.optimizer_accumulation import OptimizerAccumulation
from helpers import ALL_MODES,WithBackend,assert_bitwise,assert_same,backend_of,detach_copy,flags
from learner_utils import all_of,dropout_learner,fit
from reference.adahessian import AdaHessian as Reference

TRAINS = True # steps here have estimates, or must fail
pytestmark = pytest.mark.filterwarnings('ignore:.*create_graph=True')

class Net(nn.Module):
    def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(1, 4, 3),nn.Linear(16, 3)
    def forward(self, x): return self.head(torch.tanh(self.conv(x)).flatten(1))

def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)

def data(dtype=torch.float64, n=24):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 4, 4, generator=gen, dtype=torch.float64).to(dtype),torch.randint(0, 3, (n,), generator=gen)

def backward(m, x, y, graph=True):
    for p in m.parameters(): p.grad = None
    F.cross_entropy(m(x), y).backward(create_graph=graph)

def weights(m): return [p.detach().clone() for p in m.parameters()]

# ---------------------------------------------------------------- against others
@pytest.mark.parametrize('kw', [dict(), dict(n_samples=3, hessian_power=.5, wd=.1), dict(avg_conv_kernel=True, eps=1e-4),
                                dict(update_each=4)], ids=str)
def test_against_timm(kw):
    "30 steps on a network whose Hessian is not diagonal, with the signs of timm's generator"
    from timm.optim.adahessian import Adahessian
    ms,(x,y) = [net(),net()],data()
    mine = AdaHessian(ms[0].parameters(), lr=.05, **kw)
    theirs = Adahessian(ms[1].parameters(), lr=.05, betas=(.9,.999), eps=kw.get('eps', 1e-8), weight_decay=kw.get('wd', 0.),
                        hessian_power=kw.get('hessian_power', 1.),
                        update_each=kw.get('update_each', 1), n_samples=kw.get('n_samples', 1),
                        avg_conv_kernel=kw.get('avg_conv_kernel', False))
    gen = torch.Generator().manual_seed(theirs.seed)
    for _ in range(30):
        backward(ms[1], x, y); theirs.step()
        due = hessian_due(mine)
        backward(ms[0], x, y, due)
        if due: estimate_hessian(mine, gen)
        mine.step()
        assert_same(weights(ms[0]), weights(ms[1]), rtol=1e-9, atol=1e-11)

def test_against_pytorch_optimizer():
    po = pytest.importorskip('pytorch_optimizer')
    ms,(x,y) = [net(),net()],data()
    mine,theirs = AdaHessian(ms[0].parameters(), lr=.05, wd=.1),po.AdaHessian(ms[1].parameters(), lr=.05, eps=1e-8, weight_decay=.1,
                                                                              hutchinson_distribution='rademacher')
    for i in range(20):
        backward(ms[0], x, y); backward(ms[1], x, y)
        gen = torch.Generator().manual_seed(i)
        hs = hutchinson([p.grad for p in ms[1].parameters()], list(ms[1].parameters()), generator=gen)
        theirs.step(hessian=hs)
        estimate_hessian(mine, torch.Generator().manual_seed(i)); mine.step()
        assert_same(weights(ms[0]), weights(ms[1]), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('mode', ALL_MODES)
@pytest.mark.parametrize('kw', [dict(), dict(mom=.5, sqr_mom=.9, eps=1e-3, hessian_power=.5, wd=.1)], ids=str)
def test_modes_against_the_paper_with_a_moving_diagonal(mode, kw):
    "sum(a x^4): the Hessian 12 a x^2 changes from step to step and is diagonal, so that any signs give it exactly"
    a,x0 = torch.linspace(.5, 20, 37, dtype=torch.float64),torch.linspace(1, 2, 37, dtype=torch.float64)
    ps = [nn.Parameter(x0.clone()),nn.Parameter(x0.view(1, 37).clone())]
    with backend_of(mode): opt = AdaHessian([[ps[0]],[ps[1]]], lr=[.1,.05], **kw, **flags(mode))
    opt.state[ps[1]]['do_wd'] = False
    names = dict(mom='beta1', sqr_mom='beta2', eps='eps', hessian_power='k')
    refs = [Reference(x0.numpy(), lam=kw.get('wd', 0.), **{names[k]:v for k,v in kw.items() if k in names}),
            Reference(x0.view(1, 37).numpy(), **{names[k]:v for k,v in kw.items() if k in names})]
    for _ in range(25):
        for p,r,lr in zip(ps, refs, (.1,.05)):
            p.grad = None
            p.grad, = torch.autograd.grad((a*p**4).sum(), p, create_graph=True)
            r.step(4*a.numpy()*r.theta**3, lr, 12*a.numpy()*r.theta**2)
        estimate_hessian(opt); opt.step()
        assert_same([p.detach().numpy() for p in ps], [r.theta for r in refs], rtol=1e-10, atol=1e-12)
        assert_same(opt.state[ps[0]]['hess'].numpy(), refs[0].D, rtol=1e-10)

def test_one_step_solves_a_diagonal_quadratic():
    "Without averages and at lr=1 it is Newton's step"
    a = torch.tensor([1.,5.,.01,300.], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([1.,-2.,3.,4.], dtype=torch.float64))
    opt = AdaHessian([p], lr=1., mom=0., sqr_mom=0., eps=0.)
    p.grad, = torch.autograd.grad((a*p**2).sum()/2, p, create_graph=True)
    estimate_hessian(opt); opt.step()
    assert_same(p.detach(), torch.zeros(4, dtype=torch.float64), atol=1e-12)

def test_hutchinson_is_unbiased():
    gen = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=gen, dtype=torch.float64); A = A@A.T
    p = nn.Parameter(torch.randn(6, generator=gen, dtype=torch.float64))
    g = torch.autograd.grad(p@A@p/2, p, create_graph=True)
    h, = hutchinson(g, [p], n_samples=4000, generator=gen)
    off = (A**2).sum(1) - A.diagonal()**2
    assert ((h-A.diagonal()).abs() < 5*(off/4000).sqrt()).all() # its standard deviation

def test_parameters_that_the_gradient_does_not_depend_on():
    "A loss that is linear in one of them: no curvature"
    a,b = nn.Parameter(torch.ones(2)),nn.Parameter(torch.ones(2))
    ((a**2).sum()+b.sum()).backward(create_graph=True)
    opt = AdaHessian([a,b], .1); estimate_hessian(opt)
    assert_same(opt.state[a]['hess'], torch.full((2,), 2.)); assert_same(opt.state[b]['hess'], torch.zeros(2))
    assert not a.grad.requires_grad and not b.grad.requires_grad

# ---------------------------------------------------------------- by hand
@pytest.mark.parametrize('mode', ALL_MODES)
def test_without_an_estimate_nothing_moves(mode):
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    with backend_of(mode): opt = AdaHessian([p], .1, **flags(mode))
    with pytest.raises(RuntimeError, match='no estimate of the Hessian.*estimate_hessian'): opt.step()
    assert torch.equal(p.detach(), torch.ones(3))
    with pytest.raises(ValueError, match='no graph'): estimate_hessian(opt)
    with dry_run(): opt.step()
    assert not torch.equal(p.detach(), torch.ones(3))

def test_what_is_refused():
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    with pytest.raises(ValueError, match='makes no estimates'): estimate_hessian(adam()([p], lr=.1))
    for k,v in dict(n_samples=0, update_each=0, hessian_power=1.5).items():
        with pytest.raises(ValueError, match=f'{k}='): AdaHessian([p], .1, **{k:v})

def test_update_each_and_late_parameters():
    m,(x,y) = net(),data()
    opt,due = AdaHessian(m.parameters(), .05, update_each=3),[]
    for i in range(8):
        if i==0: m.conv.requires_grad_(False)
        if i==4: m.conv.requires_grad_(True)
        due.append(hessian_due(opt))
        old = detach_copy([opt.state[p].get('hess') for p in m.parameters()])
        backward(m, x, y, due[-1])
        if due[-1]: estimate_hessian(opt)
        opt.step()
        if i==4: # the new ones only, whose turn it was not
            new = [opt.state[p]['hess'] for p in m.parameters()]
            assert old[0] is None and new[0].abs().max()>0 and torch.equal(old[2], new[2])
    assert due==[True,False,False,True,True,False,True,False]

@pytest.mark.parametrize('mode', ['native','fused'])
def test_resume_is_bit_exact(mode):
    "In the middle of an interval, with a training's own signs"
    (x,y) = data()
    def go(m, opt, n):
        for _ in range(n):
            due = hessian_due(opt); backward(m, x, y, due)
            if due: estimate_hessian(opt)
            opt.step()
    mk = lambda m: AdaHessian(m.parameters(), .05, update_each=3, n_samples=2, **flags(mode))
    m = net(); opt = mk(m); go(m, opt, 4)
    sd,w = detach_copy(opt.state_dict()),copy.deepcopy(m.state_dict())
    m2,opt2 = copy.deepcopy((m,opt)); m3,opt3 = pickle.loads(pickle.dumps((m,opt)))
    go(m, opt, 5)
    m4 = net(seed=4); m4.load_state_dict(w); opt4 = mk(m4); opt4.load_state_dict(sd)
    for a,b in ((m2,opt2),(m3,opt3),(m4,opt4)):
        torch.manual_seed(77); go(a, b, 5)
        assert_bitwise(weights(a), weights(m))

@pytest.mark.parametrize('mode', ['native','foreach','fused'])
@pytest.mark.parametrize('kw', [dict(), dict(state_dtype=torch.float32), dict(stochastic_rounding=True)], ids=str)
def test_bfloat16(mode, kw):
    "The estimate has the state's dtype"
    m,(x,y) = net(torch.bfloat16),data(torch.bfloat16)
    opt = AdaHessian(m.parameters(), .05, **kw, **flags(mode))
    first = F.cross_entropy(m(x), y).item()
    for _ in range(20): backward(m, x, y); estimate_hessian(opt); opt.step()
    assert {s['hess'].dtype for s in opt.state_dict()['state']}=={kw.get('state_dtype', torch.bfloat16)}
    assert F.cross_entropy(m(x), y).item() < first-.1

def test_round_it_lookahead_and_options():
    m,(x,y) = net(),data()
    for opt in (Lookahead(AdaHessian(m.parameters(), .05, fused=True), k=2), AdaHessian(m.parameters(), .05, cautious=True),
                AdaHessian(m.parameters(), .05, decouple_lr=True, wd=1e-5)):
        for _ in range(4): backward(m, x, y); estimate_hessian(opt); opt.step()
    opt = AdaHessian(m.parameters(), .05, decouple_lr=True, wd=1e-5)
    assert opt.decouple_lr and [c.__name__ for c in opt.learner_cbs]==['AdaHessianPass']
    learn = dropout_learner(partial(AdaHessian, decouple_lr=True, wd=1e-5))
    learn.create_opt()
    assert [type(c).__name__ for c in learn.cbs][-2:]==['MaxLR','AdaHessianPass']

def test_gradient_release_with_estimates_made_before():
    "Nothing is refused where the loop makes the estimates itself"
    m,(x,y) = net(),data(); opt = AdaHessian(m.parameters(), .05)
    ps = list(m.parameters())
    for p,g,h in zip(ps, *(lambda g: (g, hutchinson(g, ps)))(torch.autograd.grad(F.cross_entropy(m(x), y), ps,
                                                                                 create_graph=True))): opt.state[p]['hess'] = h
    prepare_for_gradient_release(m, opt)
    w = weights(m); F.cross_entropy(m(x), y).backward()
    assert all(p.grad is None for p in ps) and not torch.equal(w[0], ps[0])

# ---------------------------------------------------------------- in a Learner
learner = partial(dropout_learner, n_train=96)

def by_hand(n, lr, acc=None, clip=None, update_each=1):
    learn = learner(adahessian(update_each=update_each), n_train=128)
    m = learn.model; m.train(); opt = AdaHessian(learn.splitter(m), lr, update_each=update_each)
    for _ in range(n):
        for i,(x,y) in enumerate(learn.dls.train):
            due = hessian_due(opt)
            (F.cross_entropy(m(x), y)*(len(x)/acc if acc else 1)).backward(create_graph=due)
            if acc and (i+1)*len(x)%acc: continue
            if due: estimate_hessian(opt)
            if clip: nn.utils.clip_grad_norm_(m.parameters(), clip)
            opt.step(); opt.zero_grad()
        for _ in learn.dls.valid: pass
    return [t.detach().clone() for t in (*m.parameters(), *m.buffers())]

@pytest.mark.parametrize('kw,cbs', [({}, ()), (dict(update_each=3), ()),
                                    (dict(acc=64, clip=.1), (GradientAccumulation(64),GradientClip(.1)))], ids=['plain','each','both'])
def test_learner_is_the_loop_by_hand(kw, cbs):
    """Whose accumulated gradients keep their graphs, and are clipped after the estimate; the random numbers of dropout are the training's
    own"""
    learn = fit(learner(adahessian(update_each=kw.get('update_each', 1)), map(copy.copy, cbs), n_train=128), 2, .05)
    assert_same(all_of(learn), by_hand(2, .05, **kw), rtol=1e-3, atol=1e-4)
    assert '_backward' not in learn.__dict__ and len([c for c in learn.cbs if isinstance(c, AdaHessianPass)])==1

def test_random_numbers_and_shapes_of_training_are_those_of_adam():
    states = []
    for f in (adam(), adahessian()):
        fit(learner(f)); states.append(torch.get_rng_state())
    assert torch.equal(*states)

def test_one_cycle_freeze_save_and_load(tmp_path):
    from fastxtend_opt.tools.demo import digits_splitter
    learn = learner(adahessian(fused=True), splitter=lambda m: digits_splitter(m[0]), path=tmp_path)
    learn.freeze()
    with learn.no_bar(): learn.fit_one_cycle(1, .05)
    learn.unfreeze()
    with learn.no_bar(): learn.fit_one_cycle(1, slice(.005,.05)); learn.lr_find(num_it=6, show_plot=False)
    learn.save('a'); rng = torch.get_rng_state()
    def go(l): torch.set_rng_state(rng); l.dls.train.rng.seed(3); return all_of(fit(l, 1, .05))
    ref = go(learn)
    other = learner(adahessian(fused=True), splitter=lambda m: digits_splitter(m[0]), path=tmp_path)
    other.create_opt(); other.load('a')
    assert_bitwise(go(other), ref)

def test_optimizer_accumulation():
    learn = fit(learner(adahessian(fused=True), [OptimizerAccumulation(64)], n_train=128), 1, .05)
    assert learn.opt.state_dict()['state'][0]['step']==4

@pytest.mark.parametrize('cb,words', [(MixedPrecision(), 'float16'), (GradientRelease(), "can't work with GradientRelease")],
                         ids=['fp16','release'])
def test_learner_refuses(cb, words):
    with pytest.raises(ValueError, match=words): fit(learner(adahessian(), [cb]))

def test_a_batch_that_is_cancelled_leaves_nothing():
    from fastai.callback.core import CancelBatchException,CancelStepException
    class Cancel(Callback):
        run_valid,n,order = False,0,7
        def after_loss(self):
            self.n += 1
            if self.n==2: raise CancelBatchException
        def before_step(self):
            if self.n==3: raise CancelStepException
    learn = fit(learner(adahessian(), [Cancel()], n_train=128))
    assert '_backward' not in learn.__dict__ and not any(p.grad.requires_grad for p in learn.model.parameters())

class Token: "Lives as long as the graph of the pass that made it"
tokens = weakref.WeakSet()

class Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): ctx.token = Token(); tokens.add(ctx.token); return x.clone()
    @staticmethod
    def backward(ctx, g): return g.clone()

class Small(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(4, 8),nn.Linear(8, 2)
    def forward(self, x): return self.b(Mark.apply(torch.tanh(self.a(x))))

@pytest.mark.parametrize('n', [20, pytest.param(500, marks=pytest.mark.slow)])
def test_no_graph_outlives_its_step(n):
    "Gradient, graph and parameter hold one another until the estimate has been made"
    torch.manual_seed(0); tokens.clear()
    m,x,y = Small(),torch.randn(16, 4),torch.randint(0, 2, (16,))
    opt = AdaHessian(m.parameters(), .01)
    for _ in range(n):
        F.cross_entropy(m(x), y).backward(create_graph=True)
        assert len(tokens)==1
        estimate_hessian(opt); opt.step()
        if tokens: gc.collect()
        assert len(tokens)==0
        opt.zero_grad()
    F.cross_entropy(m(x), y).backward(create_graph=True) # this is what it is about
    del m,opt
    gc.collect(); assert len(tokens)==1

def test_no_graph_outlives_its_batch():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    tokens.clear(); alive = []
    class Count(Callback):
        run_valid,order = False,99
        def before_batch(self): alive.append(len(tokens))
    torch.manual_seed(0)
    dl = DataLoader([(a,b) for a,b in zip(torch.randn(160, 4), torch.randint(0, 2, (160,)))], bs=8, shuffle=True, num_workers=0)
    learn = Learner(DataLoaders(dl, dl), Small(), loss_func=F.cross_entropy, opt_func=adahessian(), cbs=[Count(),GradientAccumulation(24)])
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    assert max(alive)<=3 and alive[-1]<=3 # those of the micro-batches that are being accumulated, and the last loss

def rss():
    with open('/proc/self/statm') as f: return int(f.read().split()[1])*4096

@pytest.mark.slow
def test_memory_of_a_training_is_flat():
    "500 steps with a layer whose graph is 2 MB: a leak would be a gigabyte"
    torch.manual_seed(0)
    m,x,y = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 4)),torch.randn(256, 64),torch.randint(0, 4, (256,))
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    dl = DataLoader([(a,b) for a,b in zip(x.repeat(10, 1), y.repeat(10))], bs=256, shuffle=True, num_workers=0)
    learn = Learner(DataLoaders(dl, dl), m, loss_func=F.cross_entropy, opt_func=adahessian())
    sizes = []
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.fit(5, .01)
        sizes.append(rss())
        learn.fit(40, .01)
        sizes.append(rss())
    assert sizes[1]-sizes[0] < 60e6

def test_refuses_ddp():
    learn = learner(adahessian())
    learn.create_opt()
    cb = next(o for o in learn.cbs if isinstance(o, AdaHessianPass))
    learn.model = DistributedDataParallel.__new__(DistributedDataParallel) # enough for `isinstance`
    with pytest.raises(ValueError, match='DistributedDataParallel: gradients averaged'): cb.before_batch()
