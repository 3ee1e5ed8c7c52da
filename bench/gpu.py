#!/usr/bin/env python
"""Check and time the fused mode on a GPU. One call, under eight minutes on one GPU.

    python bench/gpu.py --out bench/results               # writes gpu.json, gpu.md and gpu.png, with the device's name
    python bench/gpu.py --interpret --out /tmp/gpu_try    # small cases of every part, in Triton's interpreter on a CPU; ignore its times
    python bench/gpu.py --parts correct --checks apollo   # only the checks with "apollo" in their name

Parts (`--parts`): `correct`, every optimizer in float32, float64 and bfloat16 compared with native on the device, and properties of a step
(no synchronization, streams, torch's AMP, refusal of a capture), see gpu_checks.py; `first`, the first step of a new kernel in a fresh
process; `models`, step times of native, foreach, jit and fused, of torch.optim and of optimi, in turns; `sweep`, block and warps of the
launch.

Two times are measured. `gpu` is the time between two CUDA events, behind a kernel that sleeps while the CPU fills the queue. `wall` is the
time from the call to a synchronization, starting with an idle GPU: the time of models that are limited by launches. CUDA's queue holds
about a thousand launches (here four thousand). With more of them a contestant keeps the GPU waiting: `late` says that the CPU was still
launching when the sleep ended, and the table marks such times with *. Each part runs in its own process, so that a fault in one keeps the
results of the others. The result names what was not run.

A machine with an NVIDIA GPU, torch, Triton and a C++ compiler, but without fastai and without a network, needs these wheels: fastai
2.8.12, fastcore 2.2.41, fastdownload 0.0.8, fastprogress 1.1.6, fasttransform 0.0.5, plum_dispatch 2.10.1, beartype 0.23.1,
python_fasthtml 0.14.14, starlette 1.10.0, itsdangerous 2.2.0, python_multipart 0.0.34 and torch_optimi 0.3.3 (2.6 MB;
`pip download --no-deps -d .whl`). Install and run them there with

    python3 -m pip install --no-index --no-deps --target .site .whl/*.whl && PYTHONPATH=.site python3 bench/gpu.py --out bench/results

These wheels were tried on a CPU with Python 3.12.1, torch 2.11.0 and Triton 3.6.0: the import and the foreach, jit and C++ modes work. The
interpreter of Triton 3.6 fails with numpy 2.5; compiled kernels don't use numpy.
"""
import argparse, json, os, subprocess, sys, tempfile, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests'), str(ROOT/'bench')]

OPTIMIZERS = ('adam','radam','qhadam','lamb','larc','ranger','sgd','rmsprop')
MODELS = ('xresnet50','deberta_base','matrices','mlp2000','xresnet18','xresnet101','xse_resnext50','convnext_tiny','convnext_small',
          'vit_s16') # the models of the goals first
PARTS = ('correct','models','first','sweep')
SHARE = dict(correct=.3, models=.8, first=.9, sweep=1.) # share of the minutes after which a part has to end

def arguments():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', type=Path, default=ROOT/'bench'/'results', help='folder of the results (default: %(default)s)')
    p.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    p.add_argument('--checks', nargs='+', default=[''], metavar='TEXT', help='run only the checks with one of these texts in their name')
    p.add_argument('--optimizers', nargs='+', choices=OPTIMIZERS, default=list(OPTIMIZERS), help='optimizers to time (default: all)')
    p.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    p.add_argument('--minutes', type=float, default=7.5, help='start no case later than this (default: %(default)s)')
    p.add_argument('--rounds', type=int, default=15, help='samples of each contestant, fewer of slow ones (default: %(default)s)')
    p.add_argument('--interpret', action='store_true', help="run small cases on a CPU, in Triton's interpreter")
    p.add_argument('--probe', help=argparse.SUPPRESS)
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

