"""Random lives of an optimizer, each mode next to a native twin with the same events: no order of events makes a mode read or write
stale memory.

After each step parameters, grads and state are compared and the mode's values replaced, in place, by native's, so that roundings don't add
up. Tensors that were let go are kept for a while with their values: a write through an old address shows as a change of one of them."""
import copy,gc,os
from collections import deque

import pytest,torch
from hypothesis import HealthCheck,Phase,settings,strategies as st
from hypothesis.stateful import RuleBasedStateMachine,initialize,precondition,rule
from torch import nn
from fastxtend_opt.definition.registry import get_optimizer
from helpers import *

SHAPES_M = ((), (5,), (4,4), (3,4,2,2), (300,), (0,), (7,3), (2,3,3,3))
index,seed = st.integers(0, len(SHAPES_M)-1),st.integers(0, 5)
some = st.sets(index, min_size=1)
LAYOUTS = ('like', 'contiguous', 'channels_last', 'stepped', 'transposed')
TOLS = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=2e-5, atol=2e-6)}

def lay(v, how, p=None):
    "`v` in new memory of another layout"
    if how=='like' and p is not None: return like(p, v)
    if how=='channels_last' and v.ndim==4: return v.clone(memory_format=torch.channels_last)
    order = range(v.ndim)[::-1] if how!='transposed' else range(v.ndim) # from the innermost axis out
    strides,n = [0]*v.ndim,2 if how=='stepped' else 1 # stepped: every second element of a larger buffer, so not dense
    for d in order: strides[d],n = n,n*max(v.shape[d], 1)
    return torch.empty_strided(v.shape, strides, dtype=v.dtype).copy_(v)

def noise(shape, seed, k=0): return torch.randn(shape, generator=torch.Generator().manual_seed(97*seed + k), dtype=torch.float64) + .3

class Side:
    "An optimizer and its parameters"
    def __init__(self, name, mode, kw, dtype):
        self.params = [nn.Parameter(noise(s, 50, k).to(dtype)) for k,s in enumerate(SHAPES_M)]
        self.native = mode=='native'
        with backend_of(mode): self.opt = get_optimizer(name).func([self.params[:4], self.params[4:]], lr=.01, **kw, **flags(mode))
    @property
    def state(self): return [self.opt.state[p] for p in self.params]

