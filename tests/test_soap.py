"""SOAP and Shampoo: what the general tests don't cover. Their matrices, shapes of full rank compared with another library, failures,
checkpoints, gradient release, which parameters have no matrices."""
import contextlib,io,warnings

import numpy as np,pytest,torch
from fastai.basics import DataLoader,DataLoaders,Learner
from torch import nn
from fastxtend_opt.algorithms import shampoo as H,soap as S
from fastxtend_opt.algorithms.shampoo import Shampoo,shampoo
from fastxtend_opt.algorithms.soap import SOAP,soap
from fastxtend_opt.engine.opaque import opaque
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.definition.make import make_optimizer
from fastxtend_opt.definition.parameters import naming
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release
from helpers import *
from reference.shampoo import Shampoo as RefShampoo
from reference.soap import SOAP as RefSOAP

BOTH = pytest.mark.parametrize('f', [Shampoo,SOAP])
OURS = ('native','foreach','fused')
SHAPES_M = ((4,4),(4,4),(5,8),(3,3,3),(4,4),(6,))
KW = {Shampoo:dict(mom=.9, precondition_frequency=2), SOAP:dict(precondition_frequency=3)}

def grads(params, i, dtype=None):
    gen = torch.Generator().manual_seed(i)
    for p in params: p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype) + .25
def run(make, n=8, shapes=SHAPES_M, dtype=torch.float64, start=0, params=None):
    gen = torch.Generator().manual_seed(0)
    params = params or [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)) for s in shapes]
    opt = make(params)
    for i in range(start, n):
        grads(params, i)
        opt.step()
    return params,opt
def values(params): return [p.detach().clone() for p in params]

# ---------------------------------------------------------------- the matrices, and another library where they have full rank
def test_soaps_state_is_the_papers():
    "Averages turned back, matrices, and bases up to signs"
    (p,),opt = run(lambda ps: SOAP(ps, .01, precondition_frequency=2), shapes=[(5,5)], n=9)
    ref = RefSOAP(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy(), every=2, lam=.01)
    for i in range(9):
        grads([p], i)
        ref.step(p.grad.numpy(), .01)
    st = opt.state[p]
    Q = [st[f'basis_{i}'].view(5, 5).T.numpy() for i in (0,1)]
    assert_same(p.detach().numpy(), ref.theta, rtol=1e-9, atol=1e-11)
    assert_same(Q[0]@st['grad_avg'].numpy()@Q[1].T, ref.M, rtol=1e-9, atol=1e-11)
    assert_same(st['sqr_avg'].numpy(), ref.V, rtol=1e-8, atol=1e-11)
    for i in (0,1):
        assert_same(st[f'precond_{i}'].view(5, 5).numpy(), ref.L[i], rtol=1e-12, atol=1e-13)
        assert_same(abs(Q[i].T@ref.Q[i]), np.eye(5), atol=1e-8)

def test_shampoos_state_is_the_papers():
    (p,),opt = run(lambda ps: Shampoo(ps, .01, precondition_frequency=3, max_precond_dim=4), shapes=[(4,7,2)], n=8)
    ref = RefShampoo(p.detach().numpy(), every=3, longest=4)
    for i in range(8):
        grads([p], i)
        ref.step(p.grad.numpy(), .01)
    st = opt.state[p]
    for i,n in ((0,4),(2,2)):
        assert_same(st[f'precond_{i}'].view(n, n).numpy(), ref.H[i], rtol=1e-12)
        assert_same(st[f'inv_precond_{i}'].view(n, n).numpy(), ref.roots[i], rtol=1e-9, atol=1e-12)
    assert st['precond_1'].shape==(1,7,1)
    assert_same(st['precond_1'].flatten().numpy(), ref.H[1], rtol=1e-12)

