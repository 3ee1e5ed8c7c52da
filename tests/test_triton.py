"""The fused mode on a GPU, as far as it can be tested without one. The matrix runs every optimizer through Triton's interpreter (mode
'triton'); here are the backend's choice and its refusals, torch's AMP, the bookkeeping of a launch, and that the text of every kernel
compiles for a real GPU, with vector loads."""
import contextlib,importlib.util,json,os,subprocess,sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np,pytest,torch
from fastai.optimizer import Optimizer,sgd_step,weight_decay
from torch import nn
from fastxtend_opt.optimizer.fused import fused_backend
from fastxtend_opt.engine import triton as et,triton_launch
from fastxtend_opt.engine.cohort import make_cohorts
from fastxtend_opt.engine.addresses import AddressTable
from fastxtend_opt.engine.launch import chunk_rows
from fastxtend_opt.engine.kinds import UnsupportedError
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.engine.triton_launch import TritonLaunch
from fastxtend_opt.optimizer import fused as optimizer_fused
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from fastxtend_opt.engine.ops import OPS
from helpers import *
from test_matrix import s_buffer_from_grad,s_keeps_grad,s_scales_grad,s_spread

NAMES = [o.name for o in list_optimizers()]

def two(dtype=torch.float32): return make_params([(5,),(4,4)], dtype=dtype, big=False, channels_last=False)
def make(name, params, mode='triton', **kw):
    with backend_of(mode): return get_optimizer(name).func(params, lr=.01, **kw, **flags(mode))

# ---------------------------------------------------------------- which backend
def test_backend_follows_the_environment(monkeypatch):
    "The variable is read when the optimizer is made; each one keeps its backend"
    opts = []
    for name in ('triton','cpp',''):
        monkeypatch.setenv(BACKEND, name)
        opts.append(get_optimizer('adam').func(two(), lr=.01, fused=True))
    for opt,name in zip(opts, ('triton','cpp','cpp')):
        GradStream().set(opt.param_lists[0], 0)
        opt.step()
        assert set(opt._plan.backends.values())=={name}
    monkeypatch.setenv(BACKEND, 'cuda')
    with pytest.raises(ValueError, match="'cuda'.*'cpp' and 'triton'"): get_optimizer('adam').func(two(), lr=.01, fused=True)

def test_backends_that_do_not_fit(monkeypatch):
    cpu,cuda = torch.device('cpu'),torch.device('cuda')
    assert fused_backend(cpu)=='cpp' and fused_backend(cpu, 'triton')=='triton'
    with pytest.raises(UnsupportedError, match='cuda.*C[+][+] kernels.*foreach=True'): fused_backend(cuda, 'cpp')
    with pytest.raises(UnsupportedError, match='TRITON_INTERPRET=1 is set.*on cuda.*foreach=True'): fused_backend(cuda)
    with pytest.raises(UnsupportedError, match='mps.*foreach=True'): fused_backend(torch.device('mps'))
    monkeypatch.setattr(optimizer_fused, 'triton_interpreted', lambda: False)
    assert fused_backend(cuda)=='triton' and fused_backend(torch.device('xpu'))=='triton'
    with pytest.raises(UnsupportedError, match='needs TRITON_INTERPRET=1'): fused_backend(cpu, 'triton')

@pytest.mark.parametrize('name', ['adam','lamb'])
def test_without_triton(name, monkeypatch):
    "Says what to install, names foreach=True, and changes nothing"
    params = two()
    opt = make(name, params)
    GradStream().set(params, 0)
    monkeypatch.setitem(sys.modules, 'triton', None)
    with unchanged(params, opt):
        with pytest.raises(RuntimeError, match='(?s)Triton, which is not installed.*pip install triton.*foreach=True'): opt.step()
    monkeypatch.undo()
    opt.step()
    assert opt.state[params[0]]['step']==1

