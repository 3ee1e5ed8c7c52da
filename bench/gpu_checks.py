"""Checks of the fused mode on a GPU: bench/gpu.py runs them, on the device or in Triton's interpreter.

Each check compares with the native mode on the same device. A float32 step is exact to `TOL` of tests/helpers.py, a bfloat16 step to one
representable step, because both modes compute in float32 and round once. Two algorithms amplify the last bit of a float32 computation, in
native as much as in the kernel, and are then compared with what native itself does when its gradients change by one bit:

- Apollo divides averages of up to 2 by a curvature that is clamped at 0.01. A rounding error of 2e-8 in an average becomes 2e-6 in
  `update`. After 7 steps native's `update` is 3.7e-5 from float64's at most, the kernel's 3.7e-5 too; between them lie 1.5e-5.
- C-Lion keeps the elements whose step and gradient have the same sign, and multiplies them by one over their share. With bfloat16 inputs
  the sum behind a sign can be 0: 0.9*0.0253906 - 0.1*0.228516. Native's float32 keeps that element, float64 and the kernel don't. The
  element moves or not, and all others change by one part in 16,389."""
from functools import partial
import torch
from torch import nn
from fastai.optimizer import Optimizer, weight_decay, average_grad, momentum_step
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.optimizer.fused import FusedOptimizer
import helpers as h

F32_BIT = 2.**-23

def make(name, params, mode='fused', **kw):
    return get_optimizer(name).func(h.two_groups(params), lr=.01, **{mode: True} if mode!='native' else {}, **kw)

def set_grads(params, stream, i, skip=()):
    "New gradients of step `i`; none for the parameters at positions `skip`"
    for j,p in enumerate(params):
        p.grad = None
        if j not in skip: p.grad = torch.empty_like(p).copy_(stream.values(p, i, j).to(p.dtype))

def cast(o, dtype):
    "A state dict with its tensors in `dtype`"
    if isinstance(o, dict): return {k: cast(v, dtype) for k,v in o.items()}
    if isinstance(o, (list,tuple)): return [cast(v, dtype) for v in o]
    return o.to(dtype) if isinstance(o, torch.Tensor) else o

def keeps_gradient(p, lr, buf=None, prev=None, **kwargs):
    "A stepper that keeps gradients of a step in its state, and has a norm"
    buf = p.grad.data.clone() if buf is None else buf.mul_(.9).add_(p.grad.data)
    if prev is None: prev = torch.zeros_like(p.data)
    n = p.grad.data.norm()
    prev.copy_(p.grad.data)
    p.data.sub_((buf + p.grad.data/(n + 1))*lr)
    return {'buf': buf, 'prev': prev}

