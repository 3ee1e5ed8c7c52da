#!/usr/bin/env python
"""The fused mode on a GPU: is it right, and how fast is it? One call, under eight minutes on one GPU.

    python bench/gpu.py --out bench/results                 # writes gpu.json, gpu.md and gpu.png, with the device's name
    python bench/gpu.py --interpret --out /tmp/gpu_try      # every part in small on a CPU, through Triton's interpreter; its times mean nothing

Parts (`--parts`): `correct`, every optimizer in float32 and bfloat16 on the device against native, and what must hold of a step (no synchronisation,
streams, torch's AMP, the refusal of a capture); `first`, the first step of a new kernel in a fresh process; `models`, step times in turns of native,
foreach, jit and fused beside torch.optim and optimi; `sweep`, the launch's block and warps.

Two times are taken. `gpu`: between two CUDA events, behind a kernel that sleeps while the CPU fills the queue. `wall`: from the call to a
synchronisation, an idle GPU before it: what launch-bound models feel. CUDA's queue holds about a thousand launches (four times as many here): a
contestant with more of them keeps the GPU waiting even so, which `late` says (the CPU was still launching when the sleep was over) and the table marks
with *. Each part is a process of its own, so that a fault in one leaves the others' results; what was not run is named in the result.

On the machine that `device` lends, which has torch and Triton but no fastai, wheels have to travel: fastai fastcore fastprogress fasttransform
plum-dispatch beartype python-fasthtml starlette itsdangerous python-multipart torch-optimi (`pip download --no-deps` into .whl, as the tool's page says).
Before the real run try `python3 -c "from fastxtend_opt.all import *"` and `bench/gpu.py --minutes 1 --models xresnet18 --optimizers adam` there.
"""
import argparse, contextlib, json, os, subprocess, sys, tempfile, time, traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

OPTIMIZERS = ('adam','radam','qhadam','lamb','larc','ranger','sgd','rmsprop')
MODELS = ('xresnet50','deberta_base','matrices','mlp2000','xresnet18','xresnet101','xse_resnext50','convnext_tiny','convnext_small','vit_s16') # those of the goals first
PARTS = ('correct','models','first','sweep')
SHARE = dict(correct=.3, models=.8, first=.9, sweep=1.) # of the minutes: when a part has to be over

def arguments():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', type=Path, default=ROOT/'bench'/'results', help='folder of the results (default: %(default)s)')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    p.add_argument('--optimizers', nargs='+', choices=OPTIMIZERS, default=list(OPTIMIZERS))
    p.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    p.add_argument('--minutes', type=float, default=7.5, help='when to stop starting new cases (default: %(default)s)')
    p.add_argument('--rounds', type=int, default=15, help='samples of each contestant, fewer of slow ones (default: %(default)s)')
    p.add_argument('--interpret', action='store_true', help="on a CPU, in small, through Triton's interpreter")
    p.add_argument('--probe', help=argparse.SUPPRESS)
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