@pytest.mark.parametrize('kw', [dict(), dict(wd=.1), dict(wd=.1, decouple_wd=True)])
def test_shampoo_beside_pytorch_optimizer(kw):
    "With the small eps, which spikes of the general test would drown in rounding"
    po = pytest.importorskip('pytorch_optimizer')
    a,_ = run(lambda ps: Shampoo(ps, .01, **kw))
    b,_ = run(lambda ps: po.Shampoo(ps, .01, matrix_eps=1e-4, weight_decay=kw.get('wd', 0.), weight_decouple=kw.get('decouple_wd', False)))
    assert_same(values(a), values(b), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('kw,tol', [(dict(precondition_frequency=100), 1e-9), (dict(precondition_frequency=3), 1e-6),
                                    (dict(precondition_frequency=2, max_precond_dim=4, merge_dims=True), 1e-6)])
def test_soap_beside_pytorch_optimizer(kw, tol):
    "Square matrices of full rank, or truncated ones. The library's QR decomposition is in float32"
    po,shapes = pytest.importorskip('pytorch_optimizer'),((4,4),(3,3,3),(2,2,2,3),(6,))
    a,_ = run(lambda ps: SOAP(ps, .01, **kw), 14, shapes)
    b,_ = run(lambda ps: po.SOAP(ps, .01, **{'max_precondition_dim' if k=='max_precond_dim' else k:v for k,v in kw.items()}), 14, shapes)
    assert_same(values(a), values(b), rtol=tol, atol=tol)

def test_soap_merges_all_axes_and_gives_vectors_a_basis():
    "One axis of six, whole, and a vector of two: against the reference. The first gradient has rank 1, so eps hides what it leaves open"
    kw = dict(precondition_frequency=50, merge_dims=True, precondition_1d=True, eps=1e6)
    ps,_ = run(lambda ps: SOAP(ps, 1e4, wd=0., **kw), shapes=((2,3),(2,)))
    start = [torch.randn(s, generator=g, dtype=torch.float64).numpy() for g in [torch.Generator().manual_seed(0)] for s in ((2,3),(2,))]
    refs = [RefSOAP(x, every=50, merge=True, vectors=True, eps=1e6) for x in start]
    for i in range(8):
        grads(ps, i)
        for r,p in zip(refs, ps): r.step(p.grad.numpy(), 1e4)
    assert refs[0].L[0].shape==(6,6)
    assert_same([p.detach().numpy() for p in ps], [r.theta for r in refs], rtol=1e-6)

# ---------------------------------------------------------------- modes
@BOTH
@pytest.mark.parametrize('mode', OURS[1:])
def test_stacks_of_one_shape_and_large_matrices(f, mode, monkeypatch):
    "Stacked, and cut where a CPU stacks no more: with what native does with each alone"
    for stack in (1<<18, 20): # two 4x4 together, or each alone
        for o in (H.axis_products, H.inverse_root, H.along_axes, S.turn_bases, S.eigenbasis): monkeypatch.setattr(o, 'stack', stack)
        a,oa = run(lambda ps: f(ps, .01, **KW[f], **flags(mode)))
        b,ob = run(lambda ps: f(ps, .01, **KW[f]))
        assert_same(values(a), values(b), rtol=1e-11, atol=1e-13)
        assert_same([oa.state[p] for p in a], [ob.state[p] for p in b], rtol=1e-9, atol=1e-12)

@BOTH
@pytest.mark.parametrize('mode', OURS)
def test_resumes_bit_exactly(f, mode):
    make = lambda ps: f(ps, .01, **KW[f], **flags(mode))
    whole,_ = run(make, 10, dtype=torch.float32)
    half,opt = run(make, 5, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file); file.seek(0)
    saved = torch.load(file, weights_only=False)
    def again(ps):
        opt = make(ps)
        opt.load_state_dict(saved)
        return opt
    rest,_ = run(again, 10, start=5, params=[nn.Parameter(p) for p in values(half)])
    assert_bitwise(values(rest), values(whole))

@BOTH
@pytest.mark.parametrize('mode', ['native','fused'])
def test_gradient_release(f, mode):
    "The same weights, whether gradients are released or not"
    def train(release):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
        opt = f(m.parameters(), .01, **KW[f], **flags(mode))
        if release: prepare_for_gradient_release(m, opt)
        for i in range(7):
            m(torch.randn(9, 6, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            opt.step(); opt.zero_grad()
        return values(m.parameters())
    assert_same(train(True), train(False), rtol=1e-6, atol=1e-7)

@BOTH
@pytest.mark.parametrize('mode', OURS)
def test_late_gradients_begin_late(f, mode):
    "A parameter that gets its first gradient at step 3 is where one is that begins there"
    gen = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 4, generator=gen, dtype=torch.float64) for _ in range(2)]
    ps = [nn.Parameter(o.clone()) for o in start]
    opt = f(ps, .01, **KW[f], **flags(mode))
    alone = nn.Parameter(start[1].clone())
    twin = f([alone], .01, **KW[f], **flags(mode))
    for i in range(9):
        grads(ps, i)
        if i<3: ps[1].grad = None
        else:
            alone.grad = ps[1].grad.clone()
            twin.step()
        opt.step()
    assert opt.state[ps[1]]['step']==6
    assert_same(ps[1].detach(), alone.detach(), rtol=1e-12, atol=1e-14)

@BOTH
@pytest.mark.parametrize('mode', OURS)
@pytest.mark.parametrize('kahan_sum', [False, pytest.param(None, marks=pytest.mark.slow)])
def test_bfloat16_keeps_float32_matrices(f, mode, kahan_sum):
    ps,opt = run(lambda ps: f(ps, .01, kahan_sum=kahan_sum, **KW[f], **flags(mode)), dtype=torch.bfloat16)
    wide,_ = run(lambda ps: f(ps, .01, **KW[f]), dtype=torch.float32)
    for p in ps:
        mats = {k:v for k,v in opt.state[p].items() if isinstance(v, torch.Tensor) and k.startswith(('inv_precond','basis'))}
        assert all(v.dtype==torch.float32 and v.shape==(v.numel(),) for v in mats.values()) and (len(mats)>0 or (f is SOAP and p.ndim==1))
    assert max((p.float()-q).abs().max() for p,q in zip(values(ps), values(wide))) < .05

@BOTH
def test_jit_is_refused_at_once(f):
    p = nn.Parameter(torch.ones(2, 2))
    for make in (lambda: f([p], .1, jit=True), lambda: (soap if f is SOAP else shampoo)(jit=True)):
        with pytest.raises(UnsupportedError, match='has no jit mode.*foreach=True or fused=True'): make()

# ---------------------------------------------------------------- failures
@BOTH
@pytest.mark.parametrize('mode', ['native','foreach'])
def test_a_failed_decomposition_keeps_the_old_one(f, mode):
    "NaN in one gradient: its own matrices fail, those that are stacked with it do not, and a warning says so once"
    H.warn_once.cache_clear()
    gen = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, 4, generator=gen, dtype=torch.float64)) for _ in range(3)]
    opt = f(ps, .01, precondition_frequency=1, **flags(mode))
    name = 'basis_0' if f is SOAP else 'inv_precond_0'
    for i in range(3): grads(ps, i); opt.step()
    old = opt.state[ps[1]][name].clone()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        for i in range(2):
            grads(ps, 3+i)
            ps[1].grad[0,0] = torch.nan
            opt.step()
    assert len([o for o in w if 'decomposition of a matrix failed' in str(o.message)])==1
    assert_bitwise(opt.state[ps[1]][name], old)
    assert not ps[1].isfinite().all() and ps[0].isfinite().all() and ps[2].isfinite().all()
    H.warn_once.cache_clear()

