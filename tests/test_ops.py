"The table of operations: every column of every row against eager torch, on plain and on awkward numbers"
import ctypes
import numpy as np, pytest, torch
from fastxtend_opt.engine.ops import OPS, add_op
from fastxtend_opt.engine.addresses import AddressTable
from fastxtend_opt.engine.cpp import cpp_kernel
from fastxtend_opt.engine.launch import KernelLaunch
from fastxtend_opt.engine.kinds import SCALAR_REF, TapeSlot
from fastxtend_opt.engine.tape import Tape
from fastxtend_opt.engine.tape_tensor import TapeTensor
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.engine.triton_launch import TritonLaunch
from fastxtend_opt.engine.foreach import run_foreach
from fastxtend_opt.engine.torchscript import run_script
from fastxtend_opt.engine.triton import triton_kernel
from fastxtend_opt.engine.cohort import Cohort

NUMBERS = {'pow':[1.7], 'rpow':[1.7], 'rsub':[.3], 'rdiv':[.3], 'clamp_min':[.2], 'clamp_max':[.2], 'axpy':[-.7], 'addcmul':[.7],
           'addcdiv':[-.7], 'softplus':[2.,3.],
           'full':[.7], 'lerp':[.3], 'sround_bfloat16':[5.,6.,7.]}
TENSORS = {'axpy':2, 'addcmul':3, 'addcdiv':3, 'lerp':2, 'expand':2, 'where':3, 'logical_and':2, 'logical_or':2, 'logical_xor':2}
BINARY = 'add sub mul div maximum minimum copysign gt ge lt le eq ne'.split()
POSITIVE = {'sqrt','rsqrt','log','log2','log1p','pow','cbrt'}

def count(name): return 2 if name in BINARY else TENSORS.get(name, 1)

def operands(name, dtype, awkward):
    "Two tensors a row for each operand: an odd one, and one longer than a chunk"
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    res = []
    for i in range(count(name)):
        ts = [torch.randn(n, generator=g, dtype=torch.float64) for n in (7, 20_000)]
        if name in POSITIVE: ts = [t.abs()+.1 for t in ts]
        if name == 'expm1' or name == 'exp': ts = [t.clamp(-3, 3) for t in ts]
        if name in ('where','logical_and','logical_or','logical_xor','logical_not') and (i == 0 or name != 'where'):
            ts = [(t > 0).double() for t in ts]
        if name in ('eq','ne','ge','le'): ts = [t.round() for t in ts]
        if awkward and not (name == 'where' and i == 0):
            for t in ts: t[:5] = torch.tensor([0., -0., float('nan'), float('inf'), -float('inf')])[torch.randperm(5, generator=g)]
        res.append([t.to(dtype) for t in ts])
    return res

def run(backend, name, xs, numbers, dtype):
    "Row `name` through a backend, as a stepper would have it: the result is stored in state 'out'"
    n = len(xs)
    reduce = bool(OPS[name].reduce)
    slots = (TapeSlot('p','e',dtype), TapeSlot('grad','e',dtype), *(TapeSlot(f'x{i}','e',dtype) for i in range(n)))
    out = TapeSlot('out', 's' if reduce else 'e', dtype)
    slots = slots[:2] + tuple(sorted((*slots[2:], out)))
    def stepper(p, out, **kwargs):
        ys = [kwargs[f'x{i}'] for i in range(n)]
        if name in ('where','logical_and','logical_or','logical_xor','logical_not'):
            ys = [y > .5 if i == 0 or name != 'where' else y for i,y in enumerate(ys)]
        out.copy_(p.tape.emit(name, *ys, *numbers))
    tape,_ = trace_steppers([stepper], slots, {}, {})
    params = [torch.nn.Parameter(x.clone()) for x in xs[0]]
    for p in params: p.grad = torch.zeros_like(p)
    c = Cohort(0, slots, {}, torch.device('cpu'))
    c.params = params
    c.states = [{**{f'x{i}':x[j].clone() for i,x in enumerate(xs)}, 'out':torch.zeros((), dtype=dtype)
                 if reduce else torch.zeros_like(xs[0][j])} for j in range(len(params))]
    if backend == 'cpp': KernelLaunch([AddressTable(c)])(cpp_kernel(tape), [tape])
    elif backend == 'triton': TritonLaunch([AddressTable(c)])(triton_kernel(tape), [tape])
    else: dict(foreach=run_foreach, jit=run_script)[backend](tape, c.tensors())
    for p,x in zip(params, xs[0]): torch.testing.assert_close(p.data, x, rtol=0, atol=0, equal_nan=True)
    for j,st in enumerate(c.states): # operands are left alone
        for i,x in enumerate(xs): torch.testing.assert_close(st[f'x{i}'], x[j], rtol=0, atol=0, equal_nan=True)
    return [st['out'] for st in c.states]

@pytest.mark.parametrize('name,dtype', [pytest.param(n, d, id=f'{n}-{str(d)[6:]}') for n in OPS for d in (torch.float32, torch.float64)
    # a kernel computes in float64 there and rounds only what it stores
    if not (n in ('to_float16','to_bfloat16','to_float32') and d is torch.float64)])
def test_row(name, dtype):
    "On plain numbers, and with zeros, infinities and NaN among them"
    for awkward in (False, True): check_row(name, dtype, awkward)

def check_row(name, dtype, awkward):
    xs,numbers = operands(name, dtype, awkward),NUMBERS.get(name, [])
    if name in ('to_float16','to_bfloat16'): xs = [[x.to(getattr(torch, name[3:])).to(dtype) for x in o] for o in xs]
    masks = ('where','logical_and','logical_or','logical_xor','logical_not')
    want = [OPS[name].eager(*((t > .5 if name in masks and (i == 0 or name != 'where') else t) for i,t in enumerate(ts)),
                            *numbers).to(dtype) for ts in zip(*xs)]
    tol = dict(rtol=1e-12, atol=1e-12) if dtype is torch.float64 else dict(rtol=3e-6, atol=1e-6)
    if name == 'sum': tol['atol'] *= 200 # of 20,000 numbers that nearly cancel
    for backend in ('foreach','jit','cpp','triton'):
        for got,w in zip(run(backend, name, xs, numbers, dtype), want):
            torch.testing.assert_close(got, w, equal_nan=True, msg=lambda m: f'{backend} {name}: {m}', **tol)

def test_every_row_is_walked(): assert len(OPS) > 60 and all(o.cpp and o.triton and o.script and o.foreach for o in OPS.values())

def test_new_row(monkeypatch):
    "A row added by a user works in all backends at once"
    name = 'cube_for_a_test'
    add_op(name, lambda x: x*x*x, '({0}*{0}*{0})', '({0}*{0}*{0})')
    try:
        xs = [[torch.tensor([2.]), torch.tensor([3.,-1.])]]
        for b in ('foreach','jit','cpp','triton'):
            a,c = run(b, name, xs, [], torch.float32)
            assert a.tolist() == [8.] and c.tolist() == [27.,-1.]
    finally: del OPS[name]

def test_reference_ranges():
    t = Tape((TapeSlot('p','e',torch.float32), TapeSlot('grad','e',torch.float32)))
    p = TapeTensor(t, -1, 'e', torch.float32)
    assert (p*2).ref == 0 and t.ops == [('mul', -1, SCALAR_REF)] and t.scalars == [2.]