# ---------------------------------------------------------------- the device
class Cuda:
    "Clocks, events and sizes of a real GPU"
    def __init__(self):
        import torch
        if not torch.cuda.is_available(): raise SystemExit('bench/gpu.py: there is no CUDA or ROCm device here; --interpret runs every part in small on a CPU.')
        self.torch,self.device = torch,torch.device('cuda', torch.cuda.current_device())
        self.flush = torch.zeros(2**28//4, device=self.device) # more than any L2 holds
    @property
    def name(self): return self.torch.cuda.get_device_name()
    def sync(self): self.torch.cuda.synchronize()
    def free(self): return self.torch.cuda.mem_get_info()[0] + self.torch.cuda.memory_reserved() - self.torch.cuda.memory_allocated()
    def clear(self): self.torch.cuda.empty_cache()
    def gpu_ms(self, f, sleep_ms=10.):
        "Time of what `f` puts on the GPU, which sleeps until the CPU has put it there; and whether the CPU was late"
        start,end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.add_(1)
        self.sync()
        self.torch.cuda._sleep(int(sleep_ms*2e6)) # cycles, at about 2 GHz
        t = time.perf_counter()
        start.record(); f(); end.record()
        late = (time.perf_counter()-t)*1e3 > .9*sleep_ms
        end.synchronize()
        return start.elapsed_time(end),late
    def copy_gbps(self):
        "Bytes read and written a second by a copy on the device"
        n = 2**30
        a,b = (self.torch.empty(n, dtype=self.torch.uint8, device=self.device) for _ in range(2))
        b.copy_(a)
        ms = sorted(self.gpu_ms(lambda: [b.copy_(a) for _ in range(5)])[0]/5 for _ in range(9))[4]
        return 2*n/ms/1e6
    def info(self):
        p = self.torch.cuda.get_device_properties(self.device)
        return dict(device=self.name, memory_gb=p.total_memory/2**30, processors=p.multi_processor_count, copy_gbps=self.copy_gbps())

class Interpreter:
    "The same on a CPU, in small"
    name,device = "Triton's interpreter on a CPU",'cpu'
    def sync(self): pass
    def free(self): return 2**33
    def clear(self): pass
    def gpu_ms(self, f, sleep_ms=0.):
        t = time.perf_counter(); f()
        return (time.perf_counter()-t)*1e3,False
    def info(self): return dict(device=self.name, memory_gb=0., processors=0, copy_gbps=1.)

def wall_ms(dev, f):
    dev.sync()
    t = time.perf_counter(); f(); dev.sync()
    return (time.perf_counter()-t)*1e3

def median(xs): return sorted(xs)[len(xs)//2]

# ---------------------------------------------------------------- is it right?
def to(dev, params):
    from torch import nn
    return [nn.Parameter(p.detach().to(dev.device)) for p in params] # keeps strides of what fills its memory

def checks(dev):
    "A (name, function) pair a check; a function returns nothing or raises"
    import torch
    from torch import nn
    from fastai.optimizer import Optimizer
    from fastxtend_opt.optimizer.fused import FusedOptimizer
    from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
    from fastxtend_opt.engine.kinds import UnsupportedError
    import helpers as h
    real = dev.device != 'cpu'
    def make(name, params, mode='fused', **kw): return get_optimizer(name).func(h.two_groups(params), lr=.01, **{mode:True} if mode!='native' else {}, **kw)
    def grads(params, stream, i, skip=()):
        for j,p in enumerate(params):
            p.grad = None
            if j not in skip: p.grad = torch.empty_like(p).copy_(stream.values(p, i, j).to(p.dtype))

    def equals_native(name, dtype, **kw):
        "25 steps with late and vanishing gradients, decay left out on some, a schedule; elements from none to more than a chunk, channels_last"
        runs = []
        for mode in ('fused','native'):
            params = to(dev, h.make_params(dtype=dtype))
            opt,stream = make(name, params, mode, **kw),h.GradStream(1)
            for p in params[::3]: opt.state[p]['do_wd'] = False
            for i in range(25 if real else 7):
                opt.set_hyper('lr', .01/(1+i))
                grads(params, stream, i, [j for j in range(len(params)) if i < 2*j%7])
                opt.step()
            runs.append(([p.detach() for p in params], h.detach_copy(opt.state_dict())))
        h.assert_same(runs[0][0], runs[1][0], **h.TOL[dtype], path='params')
        h.assert_same(runs[0][1], runs[1][1], **h.TOL[dtype], path='state')

    def rounds_once(name, dtype):
        "A step on low-precision storage is a float32 step, rounded at its end"
        params,stream = to(dev, h.make_params(dtype=dtype)),h.GradStream(1)
        opt = make(name, params, wd=.1, kahan_sum=False)
        for i in range(8 if real else 3):
            grads(params, stream, i)
            twins = [nn.Parameter(p.detach().clone().float()) for p in params]
            twin = make(name, twins, 'native', wd=.1)
            for p,q in zip(params, twins): q.grad = p.grad.clone().float()
            cast = lambda o: {k:cast(v) for k,v in o.items()} if isinstance(o, dict) else [cast(v) for v in o] if isinstance(o, (list,tuple)) else o.to(torch.float32) if isinstance(o, torch.Tensor) else o
            twin.load_state_dict(cast(h.detach_copy(opt.state_dict())))
            opt.step(); twin.step()
            h.assert_ulps([p.detach() for p in params], [q.detach().to(dtype) for q in twins], 1, 4*2**-24, f'step {i}')

    def nothing_waits(name):
        "No step after the first ones synchronises the CPU with the GPU, also with a schedule and with new gradient tensors"
        params,stream = to(dev, h.make_params()),h.GradStream(1)
        opt = make(name, params, wd=.1)
        kept = []
        for i in range(8): grads(params, stream, i); kept.append([p.grad for p in params])
        def steps(r):
            for i in r:
                for p,g in zip(params, kept[i]): p.grad = g
                opt.set_hyper('lr', .01/(1+i))
                opt.step()
        steps(range(4)); dev.sync()
        if real: torch.cuda.set_sync_debug_mode('error')
        try: steps(range(4, 8))
        finally:
            if real: torch.cuda.set_sync_debug_mode('default')

    def layouts_and_offsets():
        "Transposed, sliced and unaligned views; nothing beside them is touched"
        runs = []
        for cls in (FusedOptimizer, Optimizer):
            base = torch.arange(400., device=dev.device).view(20,20)/100
            views = [base[0,1:14], base[1:5].t(), base[6:12:2,3:9], base[13:15]]
            params = [nn.Parameter(v) for v in views]
            from fastai.optimizer import weight_decay, average_grad, momentum_step
            opt = cls(params, [weight_decay, average_grad, momentum_step], lr=.1, wd=.1, mom=.9)
            for i in range(4):
                for p in params: p.grad = torch.full_like(p, .1*i)
                opt.step()
            runs.append(base)
        h.assert_same(runs[0], runs[1], **h.TOL[torch.float32])

    def other_streams():
        "Tables made on one stream, used on a second that is held up, and freed meanwhile: the first one's new tensors must not lie on them"
        params = to(dev, h.make_params()); twins = [nn.Parameter(p.detach().clone()) for p in params]
        a,b,stream = make('adam', params),make('adam', twins, 'native'),h.GradStream(2)
        def both(i):
            grads(params, stream, i)
            for p,q in zip(params, twins): q.grad = p.grad.clone()
            b.step()
        one,other = (torch.cuda.Stream(), torch.cuda.Stream()) if real else (None, None)
        for i in range(6):
            both(i)
            if not real: a.step(); continue
            dev.sync()
            with torch.cuda.stream(one if i%2 == 0 else other):
                if i%2: torch.cuda._sleep(100_000_000)
                a.step()
            if i%2:
                sizes = [t.numel() for l in getattr(a, 'opt', a)._plan.launches.values() for t in (l.chunks, l.tensors, l.addresses[1])]
                a._plan = None # frees the tables, whose last use is still waiting
                with torch.cuda.stream(one): junk = [torch.full((n,), -1, dtype=torch.int64, device=dev.device) for n in sizes*4]
                del junk
        h.assert_same([p.detach() for p in params], [q.detach() for q in twins], **h.TOL[torch.float32])

    def more_than_32_bits():
        "A tensor of more than 2**31 elements, to its last one"
        n = 2**31 + 5000 if real else 5000
        if real and dev.free() < 6*n: return 'not enough memory'
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=dev.device)); p.grad = torch.full_like(p, .5)
        get_optimizer('sgd').func([p], lr=1., mom=0., wd=0., fused=True).step()
        assert (p.detach() == .5).all()

    def two_devices():
        n = torch.cuda.device_count() if real else 1
        if n < 2: return 'one device here'
        runs = []
        for mode in ('fused','native'):
            params = [nn.Parameter(p.detach().to(f'cuda:{i%2}')) for i,p in enumerate(h.make_params())]
            opt,stream = make('lamb', params, mode),h.GradStream(1)
            for i in range(6): grads(params, stream, i); opt.step()
            runs.append([p.detach().cpu() for p in params])
        h.assert_same(*runs, **h.TOL[torch.float32])

    def amp(name, amp_scaling):
        "torch's GradScaler with overflows, by the plain way and in the kernel"
        runs = []
        for mode in ('fused','native'):
            params = to(dev, h.make_params([(5,),(4,4)]))
            if callable(name): opt = (FusedOptimizer if mode=='fused' else Optimizer)(h.two_groups(params), [name], lr=.01)
            else: opt = make(name, params, mode)
            stream = h.GradStream(1)
            if mode=='fused' and amp_scaling: opt.amp_scaling = True
            scaler = torch.amp.GradScaler(torch.device(dev.device).type, init_scale=2.**10, growth_interval=3)
            for i in range(8):
                grads(params, stream, i)
                scaler.scale(torch.ones((), device=dev.device))
                s = scaler.get_scale()
                for p in params: p.grad.mul_(s)
                if i in (0,1,4): params[1].grad.view(-1)[0] = float('inf')
                scaler.step(opt); scaler.update()
            runs.append(([p.detach() for p in params], h.detach_copy(opt.state_dict())))
        h.assert_same(runs[0], runs[1], **h.TOL[torch.float32])

    def amp_waits_for_nothing():
        "With the scaling in the kernel, a loop with GradScaler synchronises nowhere"
        params = to(dev, h.make_params())
        opt,scaler,stream = make('adam', params),torch.amp.GradScaler(torch.device(dev.device).type, init_scale=4.),h.GradStream(1)
        opt.amp_scaling = True
        kept = []
        for i in range(8): grads(params, stream, i); kept.append([p.grad for p in params])
        loss = torch.ones((), device=dev.device)
        for i in range(8):
            if real and i==4: dev.sync(); torch.cuda.set_sync_debug_mode('error')
            try:
                for p,g in zip(params, kept[i]): p.grad = g
                scaler.scale(loss); scaler.step(opt); scaler.update()
            except BaseException:
                if real: torch.cuda.set_sync_debug_mode('default')
                raise
        if real: torch.cuda.set_sync_debug_mode('default')

    def keeps_gradient(p, lr, buf=None, prev=None, **kwargs):
        buf = p.grad.data.clone() if buf is None else buf.mul_(.9).add_(p.grad.data)
        if prev is None: prev = torch.zeros_like(p.data)
        n = p.grad.data.norm()
        prev.copy_(p.grad.data)
        p.data.sub_((buf + p.grad.data/(n + 1))*lr)
        return {'buf': buf, 'prev': prev}

    def capture_is_refused():
        if not real: return 'no graphs here'
        params = to(dev, h.make_params())
        opt,graph = make('adam', params),torch.cuda.CUDAGraph()
        grads(params, h.GradStream(), 0); opt.step()
        held = [p.detach().clone() for p in params]
        try:
            with torch.cuda.graph(graph): opt.step()
        except UnsupportedError as e: assert 'captured' in str(e)
        else: raise AssertionError('a captured step was not refused')
        h.assert_same([p.detach() for p in params], held)

    def mixed_dtypes():
        runs = []
        for mode in ('fused','native'):
            dts = [torch.float32, torch.float64, torch.bfloat16] # not float16: native loses squares below 6e-8 there
            params = [nn.Parameter(p.detach().to(dev.device, dts[j%3])) for j,p in enumerate(h.make_params())]
            opt,stream = make('adam', params, mode, kahan_sum=False),h.GradStream(1)
            grads(params, stream, 0); opt.step()
            runs.append([p.detach() for p in params])
        for a,b in zip(*runs): h.assert_same(a, b, rtol=4*torch.finfo(a.dtype).eps, atol=torch.finfo(a.dtype).eps)

    names = [o.name for o in list_optimizers() if 'fused' in o.modes]
    for n in names:
        yield f'{n} float32', partial(equals_native, n, torch.float32, wd=.1)
        yield f'{n} float64', partial(equals_native, n, torch.float64, wd=.1)
        yield f'{n} bfloat16', partial(rounds_once, n, torch.bfloat16)
        yield f'{n} no synchronisation', partial(nothing_waits, n)
    yield 'adam float16',partial(rounds_once, 'adam', torch.float16)
    yield from (('layouts and offsets', layouts_and_offsets), ('two devices', two_devices), ('mixed dtypes', mixed_dtypes), ('capture', capture_is_refused), ('2**31 elements', more_than_32_bits),
                ('GradScaler without synchronisation', amp_waits_for_nothing), ('streams', other_streams))
    for n in ('adam','lamb',keeps_gradient): yield from ((f'{getattr(n, "__name__", n)} GradScaler', partial(amp, n, False)), (f'{getattr(n, "__name__", n)} GradScaler in the kernel', partial(amp, n, True)))