# ---------------------------------------------------------------- the device
class Cuda:
    "Clocks, events and sizes of a real GPU"
    def __init__(self):
        import torch
        if not torch.cuda.is_available():
            raise SystemExit('bench/gpu.py: there is no CUDA or ROCm device here. --interpret runs small cases of every part on a CPU.')
        self.torch,self.device = torch,torch.device('cuda', torch.cuda.current_device())
        self.flush = torch.zeros(2**28//4, device=self.device) # larger than any L2 cache
    @property
    def name(self): return self.torch.cuda.get_device_name()
    def sync(self): self.torch.cuda.synchronize()
    def free(self): return self.torch.cuda.mem_get_info()[0] + self.torch.cuda.memory_reserved() - self.torch.cuda.memory_allocated()
    def clear(self): self.torch.cuda.empty_cache()
    def gpu_ms(self, f, sleep_ms=10.):
        "GPU time of the work that `f` queues while the GPU sleeps, and whether the CPU was late"
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
        "Bytes that a copy on the device reads and writes per second, in GB"
        n = 2**30
        a,b = (self.torch.empty(n, dtype=self.torch.uint8, device=self.device) for _ in range(2))
        b.copy_(a)
        ms = sorted(self.gpu_ms(lambda: [b.copy_(a) for _ in range(5)])[0]/5 for _ in range(9))[4]
        return 2*n/ms/1e6
    def info(self):
        p = self.torch.cuda.get_device_properties(self.device)
        return dict(device=self.name, memory_gb=p.total_memory/2**30, processors=p.multi_processor_count, copy_gbps=self.copy_gbps())

class Interpreter:
    "The same interface for small cases on a CPU"
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
def part_correct(a, dev, out, left):
    from fastxtend_opt.optimizer.passes import dry_run
    from gpu_checks import checks
    out['correct'] = []
    for name,f in checks(dev):
        if not any(o in name for o in a.checks): continue
        if left() < 3: out['not_run'].append(f'correct: {name}'); continue
        try:
            with dry_run(): note = f() # AdaHessian has no training loop here, and takes the gradient for its estimate
            res = dict(check=name, ok=True, note=note or '')
        except Exception as e:
            res = dict(check=name, ok=False, note=f'{type(e).__name__}: {e}'[:600], trace=traceback.format_exc()[-1500:])
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
            cmd = [sys.executable, __file__, '--probe', name, *(['--interpret'] if a.interpret else [])]
            rs = [subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=120) for _ in range(2)]
        if any(r.returncode for r in rs): out['not_run'].append(f'first: {name}: {rs[0].stderr[-300:]}'); continue
        cold,warm = (json.loads(r.stdout.splitlines()[-1]) for r in rs)
        out['first'].append(dict(optimizer=name, cold_ms=cold['first_ms'], warm_ms=warm['first_ms'], later_ms=warm['later_ms']))
    print('first step, cold:', {f['optimizer']: round(f['cold_ms']) for f in out['first']}, flush=True)

# ---------------------------------------------------------------- step times
def rows_of(a, model):
    from fastxtend_opt.tools.benchmark import model_rows
    if model == 'matrices': return [(0, 1, (64,60) if a.interpret else (8192,7680))]*16 # 1.007e9 elements
    rows = model_rows(model)
    return rows if not a.interpret else [(g, d, tuple(min(n, 4) for n in s)) for g,d,s in rows][:12]

def bytes_of(opt, p, n, reduction, every):
    "Bytes that a step has to move for the states that it holds; a reduction reads them once more"
    from fastxtend_opt.tools.bench.overhead import count_states
    from fastxtend_opt.tools.bench.traffic import step_bytes
    full,slow = count_states(opt, p)
    return n*step_bytes(full, p.element_size(), reduction, every if slow else 0)

def ready(a, dev, found, pset, model, optimizer, out):
    "Contestants with an optimizer that has taken its first steps: label to its record. Those that fail or need too much memory are noted"
    size = sum(p.numel()*p.element_size() for p in pset.params)
    turns,skipped = {},[]
    for c in sorted(found, key=lambda c: c.mode != 'fused'): # fused first, in case memory runs short
        if dev.free() < 6*size + 2**30: skipped.append(c.label); continue
        try:
            opt = c.make(pset, 1e-5)
            for _ in range(3): opt.step()
            ms = wall_ms(dev, opt.step)
            reps = 2 if a.interpret else max(3, min(a.rounds, int(600/max(ms, .01)))) # slow ones get fewer samples
            turns[c.label] = dict(c=c, opt=opt, reps=reps, ms=ms, gpu=[], wall=[], late=0)
        except Exception as e:
            out['missing'].append(dict(model=model, optimizer=optimizer, who=c.label, why=f'{type(e).__name__}: {e}'[:300]))
    if skipped:
        out['missing'].append(dict(model=model, optimizer=optimizer, who=', '.join(skipped), why='not enough memory on the device'))
    return turns

def take_turns(dev, turns, every):
    "Time each contestant once a round, in an order that rotates"
    names = list(turns)
    for r in range(max((t['reps'] for t in turns.values()), default=0)):
        for k in names[r%len(names):] + names[:r%len(names)]:
            t = turns[k]
            if r >= t['reps']: continue
            def steps():
                for _ in range(every): t['opt'].step()
            ms,late = dev.gpu_ms(steps, max(1., min(t['ms']*3*every, 600)))
            t['gpu'].append(ms/every); t['late'] += late
            t['wall'].append(wall_ms(dev, steps)/every)