def test_interpreter_has_to_be_chosen_first(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    with pytest.raises(RuntimeError, match='was taken away after Triton had been imported'): et.triton_interpreted()
    code = ("import os,triton.language; "
            "os.environ['TRITON_INTERPRET'] = '1'; from fastxtend_opt.engine.triton import *; triton_interpreted()")
    env = dict({k:v for k,v in os.environ.items() if k != 'TRITON_INTERPRET'}, PYTHONPATH=str(Path(__file__).parent.parent))
    res = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert res.returncode and 'RuntimeError: TRITON_INTERPRET was set after Triton had been imported' in res.stderr

def test_capture_is_refused(monkeypatch):
    "A replay would repeat the learning rate and the step counter of the step that was captured"
    params = two()
    opt = make('adam', params)
    GradStream().set(params, 0)
    work = opt._trace({})
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device', lambda d: contextlib.nullcontext())
    for c,_,_ in work: c.device = torch.device('cuda', 0) # only the test for capturing looks at it
    with unchanged(params, opt):
        with pytest.raises(UnsupportedError, match="can't be captured.*opt.step()"): opt._prepare(work)

def test_a_row_without_triton_text_changes_nothing(monkeypatch):
    def s(p, lr, **kwargs): p.data.sub_(p.grad.data.sin()*lr)
    params = two()
    with backend_of('triton'): opt = FusedOptimizer(params, [weight_decay, s], lr=.1, wd=.1)
    GradStream().set(params, 0)
    monkeypatch.setitem(OPS, 'sin', replace(OPS['sin'], triton=''))
    monkeypatch.setattr(et, '_kernels', {})
    with unchanged(params, opt):
        with pytest.raises(UnsupportedError, match="'sin' has no Triton text.*foreach=True"): opt.step()

def test_checkpoint_goes_between_the_backends():
    params,stream = make_params(dtype=torch.float64, big=False),GradStream(3)
    opts = {m: make('lamb', params if m=='fused' else copy_params(params), m) for m in ('fused','triton')}
    a,b = opts['fused'],opts['triton']
    def go(opt, i): stream.set(opt.param_lists[0], i); opt.step()
    for i in range(3): go(a, i)
    for p,q in zip(a.param_lists[0], b.param_lists[0]): q.data.copy_(p)
    b.load_state_dict(a.state_dict())
    for i in range(3, 6): go(a, i); go(b, i)
    assert_same(snapshot(b.param_lists[0], b), snapshot(a.param_lists[0], a), **TOL[torch.float64])

# ---------------------------------------------------------------- launches
def table(sizes, dtype=torch.float32):
    ps = [nn.Parameter(torch.ones(n, dtype=dtype)) for n in sizes]
    for p in ps: p.grad = torch.full_like(p, 2.)
    opt = FusedOptimizer(ps, [sgd_step], lr=.5)
    c, = make_cohorts(opt)
    return c,trace_steppers([sgd_step], c.slots, {}, dict(lr=.5))[0]

@pytest.mark.parametrize('size', [1, 16, 1000])
def test_chunks_cover_each_element_once(size):
    sizes = [0, 1, 15, 16, 17, 1000, 4097]
    tables = [AddressTable(table(s)[0]) for s in (sizes, [3], sizes[::-1])]
    chunks,tensors = chunk_rows(tables, size)
    seen = [np.zeros(n, int) for t in (sizes, [3], sizes[::-1]) for n in t]
    for i,row,start,n,t in chunks:
        seen[t][start:start+n] += 1
        assert (i,row)==tuple(tensors[t,:2]) and 0<n<=size
    assert all((s==1).all() for s in seen)
    for t,(_,_,first,count,numel) in enumerate(tensors):
        assert numel==len(seen[t]) and (chunks[first:first+count,4]==t).all() and count==-(-numel//size)

def test_tables_are_sent_only_when_they_change(monkeypatch):
    sent = []
    real = triton_launch._send
    monkeypatch.setattr(triton_launch, '_send', lambda a,d: (sent.append(a.dtype), real(a, d))[1])
    params = two()
    opt = make('sgd', params)
    GradStream().set(params, 0)
    opt.step()
    assert len(sent)==4 # chunks, tensors, addresses, numbers
    opt.step(); opt.step()
    assert len(sent)==4
    opt.set_hyper('lr', .5)
    opt.step()
    assert sent[4:]==[np.float32] # numbers alone
    for p in params: p.grad = p.grad.clone()
    opt.step()
    assert sent[5:]==[np.int64] # addresses alone
    params[0].data = params[0].data.clone() # a parameter that has moved may share memory now: a new plan
    opt.step()
    assert len(sent)==10

def test_a_schedule_makes_no_new_kernel(monkeypatch):
    params = two()
    opt = make('adam', params, wd=.1)
    GradStream().set(params, 0)
    opt.step(); opt.step()
    n = len(et._kernels)
    for i in range(5):
        opt.set_hypers(lr=.1/(i+1), mom=.9-.01*i, wd=.01*(i+1))
        opt.step()
    assert len(et._kernels)==n

# the generator of stochastic rounding wraps around, as it has to
@pytest.mark.parametrize('kw', [dict(dtype=torch.bfloat16, state_dtype=torch.float32, kahan_sum=False), {}], ids=['bf16','f32'])
def test_integers_do_not_overflow(kw, monkeypatch):
    "conftest.py turns off the interpreter's own check, which takes a third of its time and reports nothing without `debug`"
    from triton.runtime import interpreter as ti
    monkeypatch.setattr(ti.interpreter_builder, 'options', replace(ti.interpreter_builder.options, sanitize_overflow=True, debug=True))
    kw = dict(kw)
    params = two(kw.pop('dtype', torch.float32))
    for name in ('adam','lamb'):
        opt = make(name, params, **kw)
        for i in range(2): GradStream().set(params, i); opt.step()

def test_the_search_for_overflows_finds_one(monkeypatch):
    import triton,triton.language as tl
    from triton.runtime import interpreter as ti
    @triton.jit
    def add(a, n: tl.constexpr):
        i = tl.arange(0, n)
        tl.store(a+i, tl.load(a+i)+tl.load(a+i))
    a = torch.full((4,), 2**30, dtype=torch.int32)
    add[(1,)](a.clone(), 4)
    monkeypatch.setattr(ti.interpreter_builder, 'options', replace(ti.interpreter_builder.options, sanitize_overflow=True, debug=True))
    with pytest.raises(Exception, match='(?s)overflow detected'): add[(1,)](a, 4)

def test_alignment_is_known():
    "Vector loads only where every address is a multiple of 16 bytes"
    for offset,want in ((0,True), (4,True), (1,False), (2,False)):
        base = torch.ones(64)
        p = nn.Parameter(base[offset:offset+20]); p.grad = torch.ones(20)
        opt = make('adam', [p])
        opt.step(); opt.step()
        launch, = opt._plan.launches.values()
        assert launch.addresses[2]==want
        assert (base[:offset]==1).all() and (base[offset+20:]==1).all() and (p!=1).all()

def test_one_launch_a_phase():
    "Two groups, decay on some, a late gradient: cohorts with one tape share their launches"
    calls = []
    class Counted:
        def __init__(self, f): self.f = f
        def __getitem__(self, grid):
            calls.append(grid)
            return self.f[grid]
    params = make_params(big=False)
    for name,n in (('adam',1), ('lamb',3)): # lamb: norms, values of each tensor, step
        opt = make(name, two_groups(copy_params(params)))
        ps = [p for pg in opt.param_lists for p in pg]
        for p in ps[::2]: opt.state[p]['do_wd'] = False
        GradStream().set(ps, 0); opt.step()
        launch = TritonLaunch.__call__
        with pytest.MonkeyPatch.context() as m:
            m.setattr(TritonLaunch, '__call__', lambda self, k, *a: launch(self, k._replace(stages=[(s,Counted(f)) for s,f in k.stages]),
                                                                           *a))
            opt.step()
        tapes = len(opt._plan.launches)
        assert len(calls)==n*tapes and tapes<=2, (name, calls) # with decay and without
        calls.clear()

# ---------------------------------------------------------------- torch's AMP
def amp_run(name, mode, amp_scaling, overflows=(), n=8, unscale=(), dtype=torch.float32):
    "A loop as in torch's documentation, with a real GradScaler; the gradients of some steps overflow. `name`: an optimizer, or a stepper"
    params = make_params([(5,),(4,4),(33,)], dtype=dtype, big=False)
    if isinstance(name, str): opt = make(name, two_groups(params), mode, wd=.1)
    else:
        with backend_of(mode): opt = (FusedOptimizer if mode=='triton' else Optimizer)(two_groups(params), [name], lr=.01)
    if mode=='triton' and amp_scaling: opt.amp_scaling = True
    scaler,stream = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=3),GradStream(1)
    for i in range(n):
        for p in params: p.grad = None
        stream.set(params, i)
        s = scaler.get_scale()
        for p in params: p.grad.mul_(s)
        if i in overflows: params[1].grad.view(-1)[0] = float('inf')
        scaler.scale(torch.ones(())) # as backward: the scale exists from here
        if i in unscale: scaler.unscale_(opt); torch.nn.utils.clip_grad_norm_(params, 1.)
        scaler.step(opt)
        scaler.update()
    return params,opt,scaler

@pytest.mark.parametrize('overflows', [(), (0,), (0,1,2), (3,), (2,3,7)], ids=str)
@pytest.mark.parametrize('amp_scaling', [False, True])
@pytest.mark.parametrize('name', ['sgd','adam','lamb','radam'])
def test_grad_scaler(name, amp_scaling, overflows):
    "Steps with overflow leave no trace: neither in weights nor in averages nor in counters"
    a,oa,sa = amp_run(name, 'triton', amp_scaling, overflows)
    b,ob,sb = amp_run(name, 'native', False, overflows)
    assert_same([p.detach() for p in a], [p.detach() for p in b], **TOL[torch.float32])
    assert_same(detach_copy(oa.state_dict()), detach_copy(ob.state_dict()), **TOL[torch.float32])
    assert sa.get_scale()==sb.get_scale()

@pytest.mark.parametrize('overflows', [(), (0,), (1,4)], ids=str)
@pytest.mark.parametrize('stepper', [s_buffer_from_grad, s_keeps_grad, s_scales_grad, s_spread], ids=lambda o: o.__name__)
def test_grad_scaler_and_steppers_that_keep_the_gradient(stepper, overflows):
    "State that keeps a gradient keeps the unscaled one, wherever it is loaded again, and nothing of one that overflowed"
    a,oa,_ = amp_run(stepper, 'triton', True, overflows)
    b,ob,_ = amp_run(stepper, 'native', False, overflows)
    assert_same([p.detach() for p in a], [p.detach() for p in b], **TOL[torch.float32])
    assert_same(detach_copy(oa.state_dict()), detach_copy(ob.state_dict()), **TOL[torch.float32])

def test_grad_scaler_after_a_step_that_raised():
    "What the scaler had set must not act on a later step"
    p = nn.Parameter(torch.ones(3))
    broken = [True]
    def s(p, lr, **kwargs):
        if broken[0]: raise KeyError('once')
        p.data.sub_(p.grad.data*lr)
    with backend_of('triton'): opt = FusedOptimizer([p], [s], lr=.1)
    opt.amp_scaling,scaler = True,torch.amp.GradScaler('cpu', init_scale=1024.)
    p.grad = torch.full((3,), 1024.)
    scaler.scale(torch.ones(()))
    with pytest.raises(KeyError): scaler.step(opt)
    scaler.update(1024.)
    broken[0] = False
    p.grad = torch.ones(3)
    opt.step()
    assert_same(p.detach(), torch.full((3,), .9), rtol=1e-6)
    p.grad = torch.full((3,), 1024.)
    scaler.step(opt)
    assert_same(p.detach(), torch.full((3,), .8), rtol=1e-6)

def test_grad_scaler_without_any_gradient():
    opt,scaler = make('adam', two()),torch.amp.GradScaler('cpu')
    opt.amp_scaling = True
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    assert all(not o for o in opt.state_dict()['state'])

def test_grad_scaler_with_unscale():
    a,oa,_ = amp_run('adam', 'triton', True, overflows=(2,), unscale=(1,2,4))
    b,ob,_ = amp_run('adam', 'native', False, overflows=(2,), unscale=(1,2,4))
    assert_same([p.detach() for p in a], [p.detach() for p in b], **TOL[torch.float32])
    assert_same(detach_copy(oa.state_dict()), detach_copy(ob.state_dict()), **TOL[torch.float32])

def test_grad_scaler_asks_only_where_it_was_told():
    "An optimizer does not offer torch's protocol by default; wrappers that pass attributes on never do"
    opt = make('adam', two())
    assert not opt._step_supports_amp_scaling
    opt.amp_scaling = True
    assert opt._step_supports_amp_scaling
    assert not make('ranger', two())._step_supports_amp_scaling
    cpp = make('adam', two(), 'fused'); cpp.amp_scaling = True
    assert not cpp._step_supports_amp_scaling

@pytest.mark.parametrize('inf', [False, True])
def test_grad_scaler_with_parameters_that_have_gaps(inf):
    "With a parameter that has no kernel, all parameters are unscaled in the ordinary way"
    def run(mode):
        base = torch.ones(6,6)
        params = [nn.Parameter(base[:,:3]), nn.Parameter(torch.ones(4))]
        opt = make('adam', params, mode)
        if mode=='triton': opt.amp_scaling = True
        scaler = torch.amp.GradScaler('cpu', init_scale=8.)
        for i in range(3):
            for p in params: p.grad = torch.full_like(p, 8.)
            if inf and i==1: params[1].grad[2] = float('nan')
            scaler.scale(torch.ones(()))
            scaler.step(opt); scaler.update()
        return base,params[1].detach(),detach_copy(opt.state_dict())
    assert_same(run('triton'), run('native'), **TOL[torch.float32])

def test_overflow_is_settled_before_anyone_looks():
    "state, state_dict, a copy and a pickle all show the true counters, whichever comes first"
    import copy,pickle
    looks = [lambda o: o.state[o.param_lists[0][0]].get('step', 0), lambda o: o.state_dict()['state'][0].get('step', 0),
             lambda o: copy.deepcopy(o).state_dict()['state'][0].get('step', 0),
             lambda o: pickle.loads(pickle.dumps(o)).state_dict()['state'][0].get('step', 0)]
    for look in looks:
        for overflows,want in (((0,1),0), ((1,),1), ((),2)): assert look(amp_run('adam', 'triton', True, overflows, n=2)[1])==want
    opt = amp_run('adam', 'triton', True, (1,), n=2)[1]
    opt.clear_state()
    assert opt.state_dict()['state'][0].get('step', 0)==0 and 'grad_avg' not in opt.state_dict()['state'][0]

# ---------------------------------------------------------------- the same text for a real GPU, compiled without one
_COMPILE = r'''
import json,re,sys
import torch,triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastxtend_opt.engine.triton import triton_kernel
import gpu_tapes
target = GPUTarget(*json.loads(sys.argv[1]))
res = {}
for name,tape in gpu_tapes.tapes(sys.argv[2]):
    kernel = triton_kernel(tape)
    fp = 'fp64' if kernel.compute is torch.float64 else 'fp32'
    for kind,f in kernel.stages:
        for scaled in ((False,True) if name.startswith('adam') else (False,)):
            known = dict.fromkeys(('chunks','tensors','addresses'), '*i64') | dict.fromkeys(('numbers','values','partial'), f'*{fp}')
            sig = {n: 'constexpr' if n.isupper() else known.get(n, '*fp32' if scaled else 'constexpr') for n in f.arg_names}
            const = dict(BLOCK=1024, SCALED=scaled)
            if not scaled: const |= dict(grad_scale=None, found_inf=None)
            if kind=='pass': const['ALIGNED'] = True
            attrs = {(i,): [['tt.divisibility', 16]] for i,n in enumerate(f.arg_names) if sig[n][0]=='*'}
            k = triton.compile(ASTSource(fn=f, signature=sig, constexprs=const, attrs=attrs), target=target, options=dict(num_warps=4))
            asm = k.asm.get('ptx', '')
            count = lambda s: len(re.findall(s, asm))
            res[f'{name}.{f.__name__}' + '.scaled'*scaled] = dict(
                vector=count(r'ld\.global\.v[24]'), stores=count(r'st\.global\.v[24]'), local=count(r'(?:ld|st)\.local'),
                binary=len(k.asm.get('cubin') or k.asm.get('hsaco')))
print(json.dumps(res))
'''

def compile_for(target, what, tmp_path):
    env = {k:v for k,v in os.environ.items() if k not in ('TRITON_INTERPRET', BACKEND)}
    env |= dict(PYTHONPATH=f'{Path(__file__).parent}:{Path(__file__).parent.parent}', TRITON_CACHE_DIR=str(tmp_path/'triton'),
                FASTXTEND_OPT_CACHE=str(tmp_path/'own'), PYTHONWARNINGS='ignore')
    res = subprocess.run([sys.executable, '-c', _COMPILE, json.dumps(target), what], env=env, capture_output=True, text=True, timeout=550)
    assert res.returncode==0, res.stderr[-3000:]
    return json.loads(res.stdout.splitlines()[-1])

@pytest.mark.parametrize('what', ['core', pytest.param('optimizers', marks=pytest.mark.slow)])
def test_optimizers_compile_for_cuda(what, tmp_path):
    """PTX and machine code for an H100, from Triton's own compiler: `CORE`, or every registered optimizer, float32 and bfloat16. Whole
    blocks are loaded and stored as vectors."""
    res = compile_for(['cuda', 90, 32], what, tmp_path)
    assert {k.split('.')[0].split('-')[0] for k in res}==set(NAMES if what=='optimizers' else CORE)
    for k,v in res.items():
        name = k.split('.')[0].split('-')[0]
        assert v['binary'] and not v['local'], (k, v) # local memory in PTX; what ptxas spills shows only in the machine code
        if '.pass' in k: assert v['vector'] >= (2 if v['stores'] else 1) and (v['stores'] or 'pass0' in k
            and (name=='ranger' or get_optimizer(name).kind=='reduction')), (k, v)

@pytest.mark.slow
def test_rows_compile_for_cuda(tmp_path):
    "Every row of the table, in float32 and float64"
    res = compile_for(['cuda', 80, 32], 'rows', tmp_path)
    assert {k.split('.')[0].split('-')[0] for k in res}==set(OPS)

@pytest.mark.slow
def test_optimizers_compile_for_amd(tmp_path):
    assert compile_for(['hip', 'gfx942', 64], 'optimizers', tmp_path)

# ---------------------------------------------------------------- the benchmark's script
@pytest.mark.slow
def test_gpu_bench_in_small(tmp_path):
    "Every part of bench/gpu.py, through the interpreter: its correctness checks hold, and it writes JSON, table and plot"
    env = {k:v for k,v in os.environ.items() if k not in ('TRITON_INTERPRET', BACKEND)} | dict(PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    script = Path(__file__).parent.parent/'bench'/'gpu.py'
    args = ['--interpret', '--optimizers', 'lamb', '--models', 'xresnet18', '--out', str(tmp_path)]
    res = subprocess.run([sys.executable, str(script), *args, '--parts', 'first', 'models'], env=env, capture_output=True, text=True,
                         timeout=300)
    assert res.returncode==0, res.stdout[-2000:]+res.stderr[-2000:]
    out = json.loads((tmp_path/'gpu.json').read_text())
    assert not out['not_run'] and len(out['first'])==1 and 'fastxtend_opt fused' in {r['contestant'] for r in out['rows']}
    assert (tmp_path/'gpu.png').stat().st_size > 10_000 and 'lamb' in (tmp_path/'gpu.md').read_text()
    if torch.cuda.is_available(): return
    res = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=100)
    assert res.returncode and 'no CUDA or ROCm device' in res.stderr and '--interpret' in res.stderr

def gpu_script():
    "bench/gpu.py as a module"
    spec = importlib.util.spec_from_file_location('gpu', Path(__file__).parent.parent/'bench'/'gpu.py')
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    return gpu

@pytest.mark.parametrize('words,notes', [
    (('adahessian float32','adahessian bfloat16','adahessian no','layouts','mixed','adam GradScaler in'), ['']*6),
    (('apollo float32','clion bfloat16'), ['within the noise of native']*2)], ids=['adahessian','noise'])
def test_gpu_bench_checks_that_need_care(words, notes, monkeypatch):
    """AdaHessian has no training loop there. Apollo in float32 and C-Lion in bfloat16 amplify the last bit: without an allowance for it,
    which is native's own noise, they fail"""
    monkeypatch.setenv(BACKEND, 'triton')
    gpu = gpu_script()
    out = dict(save=lambda: None, not_run=[])
    gpu.part_correct(SimpleNamespace(checks=words), gpu.Interpreter(), out, lambda: 100)
    assert [c['note'] for c in out['correct']]==notes and all(c['ok'] for c in out['correct']), out['correct']

def test_gpu_bench_checks_notice_errors(monkeypatch):
    "The allowance for noise hides neither a wrong rate nor an element that takes another step"
    monkeypatch.setenv(BACKEND, 'triton')
    gpu_script()
    import gpu_checks
    step = gpu_checks.Checks.float32_step
    for wrong in (dict(lr=.0101), dict(beta1=.89)):
        def other(self, name, params, state, nudge=0.):
            return step(self, name, params, {**state, 'hypers': [{**h, **wrong} for h in state['hypers']]}, nudge)
        monkeypatch.setattr(gpu_checks.Checks, 'float32_step', other)
        with pytest.raises(AssertionError, match='ulp apart'):
            gpu_checks.Checks(SimpleNamespace(device='cpu')).rounds_once('clion', torch.bfloat16)

@pytest.mark.slow
def test_gpu_bench_checks(tmp_path):
    "All its correctness checks, in the interpreter"
    script = Path(__file__).parent.parent/'bench'/'gpu.py'
    res = subprocess.run([sys.executable, str(script), '--interpret', '--parts', 'correct', '--minutes', '20', '--out', str(tmp_path)],
                         capture_output=True, text=True, timeout=1200)
    assert res.returncode==0, res.stdout[-2000:]+res.stderr[-2000:]
    out = json.loads((tmp_path/'gpu.json').read_text())
    assert len(out['correct'])>=40 and all(c['ok'] for c in out['correct']) and not out['not_run']
