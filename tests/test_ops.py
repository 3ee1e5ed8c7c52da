"The table of operations: every column of every row against eager torch, on plain and on awkward numbers"
import ctypes, math
import numpy as np, pytest, torch
from fastxtend_opt.engine.ops import OPS, add_op
from fastxtend_opt.engine.addresses import AddressTable
from fastxtend_opt.engine.cpp import cpp_kernel
from fastxtend_opt.engine.launch import KernelLaunch
from fastxtend_opt.engine.kinds import NeedsShape, SCALAR_REF, TapeSlot, UnsupportedError
from fastxtend_opt.engine.opaque import opaque
from fastxtend_opt.engine.tape import Tape
from fastxtend_opt.engine.tape_tensor import TapeTensor
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.engine.triton_launch import TritonLaunch
from fastxtend_opt.engine.foreach import run_foreach
from fastxtend_opt.engine.torchscript import compile_script, run_script
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

# ---------------------------------------------------------------- messages
def test_message_of_a_second_row():
    "The message names the operation, and both remedies; the table is unchanged"
    row = OPS['mul']
    with pytest.raises(ValueError) as e: add_op('mul', torch.mul, '{0}*{1}')
    assert str(e.value) == ("add_op: the table already has an operation 'mul'. Choose a name that is not in OPS, or remove the row first "
                            "(del OPS['mul']).")
    assert OPS['mul'] is row

F32 = torch.float32
SLOTS = (TapeSlot('p','e',F32), TapeSlot('grad','e',F32), TapeSlot('one','s',F32), TapeSlot('rows','n1',F32),
         TapeSlot('square','o3x3',F32), TapeSlot('wide','o4x4',F32))
AXIS = "'mean along an axis' "
WHOLE = "with the parameter's shape"
FITS = "the tensor needs the result's shape, or a larger shape that the result broadcasts to"

def replaces(p, **kw): p.data = p*2
def replaces_grad(p, **kw): p.grad = p.grad*2
def fills_one(p, one, **kw): one.copy_(p)
def fills_rows(p, rows, **kw): rows.add_(p)
def fills_square(p, square, wide, **kw): square.copy_(wide)
def fills_from_rows(p, rows, square, **kw): square.copy_(rows)
def fills_from_p(p, square, **kw): square.copy_(p)
def casts(p, **kw): p.add_(p.to(torch.int32))
def branches(p, **kw): p.clamp_(0, 1) if p.sum() > 0 else None
def reads(p, **kw): p.mul_(p.sum().item())
def converts(p, **kw): p.mul_(float(p.sum()))
def lists(p, **kw): p.tolist()
def unknown(p, **kw): p.cumsum(0)
def unknown_function(p, **kw): torch.cumsum(p, 0)
def indexes(p, **kw): p[0].mul_(2)
def floors(p, **kw): p.div_(3, rounding_mode='floor')
def another_dtype(p, **kw): p.sub_(p.mean(dtype=torch.float64))
def odd_axis(p, **kw): p.sub_(p.mean(dim='rows', keepdim=True))
def no_such_axis(p, **kw): p.sub_(p.mean(dim=2, keepdim=True))
def no_keepdim(p, **kw): p.sub_(p.mean(dim=1))
def norm3(p, **kw): p.div_(p.norm(3))
def spectral(p, **kw): p.div_(torch.linalg.norm(p, 2, dim=(0,1)))
def max_along(p, **kw): p.sub_(p.max(1, keepdim=True)[0])
def min_along(p, **kw): p.sub_(p.min(dim=1, keepdim=True)[0])
def where_one(p, **kw): torch.where(p > 0)
def foreign_first(p, **kw): torch.mul(torch.ones(3,4), p)
def foreign(p, **kw): p.mul_(torch.ones(3,4))
def text(p, **kw): p.mul_('2')
def uses_state(p, square, **kw): square.mul_(2)
def uses_result(p, **kw): second_moment(p.grad.data).mul_(2)

@opaque(results=lambda x: x.new_empty((x.shape[0],x.shape[0])))
def second_moment(x): return x @ x.mT

CAST = 'the engine casts to float16, bfloat16, float32 and float64'
WAIT = 'would make the CPU wait for the GPU: '
SHAPES = ("Use state with the parameter's shape, with size 1 in some of its axes, or with a single value. Tensors of other shapes can only "
          "be passed to an @opaque function (fastxtend_opt.engine.opaque), in their own dtype.")