def case(a, dev, model, optimizer, dtype, copy_gbps, out):
    "Times of all contestants for one model, optimizer and dtype"
    import torch
    from fastxtend_opt.definition.registry import get_optimizer
    from fastxtend_opt.tools import benchmark as b
    from fastxtend_opt.tools.bench.contestants import settings
    pset = b.ParamSet(rows_of(a, model), device=dev.device, dtype=dtype)
    pset.saved = None # gradients are not zeroed here
    modes = ('foreach','jit','fused') if dtype is torch.float32 else ('foreach','fused')
    found,missing = b.contestants(optimizer, modes, ('torch','optimi') if not a.interpret else ('torch',), gpu=not a.interpret)
    if model == 'matrices': found = [c for c in found if c.mode in ('fused','foreach','triton','native')]
    out['missing'] += [dict(model=model, optimizer=optimizer, who=w, why=y) for w,y in missing]
    every = settings.get(optimizer, {}).get('k', 1)
    turns = ready(a, dev, found, pset, model, optimizer, out)
    take_turns(dev, turns, every)
    reduction,res = get_optimizer(optimizer).kind=='reduction',[]
    for k,t in turns.items():
        by,g = bytes_of(t['opt'], pset.params[0], pset.elements, reduction, every),median(t['gpu'])
        res.append(dict(model=model, optimizer=optimizer, dtype=str(dtype)[6:], contestant=k, lib=t['c'].lib, mode=t['c'].mode,
                        tensors=len(pset.params), elements=pset.elements, gpu_ms=g, wall_ms=median(t['wall']), samples=len(t['gpu']),
                        late=t['late'], gpu_min=min(t['gpu']), gpu_max=max(t['gpu']), bytes=by, of_copy=by/g/1e6/copy_gbps))
    out['rows'] += res
    times = ', '.join(f"{r['contestant']} {r['gpu_ms']:.3f}/{r['wall_ms']:.3f}" for r in sorted(res, key=lambda r: r['gpu_ms']))
    print(f"{model} {optimizer} {str(dtype)[6:]}: {times}", flush=True)

def part_models(a, dev, out, left):
    import torch
    from fastxtend_opt.tools.bench.turns import without_gc
    cases = [(m, o, torch.float32) for m in a.models for o in a.optimizers]
    first = [c for c in cases if c[1]=='adam' or c[0] in ('xresnet50','deberta_base')] # the cases of the goals
    first.sort(key=lambda c: c[:2] != ('matrices','adam'))
    low = [(m, 'adam', torch.bfloat16) for m in a.models if m in ('matrices','deberta_base') and 'adam' in a.optimizers]
    cases = first + low + [c for c in cases if c not in first]
    for m,o,d in cases:
        if left() < 8: out['not_run'].append(f'models: {m} {o} {str(d)[6:]}'); continue
        try:
            with without_gc(): case(a, dev, m, o, d, out['machine']['copy_gbps'], out)
            dev.clear()
        except Exception as e: out['not_run'].append(f'models: {m} {o}: {type(e).__name__}: {e}'[:300])
        out['save']()

SIZES = [(512,4,2**14,2**13), (1024,8,2**14,2**13), (2048,4,2**14,2**13), (2048,8,2**14,2**13), (1024,4,2**14,2**11), (1024,4,2**14,2**15),
         (1024,4,2**16,2**13), (1024,2,2**14,2**13)] # block, warps, chunk, programs

def sweep_case(a, dev, model, optimizer, dtype, sizes, use):
    "Times of the fused step for each of `sizes`, in turns: size to list"
    from fastxtend_opt.tools.benchmark import ParamSet, contestants
    pset,opts = ParamSet(rows_of(a, model), device=dev.device, dtype=dtype),{}
    pset.saved = None
    for s in sizes:
        use(s)
        opt = contestants(optimizer, ('fused',), (), baseline=False)[0][0].make(pset, 1e-5)
        opt.step(); opt.step()
        opts[s] = opt,[]
    for r in range(12 if not a.interpret else 1):
        for s,(opt,ts) in opts.items():
            use(s)
            ts.append(dev.gpu_ms(opt.step)[0])
    return {s: ts for s,(_,ts) in opts.items()}