class Checks:
    "Checks on a device (`Cuda` or `Interpreter` of bench/gpu.py): a method returns nothing or a note, or raises"
    def __init__(self, dev): self.dev,self.real = dev,dev.device!='cpu'

    def to(self, params): return [nn.Parameter(p.detach().to(self.dev.device)) for p in params] # keeps strides of dense tensors

    # ------------------------------------------------------------ every optimizer
    def trajectory(self, name, dtype, mode, stream=None, **kw):
        "Steps with late and vanishing gradients, decay left out on some parameters, and a schedule"
        params = self.to(h.make_params(dtype=dtype)) # of none to more than a chunk of elements, one channels_last
        opt,stream = make(name, params, mode, **kw),stream or h.GradStream(1)
        for p in params[::3]: opt.state[p]['do_wd'] = False
        for i in range(25 if self.real else 7):
            opt.set_hyper('lr', .01/(1+i))
            set_grads(params, stream, i, [j for j in range(len(params)) if i < 2*j%7])
            opt.step()
        return dict(params=[p.detach() for p in params], state=h.detach_copy(opt.state_dict()))

    def equals_native(self, name, dtype, **kw):
        "The kernel's trajectory is native's, or as near to it as native is to itself after a change of one bit in its gradients"
        a,b = (self.trajectory(name, dtype, mode, **kw) for mode in ('fused','native'))
        try: h.assert_same(a, b, **h.TOL[dtype])
        except h.Mismatch:
            noisy = self.trajectory(name, dtype, 'native', h.NudgedStream(1, dtype=dtype), **kw)
            h.assert_same(h.less_noise(a, b, noisy), b, **h.TOL[dtype])
            return 'within the noise of native'

    def float32_step(self, name, params, state, nudge=0.):
        "Native's step of float32 copies of `params`, with gradients that differ by the relative `nudge`"
        twins = [nn.Parameter(p.detach().clone().float()) for p in params]
        opt = make(name, twins, 'native', wd=.1)
        for p,q in zip(params, twins): q.grad = p.grad.float()*(1+nudge)
        opt.load_state_dict(cast(state, torch.float32))
        opt.step()
        return [q.detach().to(p.dtype) for p,q in zip(params, twins)]

    def rounds_once(self, name, dtype):
        "A step on low-precision storage is a float32 step, rounded at its end"
        params,stream,note = self.to(h.make_params(dtype=dtype)),h.GradStream(1),None
        opt = make(name, params, wd=.1, kahan_sum=False)
        for i in range(8 if self.real else 3):
            set_grads(params, stream, i)
            before = [nn.Parameter(p.detach().clone()) for p in params]
            for p,q in zip(params, before): q.grad = p.grad.clone()
            state = h.detach_copy(opt.state_dict())
            opt.step()
            found,reference = [p.detach() for p in params],self.float32_step(name, before, state)
            try: h.assert_ulps(found, reference, 1, 4*2**-24, f'step {i}')
            except h.Mismatch:
                # a sign that one bit of a gradient decides may go either way
                ways = [reference, *(self.float32_step(name, before, state, s*F32_BIT) for s in (1,-1))]
                low,high = ([torch.stack(o).amin(0) if m is min else torch.stack(o).amax(0) for o in zip(*ways)] for m in (min,max))
                h.assert_ulps(found, [f.clamp(a, b) for f,a,b in zip(found, low, high)], 1, 4*2**-24, f'step {i}')
                note = 'within the noise of native'
        return note

    def nothing_waits(self, name):
        "After the first steps, none synchronizes the CPU with the GPU, with a schedule and new gradient tensors too"
        params,stream = self.to(h.make_params()),h.GradStream(1)
        opt = make(name, params, wd=.1)
        kept = []
        for i in range(8): set_grads(params, stream, i); kept.append([p.grad for p in params])
        def steps(r):
            for i in r:
                for p,g in zip(params, kept[i]): p.grad = g
                opt.set_hyper('lr', .01/(1+i))
                opt.step()
        steps(range(4)); self.dev.sync()
        if self.real: torch.cuda.set_sync_debug_mode('error')
        try: steps(range(4, 8))
        finally:
            if self.real: torch.cuda.set_sync_debug_mode('default')

    # ------------------------------------------------------------ memory
    def layouts_and_offsets(self):
        "Transposed, sliced and unaligned views; nothing next to them changes"
        runs = []
        for cls in (FusedOptimizer, Optimizer):
            base = torch.arange(400., device=self.dev.device).view(20,20)/100
            params = [nn.Parameter(v) for v in (base[0,1:14], base[1:5].t(), base[6:12:2,3:9], base[13:15])]
            opt = cls(params, [weight_decay, average_grad, momentum_step], lr=.1, wd=.1, mom=.9)
            for i in range(4):
                for p in params: p.grad = torch.full_like(p, .1*i)
                opt.step()
            runs.append(base)
        h.assert_same(runs[0], runs[1], **h.TOL[torch.float32])

    def more_than_32_bits(self):
        "A tensor of more than 2**31 elements, to its last one"
        n = 2**31 + 5000 if self.real else 5000
        if self.real and self.dev.free() < 6*n: return 'not enough memory'
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=self.dev.device)); p.grad = torch.full_like(p, .5)
        get_optimizer('sgd').func([p], lr=1., mom=0., wd=0., fused=True).step()
        assert (p.detach() == .5).all()

    def mixed_dtypes(self):
        "Parameters of three dtypes in one optimizer"
        runs = []
        for mode in ('fused','native'):
            dts = [torch.float32, torch.float64, torch.bfloat16] # without float16: native loses squares below 6e-8 there
            params = [nn.Parameter(p.detach().to(self.dev.device, dts[j%3])) for j,p in enumerate(h.make_params())]
            opt,stream = make('adam', params, mode, kahan_sum=False),h.GradStream(1)
            set_grads(params, stream, 0); opt.step()
            runs.append([p.detach() for p in params])
        for a,b in zip(*runs): h.assert_same(a, b, rtol=4*torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps)

    # ------------------------------------------------------------ streams, devices, graphs
    def other_streams(self):
        """Launch tables made on one stream, used on a second one that is held up, and freed meanwhile: new tensors of the first stream must
        not reuse their memory"""
        params = self.to(h.make_params()); twins = [nn.Parameter(p.detach().clone()) for p in params]
        a,b,stream = make('adam', params),make('adam', twins, 'native'),h.GradStream(2)
        one,other = (torch.cuda.Stream(), torch.cuda.Stream()) if self.real else (None, None)
        for i in range(6):
            set_grads(params, stream, i)
            for p,q in zip(params, twins): q.grad = p.grad.clone()
            b.step()
            if not self.real: a.step(); continue
            self.dev.sync()
            with torch.cuda.stream(one if i%2 == 0 else other):
                if i%2: torch.cuda._sleep(100_000_000)
                a.step()
            if i%2:
                sizes = [t.numel() for l in getattr(a, 'opt', a)._plan.launches.values() for t in (l.chunks, l.tensors, l.addresses[1])]
                a._plan = None # frees the tables, whose last use still waits
                with torch.cuda.stream(one):
                    junk = [torch.full((n,), -1, dtype=torch.int64, device=self.dev.device) for n in sizes*4]
                del junk
        h.assert_same([p.detach() for p in params], [q.detach() for q in twins], **h.TOL[torch.float32])

    def two_devices(self):
        n = torch.cuda.device_count() if self.real else 1
        if n < 2: return 'one device here'
        runs = []
        for mode in ('fused','native'):
            params = [nn.Parameter(p.detach().to(f'cuda:{i%2}')) for i,p in enumerate(h.make_params())]
            opt,stream = make('lamb', params, mode),h.GradStream(1)
            for i in range(6): set_grads(params, stream, i); opt.step()
            runs.append([p.detach().cpu() for p in params])
        h.assert_same(*runs, **h.TOL[torch.float32])

    def capture_is_refused(self):
        if not self.real: return 'no graphs here'
        params = self.to(h.make_params())
        opt,graph = make('adam', params),torch.cuda.CUDAGraph()
        set_grads(params, h.GradStream(), 0); opt.step()
        held = [p.detach().clone() for p in params]
        try:
            with torch.cuda.graph(graph): opt.step()
        except UnsupportedError as e: assert 'captured' in str(e)
        else: raise AssertionError('a captured step was not refused')
        h.assert_same([p.detach() for p in params], held)

    # ------------------------------------------------------------ AMP
    def scaler(self, **kw): return torch.amp.GradScaler(torch.device(self.dev.device).type, **kw)

    def amp(self, name, amp_scaling):
        "torch's GradScaler with overflows; `amp_scaling` unscales in the kernel"
        runs = []
        for mode in ('fused','native'):
            params = self.to(h.make_params([(5,),(4,4)]))
            if callable(name): opt = (FusedOptimizer if mode=='fused' else Optimizer)(h.two_groups(params), [name], lr=.01)
            else: opt = make(name, params, mode)
            stream,scaler = h.GradStream(1),self.scaler(init_scale=2.**10, growth_interval=3)
            if mode=='fused' and amp_scaling: opt.amp_scaling = True
            for i in range(8):
                set_grads(params, stream, i)
                scaler.scale(torch.ones((), device=self.dev.device))
                for p in params: p.grad.mul_(scaler.get_scale())
                if i in (0,1,4): params[1].grad.view(-1)[0] = float('inf')
                scaler.step(opt); scaler.update()
            runs.append(([p.detach() for p in params], h.detach_copy(opt.state_dict())))
        h.assert_same(runs[0], runs[1], **h.TOL[torch.float32])

    def amp_waits_for_nothing(self):
        "A loop with GradScaler never synchronizes when the kernel unscales"
        params = self.to(h.make_params())
        opt,scaler,stream = make('adam', params),self.scaler(init_scale=4.),h.GradStream(1)
        opt.amp_scaling = True
        kept,loss = [],torch.ones((), device=self.dev.device)
        for i in range(8): set_grads(params, stream, i); kept.append([p.grad for p in params])
        try:
            for i in range(8):
                if self.real and i==4: self.dev.sync(); torch.cuda.set_sync_debug_mode('error')
                for p,g in zip(params, kept[i]): p.grad = g
                scaler.scale(loss); scaler.step(opt); scaler.update()
        finally:
            if self.real: torch.cuda.set_sync_debug_mode('default')

def checks(dev):
    "(name, function) pairs"
    c = Checks(dev)
    for n in [o.name for o in list_optimizers() if 'fused' in o.modes]:
        yield f'{n} float32',partial(c.equals_native, n, torch.float32, wd=.1)
        yield f'{n} float64',partial(c.equals_native, n, torch.float64, wd=.1)
        yield f'{n} bfloat16',partial(c.rounds_once, n, torch.bfloat16)
        yield f'{n} no synchronization',partial(c.nothing_waits, n)
    yield 'adam float16',partial(c.rounds_once, 'adam', torch.float16)
    yield from (('layouts and offsets', c.layouts_and_offsets), ('two devices', c.two_devices), ('mixed dtypes', c.mixed_dtypes),
                ('capture', c.capture_is_refused), ('2**31 elements', c.more_than_32_bits),
                ('GradScaler without synchronization', c.amp_waits_for_nothing), ('streams', c.other_streams))
    for n in ('adam','lamb',keeps_gradient):
        title = getattr(n, '__name__', n)
        yield f'{title} GradScaler',partial(c.amp, n, False)
        yield f'{title} GradScaler in the kernel',partial(c.amp, n, True)
