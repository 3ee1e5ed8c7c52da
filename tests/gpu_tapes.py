"Tapes to compile for a GPU, in a separate process where no interpreter is set (`test_triton`)"
import torch
from fastxtend_opt.engine.cohort import make_cohorts
from fastxtend_opt.engine.ops import OPS
from fastxtend_opt.engine.kinds import TapeSlot
from fastxtend_opt.engine.trace import trace_steppers
from fastxtend_opt.optimizer.traced import TapeOptimizer
from fastxtend_opt.definition.registry import get_optimizer, list_optimizers
from helpers import CORE
from test_ops import NUMBERS,count

def optimizer_tape(name, dtype):
    "The tape of a step after the first ones, and with everything that such a step does (LookAhead's sync, rectified RAdam)"
    p = torch.nn.Parameter(torch.ones(8, dtype=dtype)); p.grad = torch.ones_like(p)
    opt = get_optimizer(name).func([p], lr=.01, **({'wd':.01} if 'wd' in get_optimizer(name).hypers else {}), foreach=True)
    inner = getattr(opt, 'opt', opt)
    tapes,real = [],TapeOptimizer._trace
    def trace(self, *args):
        work = real(self, *args)
        tapes[:] = [t for _,t,_ in work]
        return work
    inner._trace = trace.__get__(inner)
    for _ in range(12): opt.step() # the twelfth step is a sixth one of Lookahead
    return tapes[0]

def row_tape(name, dtype):
    n = count(name)
    out = TapeSlot('out', 's' if OPS[name].reduce else 'e', dtype)
    slots = (TapeSlot('p','e',dtype), TapeSlot('grad','e',dtype), *sorted((*(TapeSlot(f'x{i}','e',dtype) for i in range(n)), out)))
    def stepper(p, out, **kwargs):
        ys = [kwargs[f'x{i}'] for i in range(n)]
        if name == 'where' or name.startswith('logical'): ys = [y > .5 if i == 0 or name != 'where' else y for i,y in enumerate(ys)]
        out.copy_(p.tape.emit(name, *ys, *NUMBERS.get(name, [])))
    return trace_steppers([stepper], slots, {}, {})[0]

def tapes(what):
    "`what` is 'rows', 'optimizers' or 'core'"
    if what == 'rows': yield from ((f'{n}-{str(d)[6:]}', row_tape(n, d)) for n in OPS for d in (torch.float32, torch.float64))
    else: yield from ((f'{o.name}-{str(d)[6:]}', optimizer_tape(o.name, d))
                      for o in list_optimizers() if what == 'optimizers' or o.name in CORE
        for d in ((torch.float32, torch.bfloat16) if o.name in CORE else (torch.float32,)))