def part_sweep(a, dev, out, left):
    "Other blocks and warps than the package's, to find good values for `engine.triton_launch`"
    import torch
    from fastxtend_opt.engine import triton_launch
    names = 'GPU_BLOCK','GPU_WARPS','GPU_CHUNK','GPU_PROGRAMS'
    default = tuple(getattr(triton_launch, n) for n in names)
    def use(s):
        for n,v in zip(names, s): setattr(triton_launch, n, v)
    sizes = list(dict.fromkeys([default, *(SIZES if not a.interpret else [(256,4,1024,1)])]))
    out['sweep'] = []
    for model,optimizer,dtype in (('xresnet50','adam',torch.float32), ('matrices','adam',torch.float32), ('matrices','adam',torch.bfloat16),
                                  ('xresnet50','lamb',torch.float32)):
        if left() < 8: out['not_run'].append(f'sweep: {model} {optimizer}'); continue
        times = {}
        try: times = sweep_case(a, dev, model, optimizer, dtype, sizes, use)
        except Exception as e: out['not_run'].append(f'sweep: {model} {optimizer}: {type(e).__name__}: {e}'[:300])
        finally: use(default)
        out['sweep'] += [dict(model=model, optimizer=optimizer, dtype=str(dtype)[6:], block=s[0], warps=s[1], chunk=s[2], programs=s[3],
                              gpu_ms=median(ts), default=s==default) for s,ts in times.items()]
        out['save']()
        dev.clear()
    for s in out['sweep']: print('sweep', s, flush=True)

# ---------------------------------------------------------------- the result
def goals(out):
    "(goal, case, wanted, measured, reached) rows"
    t = {(r['model'],r['optimizer'],r['dtype'],r['contestant']):r for r in out['rows']}
    res = []
    def add(goal, what, wanted, value, most=False):
        reached = None if value is None else value<=wanted if most else value>=wanted
        res.append(dict(goal=goal, case=what, wanted=wanted, value=value, most=most, reached=reached))
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

def steps_section(out, title, key, _f, _md):
    "Table of one model, optimizer and dtype"
    rs = sorted((r for r in out['rows'] if (r['model'],r['optimizer'],r['dtype'])==key), key=lambda r: -r['gpu_ms'])
    native = next((r['gpu_ms'] for r in rs if r['contestant']=='fastai native'), None)
    rows = [[r['contestant'], _f(r['gpu_ms']) + ' *'*(r['late'] > r['samples']/2), _f(r['wall_ms']), _f(native and native/r['gpu_ms']),
             _f(r['of_copy']), str(r['samples'])] for r in rs]
    table = _md(['','GPU ms','wall ms','x fastai (GPU)','share of copy bandwidth','samples'], rows)
    return f"### {title}, {key[1]}, {key[2]}\n\n{rs[0]['tensors']:,} tensors, {rs[0]['elements']/1e6:.1f} M elements\n\n{table}\n"

def report(out):
    "The results as Markdown"
    from fastxtend_opt.tools.bench.format import format_number as _f, markdown_table as _md
    from fastxtend_opt.tools.bench.models import list_models
    titles,m = {**list_models(), 'matrices':'16 matrices, 1e9 elements'},out['machine']
    versions = ', '.join(f'{k} {v}' for k,v in m['versions'].items())
    s = [f"# Fused on a GPU\n\n{m['device']}, {m['memory_gb']:.0f} GB; a copy on the device moves {m['copy_gbps']:,.0f} GB/s. "
         f"{m['when']}; {versions}\n"]
    if 'correct' in out:
        bad = [c for c in out['correct'] if not c['ok']]
        s.append(f"## Correctness: {len(out['correct'])-len(bad)} of {len(out['correct'])} checks hold\n\n" +
                 '\n'.join(f"- **{c['check']}**: {c['note']}" for c in bad) + '\n')
    if out['rows'] and m['processors']: # the interpreter's times mean nothing
        said = {True:'yes', False:'**no**', None:'not measured'}
        rows = [[g['goal'], g['case'], ('<= ' if g['most'] else '>= ')+_f(g['wanted']), _f(g['value']), said[g['reached']]]
                for g in goals(out)]
        s.append('## Goals\n\n' + _md(['goal','case','wanted','measured','reached'], rows) + '\n')
    for key in dict.fromkeys((r['model'],r['optimizer'],r['dtype']) for r in out['rows']):
        s.append(steps_section(out, titles.get(key[0], key[0]), key, _f, _md))
    if out.get('first'):
        rows = [[f['optimizer'], _f(f['cold_ms']), _f(f['warm_ms']), _f(f['later_ms'])] for f in out['first']]
        s.append('## First step\n\n' + _md(['optimizer','cold ms','from the disk ms','later ms'], rows) + '\n')
    if out.get('sweep'):
        rows = [[f"{w['model']} {w['optimizer']} {w['dtype']}", *(str(w[k]) for k in ('block','warps','chunk','programs')),
                 _f(w['gpu_ms']) + (' (default)' if w['default'] else '')] for w in out['sweep']]
        s.append('## Launch sizes\n\n' + _md(['case','block','warps','chunk','programs','GPU ms'], rows) + '\n')
    missing = dict.fromkeys(f"{x['model']} {x['optimizer']}: {x['who']}: {x['why']}" for x in out['missing'])
    if missing or out['not_run']: s.append('## Missing, and not run\n\n' + '\n'.join(f'- {x}' for x in [*missing, *out['not_run']]) + '\n')
    return '\n'.join(s)