def test_a_decomposition_that_does_not_converge(monkeypatch):
    "LAPACK gives up: the root before is used"
    H.warn_once.cache_clear()
    p = nn.Parameter(torch.eye(3, dtype=torch.float64))
    opt = Shampoo([p], .01)
    p.grad = torch.ones_like(p); opt.step()
    old,where = opt.state[p]['inv_precond_0'].clone(),p.detach().clone()
    def _fails(x): raise torch.linalg.LinAlgError('no convergence')
    monkeypatch.setattr(torch.linalg, 'eigh', _fails)
    with pytest.warns(UserWarning, match='Its previous result is kept'): opt.step()
    assert_bitwise(opt.state[p]['inv_precond_0'], old)
    assert p.isfinite().all() and not torch.equal(p.detach(), where)
    H.warn_once.cache_clear()

# ---------------------------------------------------------------- which parameters have matrices
@pytest.mark.parametrize('mode', OURS)
def test_aux(mode):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with naming(model): opt = SOAP(model.parameters(), .01, aux='Embedding|2.*', precondition_frequency=2, **flags(mode))
    assert ([r['rule'] for r in opt.rules.rows]==['Adam: Embedding|2.*','SOAP, 2 bases','Adam']
            and [r['tensors'] for r in opt.rules.rows]==[3,1,1])
    ps = list(model.parameters())
    twins = [nn.Parameter(p.detach().clone()) for p in ps]
    twin = SOAP([dict(params=[twins[0],*twins[3:]], max_precond_dim=0), dict(params=twins[1:3])], .01, precondition_frequency=2)
    for i in range(6):
        grads(ps, i); grads(twins, i)
        opt.step(); twin.step()
        if i==2: opt.clear_state(); twin.clear_state()
    assert_same(values(ps), values(twins), rtol=1e-10, atol=1e-12)
    assert ([o.get('precondition', True) for o in map(opt.state.__getitem__, ps)]==[False,True,True,False,False]
            and 'basis_0' not in opt.state[ps[0]])
    with pytest.raises(TypeError, match='pattern 3 is a int'): SOAP(ps, .01, aux=3)
    with pytest.raises(TypeError, match='pattern 3 is a int'): Shampoo(ps, .01, aux=3)