def part_correct(a, dev, out, left):
    out['correct'] = []
    for name,f in checks(dev):
        if left() < 3: out['not_run'].append(f'correct: {name}'); continue
        try: res = dict(check=name, ok=True, note=f() or '')
        except Exception as e: res = dict(check=name, ok=False, note=f'{type(e).__name__}: {e}'[:600], trace=traceback.format_exc()[-1500:])
        out['correct'].append(res)
        out['save']()
        if not res['ok']: print(f"WRONG {name}: {res['note']}", flush=True)
    print(f"correct: {sum(c['ok'] for c in out['correct'])} of {len(out['correct'])}", flush=True)

# ---------------------------------------------------------------- the first step
def probe(name, device):
    "In a fresh process with empty caches: the first step, and a later one"
    import torch
    from torch import nn
    from fastxtend_opt.definition.registry import get_optimizer
    dev = Interpreter() if device=='cpu' else Cuda()
    params = [nn.Parameter(torch.ones(s, device=dev.device)) for s in ((256,64), (256,), (10,256))]
    for p in params: p.grad = torch.ones_like(p)
    opt = get_optimizer(name).func(params, lr=.01, wd=.01, fused=True)
    ms = [wall_ms(dev, opt.step) for _ in range(8)]
    print('\n'+json.dumps(dict(first_ms=ms[0], later_ms=median(ms[3:]))))