class Life(RuleBasedStateMachine):
    mode,name,casts = 'fused','adam',True

    @initialize(l2=st.booleans(), wd=st.sampled_from([0., .1]))
    def begin(self, l2, wd):
        kw = dict(wd=wd, decouple_wd=not l2)
        self.sides = [Side(self.name, m, kw, torch.float64) for m in ('native',self.mode)]
        self.low,self.saved,self.gone,self.threads = torch.float64,None,deque(maxlen=60),torch.get_num_threads()
        self.grads(set(range(len(SHAPES_M))), 0, 'like')

    def teardown(self):
        if hasattr(self, 'threads'): torch.set_num_threads(self.threads)

    def let_go(self, side, t):
        "Remember a tensor that the mode no longer uses, with its values"
        if not side.native and t is not None: self.gone.append((t, t.detach().clone()))

    # -------- the step, and what must hold after it
    @rule()
    def step(self):
        for s in self.sides: s.opt.step()
        a,b = self.sides[1],self.sides[0]
        tol = TOLS[self.low]
        assert_same([p.detach() for p in a.params], [p.detach() for p in b.params], **tol, path='params')
        assert_same([p.grad for p in a.params], [p.grad for p in b.params], **tol, path='grads')
        assert_same(detach_copy(a.opt.state_dict()), detach_copy(b.opt.state_dict()), **tol, path='opt')
        for t,v in self.gone: assert_bitwise(t, v, 'a tensor that was let go')
        with torch.no_grad():
            for p,q in zip(a.params, b.params):
                p.copy_(q)
                if p.grad is not None: p.grad.copy_(q.grad)
            for x,y in zip(a.state, b.state):
                for k,v in x.items():
                    if isinstance(v, torch.Tensor) and isinstance(y.get(k), torch.Tensor): v.copy_(y[k])
            slow = getattr(b.opt, 'slow_weights', None) if self.name=='ranger' else None
            if slow is not None:
                for x,y in zip(a.opt.slow_weights.concat(), slow.concat()): x.copy_(y)

    @rule()
    def two_steps(self): self.step(); self.step()

    # -------- gradients
    @rule(which=some, seed=seed, how=st.sampled_from(LAYOUTS))
    def grads(self, which, seed, how):
        for s in self.sides:
            for k in which:
                p = s.params[k]
                if not p.requires_grad: continue
                self.let_go(s, p.grad)
                p.grad = lay(noise(p.shape, seed, k).to(p.dtype), how, p)

    @rule(which=some, seed=seed)
    def grads_in_place(self, which, seed):
        for s in self.sides:
            for k in which:
                if s.params[k].grad is not None: s.params[k].grad.copy_(noise(s.params[k].shape, seed, k))

    @rule(which=some)
    def grads_none(self, which):
        for s in self.sides:
            for k in which: s.params[k].grad = None

    @rule()
    def zero_grad(self):
        for s in self.sides: s.opt.zero_grad()

    @rule()
    def zero_grad_none(self):
        for s in self.sides:
            if s.native:
                for p in s.params: p.grad = None
            else: s.opt.zero_grad(set_to_none=True)

    @rule(k=index, how=st.sampled_from(['data', 'set']))
    def swap_grad_memory(self, k, how):
        for s in self.sides:
            g = s.params[k].grad
            if g is None: continue
            old = g.detach().clone(memory_format=torch.preserve_format)
            self.let_go(s, g.data)
            if how=='data': g.data = old
            else:
                with torch.no_grad(): g.set_(old)

    # -------- parameters
    @rule(which=some, seed=seed, how=st.sampled_from(LAYOUTS))
    def new_data(self, which, seed, how):
        for s in self.sides:
            for k in which:
                p = s.params[k]
                self.let_go(s, p.data)
                p.data = lay(noise(p.shape, 10+seed, k).to(p.dtype), how, p)

    @rule(which=some, how=st.sampled_from(LAYOUTS))
    def relayout(self, which, how):
        for s in self.sides:
            for k in which:
                p = s.params[k]
                self.let_go(s, p.data)
                p.data = lay(p.data, how, p)

    @rule(k=index, how=st.sampled_from(['index','view','detach','flip2']))
    def same_pointer(self, k, how):
        "Another tensor object over the same memory"
        for s in self.sides:
            p = s.params[k]
            if   how=='index':  p.data = p.data[...]
            elif how=='view':   p.data = p.data.view(p.shape)
            elif how=='detach': p.data = p.detach()
            elif p.ndim==2 and p.shape[0]==p.shape[1]: p.data = p.data.t() # same pointer and shape, other strides

    @precondition(lambda self: self.name=='adam')
    @rule(k=st.sampled_from([1,4]))
    def shrink(self, k):
        "The same pointer and a shorter tensor: memory beyond its end must stay"
        for s in self.sides:
            p = s.params[k]
            if p.numel()<3: continue
            self.let_go(s, p.data[-1:])
            p.grad,p.data = None,p.data[:-1]
            s.opt.state[p] = {k:v for k,v in s.opt.state[p].items() if k=='do_wd'}
            p.grad = noise(p.shape, 3, k).to(p.dtype)
        self.saved = None

    @rule()
    def model_channels_last(self):
        for s in self.sides:
            for p in s.params:
                if p.ndim!=4: continue
                self.let_go(s, p.data)
                p.data = p.data.contiguous(memory_format=torch.channels_last).clone()
                if p.grad is not None and p.grad.dtype==p.dtype: p.grad = p.grad.contiguous(memory_format=torch.channels_last)

    @precondition(lambda self: self.casts)
    @rule(to=st.sampled_from([torch.float32, torch.float64]), grads=st.booleans())
    def cast(self, to, grads):
        "`model.to(dtype)`: the state stays as it is; gradients are cast too, or keep their dtype"
        for s in self.sides:
            for p in s.params:
                self.let_go(s, p.data)
                g,p.data = p.grad,p.data.to(to, copy=True)
                if g is not None and grads: p.grad = None; p.grad = g.to(to)
        if to==torch.float32: self.low = to

    # -------- state
    def names(self, k): return sorted(n for n,v in self.sides[0].state[k].items() if isinstance(v, torch.Tensor))

    @rule(k=index, n=st.integers(0,3), how=st.sampled_from(LAYOUTS), seed=seed)
    def replace_state(self, k, n, how, seed):
        names = self.names(k)
        if not names: return
        for s in self.sides:
            d,name = s.state[k],names[n%len(names)]
            self.let_go(s, d[name])
            d[name] = lay(noise(d[name].shape, 20+seed, k).abs().to(d[name].dtype), how if d[name].ndim else 'contiguous')

    @rule(k=index, n=st.integers(0,3))
    def swap_state_memory(self, k, n):
        names = self.names(k)
        if not names: return
        for s in self.sides:
            t = s.state[k][names[n%len(names)]]
            self.let_go(s, t.data)
            t.data = t.data.clone()

    @rule(k=index, n=st.integers(0,5))
    def delete_state(self, k, n):
        keys = sorted(self.sides[0].state[k])
        if not keys: return
        for s in self.sides:
            old = s.opt.state[s.params[k]].pop(keys[n%len(keys)])
            if isinstance(old, torch.Tensor): self.let_go(s, old)

    @rule(k=index, how=st.sampled_from(['empty','copy','same']))
    def replace_state_dict_of_one(self, k, how):
        for s in self.sides:
            p = s.params[k]
            old = s.opt.state[p]
            # where a mode keeps what native's Lookahead has elsewhere
            if how=='empty': s.opt.state[p] = {k:v for k,v in old.items() if k=='slow_p'}
            else: s.opt.state[p] = dict(old) if how=='copy' else old

    @rule(k=index, step=st.sampled_from([0, 1, 3, 100]))
    def write_step(self, k, step):
        if 'step' not in self.sides[0].state[k]: return
        for s in self.sides: s.opt.state[s.params[k]]['step'] = step

    @rule(which=some, v=st.booleans())
    def do_wd(self, which, v):
        for s in self.sides:
            for k in which: s.opt.state[s.params[k]]['do_wd'] = v

    @rule()
    def clear_state(self):
        for s in self.sides:
            for d in s.state:
                for v in d.values():
                    if isinstance(v, torch.Tensor): self.let_go(s, v)
            s.opt.clear_state()

    @rule()
    def save(self): self.saved = [detach_copy(s.opt.state_dict()) for s in self.sides]

    @precondition(lambda self: self.saved is not None)
    @rule(cross=st.booleans())
    def load(self, cross):
        for s,sd in zip(self.sides, reversed(self.saved) if cross else self.saved):
            sd = copy.deepcopy(sd)
            if s.native and sd.get('slow_weights') is not None:
                sd['slow_weights'] = L(L(o) for o in sd['slow_weights']) # fastai's Lookahead wants its own containers
            s.opt.load_state_dict(sd)

    # -------- hypers, freezing, threads and copies
    @rule(v=st.sampled_from([0., .003, .02, slice(1e-4, 1e-2)]))
    def set_lr(self, v):
        for s in self.sides: s.opt.set_hyper('lr', v)

    @rule(g=st.integers(0,1), key=st.sampled_from(['lr','wd','mom','sqr_mom']), v=st.sampled_from([.05, .5, .9]))
    def write_hyper(self, g, key, v):
        for s in self.sides: s.opt.hypers[g][key] = v

    @rule(n=st.integers(0,2))
    def freeze_to(self, n):
        for s in self.sides: s.opt.freeze_to(min(n, 1))

    @rule(n=st.integers(1,2))
    def set_threads(self, n): torch.set_num_threads(n)

    @rule()
    def collect(self):
        self.gone.clear()
        gc.collect()

    @rule()
    def deepcopy(self):
        "Continue with copies"
        for s in self.sides: s.params,s.opt = copy.deepcopy((s.params, s.opt))