MESSAGES = [
    (replaces, "'data =' replaces a tensor: write into it instead, with data.copy_(...)."),
    (replaces_grad, "'grad =' replaces a tensor: write into it instead, with grad.copy_(...)."),
    *[(f, f"'in-place operation' would write a result {of} into a tensor {into}: {FITS}.") for f,of,into in (
        (fills_one, WHOLE, 'with a single value'), (fills_rows, WHOLE, 'of shape (n, 1)'), (fills_from_p, WHOLE, 'of shape (3, 3)'),
        (fills_square, 'of shape (4, 4)', 'of shape (3, 3)'), (fills_from_rows, 'of shape (n, 1)', 'of shape (3, 3)'))],
    (casts, f"'to(torch.int32)' is not a supported cast: {CAST}."),
    (branches, f"'bool' of a tensor {WAIT}instead of branching on a tensor's value, use torch.where, clamp or maximum."),
    *[(f, f"'item' {WAIT}keep the value as a tensor.") for f in (reads, converts, lists)],
    *[(f, "'cumsum' is not in the table of operations.") for f in (unknown, unknown_function)],
    (indexes, "'indexing' with 0 is not in the table of operations."),
    (floors, "'div with rounding_mode='floor'' is not in the table of operations: divide, then call floor() or trunc()."),
    (another_dtype, "'mean with dtype=torch.float64' is not supported: cast the tensor first, with x.to(dtype)."),
    (odd_axis, AXIS+"got dim='rows': give an integer or a tuple of integers."),
    (no_keepdim, AXIS+'with dim=1 would remove the axis: use keepdim=True and let the result broadcast.'),
    (norm3, "'norm with p=3' is not in the table of operations, which has p=1, 2, 'fro' and inf."),
    (spectral, "'linalg.norm of matrices with ord=2' is not in the table of operations, which has ord='fro'."),
    (max_along, "'max along an axis' also returns indices: use amax with keepdim=True."),
    (min_along, "'min along an axis' also returns indices: use amin with keepdim=True."),
    (where_one, "'where with one argument' returns indices: use torch.where(condition, x, y)."),
    (foreign_first, "'mul' has a first argument that is neither the parameter, its gradient, its state nor computed from these."),
    (foreign, "'mul' got a Tensor that is neither the parameter, its gradient, its state nor a number."),
    (text, "'mul' got a str that is neither the parameter, its gradient, its state nor a number.")]

@pytest.mark.parametrize('stepper,message', MESSAGES, ids=[f.__name__ for f,_ in MESSAGES])
def test_messages_of_stand_ins(stepper, message):
    "Each message names the stepper, the operation and the value given, says what is allowed, and ends with the remedies"
    with pytest.raises(UnsupportedError) as e: trace_steppers([stepper], SLOTS, {}, {}, shape=torch.Size((3,4)))
    assert str(e.value) == (f"stepper '{stepper.__name__}': {message} Run this optimizer in native mode (no foreach, jit or fused), write "
        "the stepper with supported tensor operations (fastxtend_opt.engine.ops.OPS), or add an operation there with `add_op`.")

@pytest.mark.parametrize('stepper,what', [(uses_state, "state 'square'"), (uses_result, 'a tensor')])
def test_message_of_a_shape_for_opaque_calls(stepper, what):
    with pytest.raises(ValueError) as e: trace_steppers([stepper], SLOTS, {}, {}, shape=torch.Size((3,4)))
    assert str(e.value) == (f"stepper '{stepper.__name__}': 'mul' on {what} of shape (3, 3), which does not broadcast to its "
                            f"parameter. {SHAPES}")

def test_message_of_an_axis():
    with pytest.raises(IndexError) as e: trace_steppers([no_such_axis], SLOTS, {}, {}, shape=torch.Size((3,4)))
    assert str(e.value) == "stepper 'no_such_axis': 'mean' along axis 2 of a tensor with 2 axes. Use an axis from -2 to 1."

def test_message_of_opaque_calls_in_jit():
    @opaque
    def reversed_rows(x): return x.flip(-2)
    def reverses(p, **kw): p.sub_(reversed_rows(p.grad.data))
    tape,_ = trace_steppers([reverses], SLOTS[:2], {}, {})
    with pytest.raises(UnsupportedError) as e: compile_script(tape)
    assert str(e.value) == ("jit=True can't run @opaque functions, and the steppers call reversed_rows. Use foreach=True or fused=True, "
        "which call them for many matrices at once, or native mode (no foreach, jit or fused). No parameter was changed.")

def test_shapes_and_protocols_of_stand_ins():
    "A read of the shape asks for a trace per shape, a read of `ndim` for one per number of axes; protocols that are missing are missing"
    p = TapeTensor(Tape(SLOTS[:2]), -1, 'e', F32)
    for read,by in ((lambda: p.shape, True), (lambda: p.numel(), True), (lambda: len(p), True), (lambda: p.ndim, 'axes'),
                    (lambda: p.mean(0, keepdim=True), 'axes')):
        with pytest.raises(NeedsShape) as e: read()
        assert e.value.by == by
    with pytest.raises(AttributeError, match="'TapeTensor' object has no attribute '__array_interface__'"): p.__array_interface__
    assert p.norm(math.inf).kind == 's'