def part_first(a, dev, out, left):
    out['first'] = []
    for name in [n for n in ('lamb','adam','ranger') if n in a.optimizers] or a.optimizers[:1]:
        if left() < 12: out['not_run'].append(f'first: {name}'); continue
        with tempfile.TemporaryDirectory(prefix='gpu_first') as d:
            env = {**os.environ, 'TRITON_CACHE_DIR':f'{d}/triton', 'FASTXTEND_OPT_CACHE':f'{d}/own', 'PYTHONWARNINGS':'ignore'}
            rs = [subprocess.run([sys.executable, __file__, '--probe', name, *(['--interpret'] if a.interpret else [])], env=env, capture_output=True, text=True, timeout=120) for _ in range(2)]
        if any(r.returncode for r in rs): out['not_run'].append(f'first: {name}: {rs[0].stderr[-300:]}'); continue
        cold,warm = (json.loads(r.stdout.splitlines()[-1]) for r in rs)
        out['first'].append(dict(optimizer=name, cold_ms=cold['first_ms'], warm_ms=warm['first_ms'], later_ms=warm['later_ms']))
    print('first step, cold:', {f['optimizer']: round(f['cold_ms']) for f in out['first']}, flush=True)

# ---------------------------------------------------------------- step times
def rows_of(a, model):
    from fastxtend_opt.tools.benchmark import model_rows
    if model == 'matrices': return [(0, 1, (8192,7680))]*16 if not a.interpret else [(0, 1, (64,60))]*16 # 1.007e9 elements
    rows = model_rows(model)
    return rows if not a.interpret else [(g, d, tuple(min(n, 4) for n in s)) for g,d,s in rows][:12]