# FASTXTEND_OPT_SHRINK=1 looks for a shorter life that fails, which takes minutes
PHASES = tuple(o for o in Phase if o is not Phase.shrink or os.environ.get('FASTXTEND_OPT_SHRINK'))

def life(mode, name, examples, steps, casts=True, **kw):
    cls = type(f'Life_{mode}_{name}', (Life,), dict(mode=mode, name=name, casts=casts))
    cls.TestCase.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=True,
                                     phases=PHASES,
                                     suppress_health_check=list(HealthCheck), **kw)
    return cls.TestCase

class TestFusedAdam(life('fused', 'adam', 20, 40, derandomize=True)): pass
class TestFusedRanger(life('fused', 'ranger', 15, 30, casts=False, derandomize=True)): pass
class TestFusedLarc(life('fused', 'larc', 15, 30, casts=False, derandomize=True)): pass
class TestTritonAdam(life('triton', 'adam', 6, 30, derandomize=True)): pass
class TestTritonLarc(life('triton', 'larc', 4, 30, casts=False, derandomize=True)): pass
class TestForeachAdam(life('foreach', 'adam', 8, 30, derandomize=True)): pass
class TestJitAdam(life('jit', 'adam', 10, 30, casts=False, derandomize=True)): pass

@pytest.mark.slow
class TestFusedAdamLong(life('fused', 'adam', 300, 60)): pass
@pytest.mark.slow
class TestFusedRangerLong(life('fused', 'ranger', 100, 60)): pass
@pytest.mark.slow
class TestFusedLambLong(life('fused', 'lamb', 100, 60)): pass
@pytest.mark.slow
class TestFusedLarcLong(life('fused', 'larc', 100, 60)): pass
@pytest.mark.slow
class TestTritonAdamLong(life('triton', 'adam', 100, 40)): pass
@pytest.mark.slow
class TestTritonRangerLong(life('triton', 'ranger', 40, 40)): pass
@pytest.mark.slow
class TestTritonLambLong(life('triton', 'lamb', 40, 40)): pass
@pytest.mark.slow
class TestForeachRangerLong(life('foreach', 'ranger', 100, 60)): pass
@pytest.mark.slow
class TestJitRangerLong(life('jit', 'ranger', 60, 60)): pass