def test_embeddings_and_the_head_take_adam_where_they_are_known():
    "By default for SOAP; `aux=()` says that none do; Shampoo leaves none out by default"
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    ps = list(model.parameters())
    def bases(f, named=True, **kw):
        with naming(model) if named else contextlib.nullcontext(): opt = f(ps, .01, **kw)
        grads(ps, 0)
        opt.step()
        return [sum(k.startswith(('basis','inv_precond')) for k in opt.state[p]) for p in ps if p.ndim>1]
    assert bases(SOAP)==[0,2,0] and bases(SOAP, aux=())==[2,2,2] and bases(SOAP, named=False)==[2,2,2] and bases(Shampoo)==[2,2,2]
    learn = fastai_learner(model)
    learn.create_opt()
    assert [r['rule'] for r in learn.opt.rules.rows]==['Adam: embedding','SOAP, 2 bases','Adam','Adam: head: the last linear layer']

def fastai_learner(model):
    dl = DataLoader(list(zip(range(7), range(7))), bs=7)
    return Learner(DataLoaders(dl, dl), model, loss_func=nn.CrossEntropyLoss(), opt_func=soap())

def test_shampoos_diagonals_are_the_diagonals():
    "A vector takes AdaGrad's step, a matrix that of both diagonals"
    ps,opt = run(lambda ps: Shampoo(ps, .01, max_precond_dim=0, eps=0.), 1, ((5,),(3,4)))
    ref = [torch.randn(s, generator=g, dtype=torch.float64) for g in [torch.Generator().manual_seed(0)] for s in ((5,),(3,4))]
    grads(ps, 0)
    g = ps[1].grad
    assert_same(ps[0].detach(), ref[0] - .01*ps[0].grad.sign(), rtol=1e-12)
    assert_same(ps[1].detach(), ref[1] - .01*g*g.square().sum(1, keepdim=True)**-.25*g.square().sum(0, keepdim=True)**-.25, rtol=1e-12)
    assert [r['rule'] for r in opt.rules.rows]==['diagonals']

# ---------------------------------------------------------------- engine: opaque functions that write into what they return
@pytest.mark.parametrize('mode', OURS)
def test_opaque_in_place(mode):
    @opaque(results=lambda g, old=None: torch.empty(4, dtype=g.dtype) if old is None else old, inplace=True, stack=5)
    def add_up(g, old=None):
        s = g.sum(-1, keepdim=True).expand(*g.shape[:-1], 4)
        return s.clone() if old is None else old.add_(s)
    def keep(p, total=None, **kwargs):
        new = add_up(p.grad.data, old=total)
        return dict(total=new if total is None else total.copy_(new))
    def move(p, lr, **kwargs): p.data.sub_(p.grad.data, alpha=lr)
    ps = [nn.Parameter(torch.zeros(2)) for _ in range(5)]
    opt = make_optimizer(ps, [keep, move], lr=.1, **flags(mode))
    for i in range(3):
        for j,p in enumerate(ps): p.grad = torch.full((2,), float(j))
        opt.step()
        if i==0: kept = [opt.state[p]['total'] for p in ps]
    assert ([opt.state[p]['total'].tolist() for p in ps]==[[6.*j]*4 for j in range(5)]
            and all(opt.state[p]['total'] is o for p,o in zip(ps, kept)))
    @opaque(inplace=True)
    def wrong(g, other): other.add_(1.); return g*2
    with pytest.raises(ValueError, match='writes into a tensor'): wrong(torch.ones(2), torch.ones(2))