def bytes_of(opt, p, n, reduction, every):
    "Bytes that a step has to move, by the states that it holds; a reduction reads them once more"
    from fastxtend_opt.tools.bench.overhead import count_states
    from fastxtend_opt.tools.bench.traffic import step_bytes
    full,slow = count_states(opt, p)
    return n*step_bytes(full, p.element_size(), reduction, every if slow else 0)

def case(a, dev, model, optimizer, dtype, copy_gbps, out):
    import torch
    from fastxtend_opt.definition.registry import get_optimizer
    from fastxtend_opt.tools import benchmark as b
    from fastxtend_opt.tools.bench.contestants import settings
    pset = b.ParamSet(rows_of(a, model), device=dev.device, dtype=dtype)
    pset.saved = None # gradients are not zeroed here
    n,size = pset.elements,sum(p.numel()*p.element_size() for p in pset.params)
    modes = ('foreach','jit','fused') if dtype is torch.float32 else ('foreach','fused')
    found,missing = b.contestants(optimizer, modes, ('torch','optimi') if not a.interpret else ('torch',), gpu=not a.interpret)
    if model == 'matrices': found = [c for c in found if c.mode in ('fused','foreach','triton','native')]
    out['missing'] += [dict(model=model, optimizer=optimizer, who=w, why=y) for w,y in missing]
    every,turns,skipped = settings.get(optimizer, {}).get('k', 1),{},[]
    for c in sorted(found, key=lambda c: c.mode != 'fused'): # where memory is short, the fused ones come first
        if dev.free() < 6*size + 2**30: skipped.append(c.label); continue
        try:
            opt = c.make(pset, 1e-5)
            for _ in range(3): opt.step()
            ms = wall_ms(dev, opt.step)
            reps = max(3, min(a.rounds, int(600/max(ms, .01)))) if not a.interpret else 2 # slow ones get fewer samples
            turns[c.label] = dict(c=c, opt=opt, reps=reps, ms=ms, gpu=[], wall=[], late=0)
        except Exception as e: out['missing'].append(dict(model=model, optimizer=optimizer, who=c.label, why=f'{type(e).__name__}: {e}'[:300]))
    if skipped: out['missing'].append(dict(model=model, optimizer=optimizer, who=', '.join(skipped), why='not enough memory on the device'))
    names = list(turns)
    for r in range(max((t['reps'] for t in turns.values()), default=0)):
        for k in names[r%len(names):] + names[:r%len(names)]:
            t = turns[k]
            if r >= t['reps']: continue
            ms,late = dev.gpu_ms(lambda: [t['opt'].step() for _ in range(every)], max(1., min(t['ms']*3*every, 600)))
            t['gpu'].append(ms/every); t['late'] += late
            t['wall'].append(wall_ms(dev, lambda: [t['opt'].step() for _ in range(every)])/every)
    res = []
    for k,t in turns.items():
        reduction = get_optimizer(optimizer).kind=='reduction'
        by = bytes_of(t['opt'], pset.params[0], n, reduction, every)
        g = median(t['gpu'])
        res.append(dict(model=model, optimizer=optimizer, dtype=str(dtype)[6:], contestant=k, lib=t['c'].lib, mode=t['c'].mode, tensors=len(pset.params), elements=n,
                        gpu_ms=g, wall_ms=median(t['wall']), samples=len(t['gpu']), late=t['late'], gpu_min=min(t['gpu']), gpu_max=max(t['gpu']), bytes=by, of_copy=by/g/1e6/copy_gbps))
    out['rows'] += res
    print(f"{model} {optimizer} {str(dtype)[6:]}: " + ', '.join(f"{r['contestant']} {r['gpu_ms']:.3f}/{r['wall_ms']:.3f}" for r in sorted(res, key=lambda r: r['gpu_ms'])), flush=True)

