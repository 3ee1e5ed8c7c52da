"""The attributes by which the rooms talk: `fastxtend_opt/protocol.py` lists all of them, and only those that are used.

The sources are read with `ast`. An attribute crosses rooms if a module sets it on something that is not its own (`opt.rules = ...`), asks
for it by name (`getattr(f, 'refuses', {})`), or reads a private one (`inner._after_step()`), and no class of its own room defines it.
Attributes of torch, fastai and Python are left out, by their names."""
import ast
from collections import defaultdict
from functools import lru_cache,partial
import pytest,torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Optimizer
from torch import nn
from test_structure import modules,room,tree
from fastxtend_opt.protocol import PROTOCOL,protocol_table

CLASSES = (torch.Tensor,nn.Module,nn.BatchNorm2d,Optimizer,Learner,DataLoaders,Callback,type(lambda:0),type,partial,torch,torch._C,tuple,
           list,dict,Exception)
FOREIGN = {name for c in CLASSES for name in dir(c)} | set('''
    training _parameters _buffers _forward_pre_hooks _NormBase _BatchNorm _orig_mod
    cbs param_lists loss_grad xb yb pred n_inp scaler distributed_trainer _execution_engine _in_backward_optimizers
    _replace _fields _getframe argtypes restype'''.split()) # what `dir` does not show: set in `__init__`, or by other packages

class Uses(ast.NodeVisitor):
    "Of one module: names of attributes that it defines in classes, sets on other objects, asks for by name, reads; names that it calls"
    def __init__(self, node):
        self.own,self.sets,self.asks,self.reads,self.calls = set(),set(),set(),set(),set()
        self.visit(node)

    def visit_ClassDef(self, node):
        for o in node.body:
            if isinstance(o, ast.FunctionDef): self.own.add(o.name)
            if not isinstance(o, (ast.Assign,ast.AnnAssign)): continue
            self.own |= {n.id for n in ast.walk(o) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        self.calls |= {o.id for o in node.decorator_list if isinstance(o, ast.Name)}
        self.generic_visit(node)

    def visit_Attribute(self, node):
        mine,name = isinstance(node.value, ast.Name) and node.value.id in ('self','cls'),node.attr
        if not isinstance(node.ctx, ast.Load): (self.own if mine else self.sets).add(name)
        else:
            self.reads.add(name)
            if not mine and name.startswith('_') and not name.startswith('__'): self.asks.add(name)
        self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, 'id', getattr(node.func, 'attr', ''))
        if isinstance(node.func, ast.Name): self.calls.add(name)
        at = dict(getattr=1, hasattr=1, setattr=1, delattr=1, attrgot=0, attrgetter=0).get(name)
        if at is not None: self._named(node.args[at:at+1], name in ('setattr','delattr'))
        if name in ('get','pop') and isinstance(node.func, ast.Attribute) and self._dict(node.func.value): self._named(node.args[:1])
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if self._dict(node.value): self._named([node.slice], not isinstance(node.ctx, ast.Load))
        self.generic_visit(node)

    def _dict(self, node): return isinstance(node, ast.Attribute) and node.attr=='__dict__'
    def _named(self, args, sets=False):
        names = {a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        if sets: self.sets |= names
        else: self.asks |= names; self.reads |= names

def place(module): return 'algorithms' if room(module)=='algorithms' else module

@lru_cache(None)
def uses(): return {m:Uses(tree(p)) for m,p in modules().items()}

def crossing(found):
    "Name of an attribute -> modules that use it where it is not their room's; `found`: module -> `Uses`"
    homes,res = defaultdict(set),defaultdict(set)
    for m,u in found.items():
        if room(m)=='tools': continue # no room below can mean a class of the tools
        for k in u.own: homes[k].add(room(m))
    for m,u in found.items():
        for k in (u.sets|u.asks)-u.own:
            if not k.startswith('__') and room(m) not in homes[k]: res[k].add(m)
    return {k:ms for k,ms in res.items() if homes[k] or len({room(m) for m in ms})>1}

def test_what_crosses_rooms_is_listed():
    listed,faults = {a.name:{*a.set_by,*a.read_by} for a in PROTOCOL},[]
    for k,ms in sorted(crossing(uses()).items()):
        if k in FOREIGN: continue
        if k not in listed: faults.append(f'{k!r} is used by {sorted(ms)}: list it in nbs/protocol.ipynb, or pass an argument')
        elif (more := {place(m) for m in ms}-listed[k]): faults.append(f'{k!r} is used by {sorted(more)} too: say so in nbs/protocol.ipynb')
    assert not faults, '\n'.join(faults)

@pytest.mark.parametrize('attr', PROTOCOL, ids=lambda a: a.name)
def test_listed_is_used(attr):
    found = defaultdict(lambda: (set(), set()))
    for m,u in uses().items():
        found[place(m)][0].update(u.own|u.sets|u.calls) # `@decays_weights` sets the attribute of this name
        found[place(m)][1].update(u.reads)
    for m in attr.set_by: assert attr.name in found[m][0], f'{m} does not set {attr.name}'
    for m in attr.read_by: assert attr.name in found[m][1], f'{m} does not read {attr.name}'
    assert len({room(m) for m in (*attr.set_by,*attr.read_by)})>1, f'{attr.name} crosses no rooms: it need not be listed'

def test_list_is_complete_and_sorted():
    names = [a.name for a in PROTOCOL]
    assert len(set(names))==len(names)
    for a in PROTOCOL: assert a.meaning and a.meaning[0].isupper() and not a.meaning.endswith('.') and a.set_by and a.read_by, a
    for on in dict.fromkeys(a.on for a in PROTOCOL):
        rows = [a.name for a in PROTOCOL if a.on==on]
        assert rows==sorted(rows) and all(f'| `{k}` |' in protocol_table(on).data for k in rows)
    with pytest.raises(ValueError, match="on='Stepper' is unknown: it must be one of stepper"): protocol_table('Stepper')

def test_scan_sees():
    "The scan on small modules: what crosses, what is at home, what belongs to one room"
    sources = {
        'engine.a': 'def f(cb): return getattr(cb, "marked", False)',
        'training.b': 'def g(f): f.marked = True\ndef h(o): return o._hidden, o._mine, o.open',
        'optimizer.c': 'class C:\n    shown = None\n    def __init__(self): self._hidden,self.open = 1,2',
        'training.d': 'class D:\n    _mine = 1',
        'tools.e': 'def t(o): o.note = 1; return hasattr(o, "note")',
        'algorithms.f': 'def F(o): o.shown = 2; o.__dict__.get("low"); o.map(attrgetter("deep"))',
        'engine.g': 'def q(o): o.__dict__["low"] = 1; setattr(o, "deep", 1)\n@mark\ndef r(): o.kept.append(1)'}
    found = {m:Uses(ast.parse(s)) for m,s in sources.items()}
    assert crossing(found)=={'marked':{'engine.a','training.b'}, '_hidden':{'training.b'}, 'shown':{'algorithms.f'},
                             'low':{'algorithms.f','engine.g'}, 'deep':{'algorithms.f','engine.g'}}
    assert found['engine.g'].sets=={'low','deep'} and 'kept' in found['engine.g'].reads and 'mark' in found['engine.g'].calls