def plot_optimizer(ax, out, rows, models, seen):
    "One panel: a point for each contestant and model, and the time of the kernel's bytes at copy bandwidth"
    from fastxtend_opt.tools.bench.report import colors, markers
    for y,m in enumerate(models):
        here = [r for r in rows if r['model']==m]
        for r in here:
            own = r['lib']=='fastxtend_opt'
            point, = ax.plot(r['gpu_ms'], y, markers.get(r['mode'],'P'), color=colors.get(r['lib'],'#17becf'), ms=8 if own else 5.5,
                             mec='white', mew=.6, zorder=3+own)
            seen.setdefault(r['contestant'], point)
        for r in here:
            if r['contestant']!='fastxtend_opt fused': continue
            least = r['bytes']/out['machine']['copy_gbps']/1e6
            seen.setdefault('its bytes at copy bandwidth', ax.plot([least]*2, [y-.38,y+.38], color='black', lw=1.6, zorder=1)[0])
    ax.set_xscale('log')
    ax.set_xlabel('GPU time of a step, ms', fontsize=8.5)
    ax.tick_params(axis='x', labelsize=8); ax.grid(axis='x', which='both', lw=.3, alpha=.5)
    for sp in ('top','right'): ax.spines[sp].set_visible(False)

def plot(out, path):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from fastxtend_opt.tools.bench.models import list_models
    rows = [r for r in out['rows'] if r['dtype']=='float32']
    opts,titles = list(dict.fromkeys(r['optimizer'] for r in rows)),{**list_models(), 'matrices':'16 matrices, 1e9'}
    models = [m for m in MODELS if any(r['model']==m for r in rows)]
    n = min(4, len(opts))
    lines = -(-len(opts)//n)
    fig,axs = plt.subplots(lines, n, figsize=(4.2*n, (.9+.36*len(models))*lines), squeeze=False, layout='constrained', sharey=True)
    seen = {}
    for ax,o in zip(axs.flat, opts):
        plot_optimizer(ax, out, [r for r in rows if r['optimizer']==o], models, seen)
        ax.set_yticks(range(len(models)), [titles.get(m, m) for m in models], fontsize=8.5)
        ax.set_title(o, fontsize=10)
    axs[0,0].invert_yaxis()
    for ax in list(axs.flat)[len(opts):]: ax.axis('off')
    fig.legend(list(seen.values()), list(seen), loc='outside lower center', ncols=5, fontsize=8, frameon=False)
    fig.suptitle(out['machine']['device'], fontsize=11)
    fig.savefig(path, dpi=100)

def child(a, start):
    "Run one part in this process; write its results after each case"
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
    if not a.interpret: Cuda() # ends here if there is none
    a.out.mkdir(parents=True, exist_ok=True)
    path,failed = a.out/'gpu.json',False
    path.write_text(json.dumps(dict(format=1, kind='gpu', machine=None, rounds=a.rounds, rows=[], missing=[], not_run=[]))+'\n')
    for part in PARTS:
        if part not in a.parts: continue
        limit = SHARE[part]*a.minutes*60 - (time.time()-start) + 15
        try: rc = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--child', f'{part}:{path}'], timeout=max(limit, 20)).returncode
        except subprocess.TimeoutExpired: rc = 'no result in its time'
        out = json.loads(path.read_text())
        if rc: out['not_run'].append(f'{part}: the process ended with {rc}; its results so far are kept'); failed = True
        out['seconds'] = time.time()-start
        path.write_text(json.dumps(out, indent=1)+'\n')
        if out['machine']: (a.out/'gpu.md').write_text(report(out))
    if out['rows']: plot(out, a.out/'gpu.png')
    print(f"{out['seconds']:.0f} s; written: {a.out}/gpu.json, gpu.md" + ', gpu.png'*bool(out['rows']))
    return failed or any(not c['ok'] for c in out.get('correct', []))

if __name__ == '__main__': sys.exit(main())