def part_models(a, dev, out, left):
    import torch
    from fastxtend_opt.tools.bench.turns import without_gc
    cases = [(m, o, torch.float32) for m in a.models for o in a.optimizers]
    first = [c for c in cases if c[1]=='adam' or c[0] in ('xresnet50','deberta_base')] # what the goals speak of
    first.sort(key=lambda c: c[:2] != ('matrices','adam'))
    cases = first + [(m, o, torch.bfloat16) for m in a.models for o in ('adam',) if m in ('matrices','deberta_base') and o in a.optimizers] + [c for c in cases if c not in first]
    for m,o,d in cases:
        if left() < 8: out['not_run'].append(f'models: {m} {o} {str(d)[6:]}'); continue
        try:
            with without_gc(): case(a, dev, m, o, d, out['machine']['copy_gbps'], out)
            dev.clear()
        except Exception as e: out['not_run'].append(f'models: {m} {o}: {type(e).__name__}: {e}'[:300])
        out['save']()

def part_sweep(a, dev, out, left):
    "Other blocks and warps than the package's, in turns: what `engine.triton_launch` should hold"
    import torch
    from fastxtend_opt.engine import triton_launch
    from fastxtend_opt.tools.benchmark import ParamSet, contestants
    names = 'GPU_BLOCK','GPU_WARPS','GPU_CHUNK','GPU_PROGRAMS'
    default = tuple(getattr(triton_launch, n) for n in names)
    def use(s):
        for n,v in zip(names, s): setattr(triton_launch, n, v)
    sizes = [(512,4,2**14,2**13), (1024,8,2**14,2**13), (2048,4,2**14,2**13), (2048,8,2**14,2**13), (1024,4,2**14,2**11), (1024,4,2**14,2**15), (1024,4,2**16,2**13), (1024,2,2**14,2**13)] if not a.interpret else [(256,4,1024,1)]
    out['sweep'] = []
    for model,optimizer,dtype in (('xresnet50','adam',torch.float32), ('matrices','adam',torch.float32), ('matrices','adam',torch.bfloat16), ('xresnet50','lamb',torch.float32)):
        if left() < 8: out['not_run'].append(f'sweep: {model} {optimizer}'); continue
        opts = {}
        try:
            pset = ParamSet(rows_of(a, model), device=dev.device, dtype=dtype)
            pset.saved = None
            for s in dict.fromkeys([default, *sizes]):
                use(s)
                opt = contestants(optimizer, ('fused',), (), baseline=False)[0][0].make(pset, 1e-5)
                opt.step(); opt.step()
                opts[s] = opt,[]
            for r in range(12 if not a.interpret else 1):
                for s,(opt,ts) in opts.items():
                    use(s)
                    ts.append(dev.gpu_ms(opt.step)[0])
        except Exception as e: out['not_run'].append(f'sweep: {model} {optimizer}: {type(e).__name__}: {e}'[:300])
        finally: use(default)
        out['sweep'] += [dict(model=model, optimizer=optimizer, dtype=str(dtype)[6:], block=s[0], warps=s[1], chunk=s[2], programs=s[3], gpu_ms=median(ts), default=s==default) for s,(_,ts) in opts.items() if ts]
        del opts
        out['save']()
        dev.clear()
    for s in out['sweep']: print('sweep', s, flush=True)

# ---------------------------------------------------------------- the result
def goals(out):
    "(goal, case, wanted, measured, reached) rows"
    t = {(r['model'],r['optimizer'],r['dtype'],r['contestant']):r for r in out['rows']}
    res = []
    def add(goal, what, wanted, value, most=False): res.append(dict(goal=goal, case=what, wanted=wanted, value=value, most=most, reached=None if value is None else (value<=wanted if most else value>=wanted)))
    for m in dict.fromkeys(r['model'] for r in out['rows']):
        a,b = (t.get((m,'adam','float32',k)) for k in ('fastxtend_opt fused','torch fused'))
        add("fused Adam, times as fast as torch's fused AdamW", m, 1., b['gpu_ms']/a['gpu_ms'] if a and b else None)
    a = t.get(('matrices','adam','float32','fastxtend_opt fused'))
    add('share of copy bandwidth', '1e9 elements, adam', .85, a and a['of_copy'])
    for m in ('xresnet50','deberta_base'):
        for o in ('radam','qhadam','lamb','larc','ranger'):
            own = t.get((m,o,'float32','fastxtend_opt fused'))
            others = [r['gpu_ms'] for k,r in t.items() if k[:3]==(m,o,'float32') and r['lib'] in ('torch','fastai')]
            add("times as fast as the best of torch and fastai", f'{m} {o}', 3., min(others)/own['gpu_ms'] if own and others else None)
    a = t.get(('deberta_base','adam','float32','fastxtend_opt fused'))
    add('wall time of a step, ms', f"DeBERTa, adam, {a['tensors']} tensors" if a else 'DeBERTa', .15, a and a['wall_ms'], most=True)
    for f in out.get('first', []): add('first step of a new kernel, ms, cold', f['optimizer'], 3000., f['cold_ms'], most=True)
    return res

def report(out):
    from fastxtend_opt.tools.bench.format import format_number as _f, markdown_table as _md
    from fastxtend_opt.tools.bench.models import list_models
    titles = {**list_models(), 'matrices':'16 matrices, 1e9 elements'}
    m = out['machine']
    s = [f"# Fused on a GPU\n\n{m['device']}, {m['memory_gb']:.0f} GB; a copy on the device moves {m['copy_gbps']:,.0f} GB/s. {m['when']}; " + ', '.join(f'{k} {v}' for k,v in m['versions'].items()) + '\n']
    if 'correct' in out:
        bad = [c for c in out['correct'] if not c['ok']]
        s.append(f"## Correctness: {len(out['correct'])-len(bad)} of {len(out['correct'])} checks hold\n\n" + '\n'.join(f"- **{c['check']}**: {c['note']}" for c in bad) + '\n')
    if out['rows'] and m['processors']: # the interpreter's times mean nothing
        said = {True:'yes', False:'**no**', None:'not measured'}
        s.append('## Goals\n\n' + _md(['goal','case','wanted','measured','reached'], [[g['goal'], g['case'], ('<= ' if g['most'] else '>= ')+_f(g['wanted']), _f(g['value']), said[g['reached']]] for g in goals(out)]) + '\n')
    for model,opt,dt in dict.fromkeys((r['model'],r['optimizer'],r['dtype']) for r in out['rows']):
        rs = sorted((r for r in out['rows'] if (r['model'],r['optimizer'],r['dtype'])==(model,opt,dt)), key=lambda r: -r['gpu_ms'])
        nat = next((r['gpu_ms'] for r in rs if r['contestant']=='fastai native'), None)
        s.append(f"### {titles.get(model, model)}, {opt}, {dt}\n\n{rs[0]['tensors']:,} tensors, {rs[0]['elements']/1e6:.1f} M elements\n\n" +
                 _md(['','GPU ms','wall ms','x fastai (GPU)','share of copy bandwidth','samples'], [[r['contestant'], _f(r['gpu_ms']) + ' *'*(r['late'] > r['samples']/2), _f(r['wall_ms']), _f(nat and nat/r['gpu_ms']), _f(r['of_copy']), str(r['samples'])] for r in rs]) + '\n')
    if out.get('first'): s.append('## First step\n\n' + _md(['optimizer','cold ms','from the disk ms','later ms'], [[f['optimizer'], _f(f['cold_ms']), _f(f['warm_ms']), _f(f['later_ms'])] for f in out['first']]) + '\n')
    if out.get('sweep'): s.append('## Launch sizes\n\n' + _md(['case','block','warps','chunk','programs','GPU ms'], [[f"{w['model']} {w['optimizer']} {w['dtype']}", str(w['block']), str(w['warps']), str(w['chunk']), str(w['programs']), _f(w['gpu_ms']) + (' (default)' if w['default'] else '')] for w in out['sweep']]) + '\n')
    missing = dict.fromkeys(f"{x['model']} {x['optimizer']}: {x['who']}: {x['why']}" for x in out['missing'])
    if missing or out['not_run']: s.append('## Missing, and not run\n\n' + '\n'.join(f'- {x}' for x in [*missing, *out['not_run']]) + '\n')
    return '\n'.join(s)

def plot(out, path):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from fastxtend_opt.tools.bench.models import list_models
    from fastxtend_opt.tools.bench.report import colors, markers
    rows = [r for r in out['rows'] if r['dtype']=='float32']
    opts,titles = list(dict.fromkeys(r['optimizer'] for r in rows)),{**list_models(), 'matrices':'16 matrices, 1e9'}
    models = [m for m in MODELS if any(r['model']==m for r in rows)]
    n = min(4, len(opts))
    fig,axs = plt.subplots(-(-len(opts)//n), n, figsize=(4.2*n, (.9+.36*len(models))*(-(-len(opts)//n))), squeeze=False, layout='constrained', sharey=True)
    seen = {}
    for ax,o in zip(axs.flat, opts):
        for y,m in enumerate(models):
            for r in (r for r in rows if (r['optimizer'],r['model'])==(o,m)):
                own = r['lib']=='fastxtend_opt'
                seen.setdefault(r['contestant'], ax.plot(r['gpu_ms'], y, markers.get(r['mode'],'P'), color=colors.get(r['lib'],'#17becf'), ms=8 if own else 5.5, mec='white', mew=.6, zorder=3+own)[0])
            least = [r['bytes']/out['machine']['copy_gbps']/1e6 for r in rows if (r['optimizer'],r['model'],r['contestant'])==(o,m,'fastxtend_opt fused')]
            if least: seen.setdefault('its bytes at copy bandwidth', ax.plot([least[0]]*2, [y-.38,y+.38], color='black', lw=1.6, zorder=1)[0])
        ax.set_xscale('log'); ax.set_yticks(range(len(models)), [titles.get(m, m) for m in models], fontsize=8.5); ax.set_title(o, fontsize=10); ax.set_xlabel('GPU time of a step, ms', fontsize=8.5)
        ax.tick_params(axis='x', labelsize=8); ax.grid(axis='x', which='both', lw=.3, alpha=.5)
        for sp in ('top','right'): ax.spines[sp].set_visible(False)
    axs[0,0].invert_yaxis()
    for ax in list(axs.flat)[len(opts):]: ax.axis('off')
    fig.legend(list(seen.values()), list(seen), loc='outside lower center', ncols=5, fontsize=8, frameon=False)
    fig.suptitle(out['machine']['device'], fontsize=11)
    fig.savefig(path, dpi=100)

def child(a, start):
    "One part, in a process of its own; what it has is written after each case"
    part,path = a.child.split(':', 1)
    out = json.loads(Path(path).read_text())
    dev = Interpreter() if a.interpret else Cuda()
    left = lambda: SHARE[part]*a.minutes*60 - (time.time()-start)
    if not out['machine']:
        import triton
        from fastxtend_opt.tools.benchmark import machine_info
        out['machine'] = {**machine_info(), **dev.info()}
        out['machine']['versions']['triton'] = triton.__version__
        print(out['machine'], flush=True)
    def save(): Path(path).write_text(json.dumps({k:v for k,v in out.items() if k != 'save'}, indent=1)+'\n')
    out['save'] = save
    save()
    dict(correct=part_correct, first=part_first, sweep=part_sweep, models=part_models)[part](a, dev, out, left)
    save()

def main():
    a = arguments()
    os.environ.setdefault('CUDA_SCALE_LAUNCH_QUEUES', '4x')
    if a.interpret: os.environ['TRITON_INTERPRET'],os.environ['FASTXTEND_OPT_FUSED_BACKEND'] = '1','triton'
    if a.probe: return probe(a.probe, 'cpu' if a.interpret else 'cuda')
    start = float(os.environ.setdefault('GPU_BENCH_START', str(time.time())))
    if a.child: return child(a, start)
    if not a.interpret: Cuda() # or say at once that there is none
    a.out.mkdir(parents=True, exist_ok=True)
    path,failed = a.out/'gpu.json',False
    path.write_text(json.dumps(dict(format=1, kind='gpu', machine=None, rounds=a.rounds, rows=[], missing=[], not_run=[]))+'\n')
    for part in PARTS:
        if part not in a.parts: continue
        limit = SHARE[part]*a.minutes*60 - (time.time()-start) + 15
        try: rc = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--child', f'{part}:{path}'], timeout=max(limit, 20)).returncode
        except subprocess.TimeoutExpired: rc = 'stopped at its time'
        out = json.loads(path.read_text())
        if rc: out['not_run'].append(f'{part}: the process ended with {rc}; what it had is kept'); failed = True
        out['seconds'] = time.time()-start
        path.write_text(json.dumps(out, indent=1)+'\n')
        if out['machine']: (a.out/'gpu.md').write_text(report(out))
    if out['rows']: plot(out, a.out/'gpu.png')
    print(f"{out['seconds']:.0f} s; written: {a.out}/gpu.json, gpu.md" + ', gpu.png'*bool(out['rows']))
    return failed or any(not c['ok'] for c in out.get('correct', []))

if __name__ == '__main__': sys.exit(main())
