"What the package changes in fastai: what `training.learner` lists, and nothing else; undone and made again by one call each."
import subprocess,sys

import pytest,torch
from fastai.learner import Learner
from fastxtend_opt.algorithms.adam import adam
from fastxtend_opt.algorithms.schedulefree import sgd_schedulefree
from fastxtend_opt.training.learner import learner_changes,patch_learner,unpatch_learner
from helpers import assert_bitwise
from learner_utils import dropout_learner,fit,weights

NAMES = [c.name for c in learner_changes]

@pytest.fixture
def unpatched():
    unpatch_learner()
    try: yield
    finally: patch_learner()

SNAPSHOT = '''
import sys
import fastai.basics,fastai.callback.all,fastai.optimizer
from fastai.learner import Learner

def classes():
    return {c for n,m in list(sys.modules.items()) if n.split('.')[0]=='fastai'
            for c in list(vars(m).values()) if isinstance(c, type) and c.__module__.split('.')[0]=='fastai'}
def snapshot(): return {c: dict(vars(c)) for c in classes()}
skip = ('__doc__','__dict__','__weakref__','__abstractmethods__','_abc_impl')
def changed(a, b):
    return sorted(f'{c.__name__}.{k}' for c in a for k in a[c].keys()|b[c].keys()
                  if k not in skip and a[c].get(k, skip) is not b[c].get(k, skip))
def functions():
    return {(n,k): v for n,m in list(sys.modules.items()) if n.split('.')[0]=='fastai'
            for k,v in list(vars(m).items()) if callable(v) and not k.startswith('__')}

before,funcs = snapshot(),functions()
import fastxtend_opt.all
from fastxtend_opt.training.learner import learner_changes,patch_learner,unpatch_learner
listed = sorted(f'Learner.{c.name}' for c in learner_changes)
assert len(before)>100, len(before)
assert changed(before, snapshot())==listed, changed(before, snapshot())
assert all(funcs[k] is v for k,v in functions().items() if k in funcs)
for c in learner_changes: assert (c.wrap is None)==(c.name not in before[Learner]), c.name
ours = snapshot()
for _ in range(2):
    for _ in range(2):
        unpatch_learner()
        assert changed(before, snapshot())==[]
    for _ in range(2):
        patch_learner()
        assert changed(before, snapshot())==listed
for c in learner_changes:
    if c.wrap: assert vars(Learner)[c.name].__wrapped__ is before[Learner][c.name], c.name
    else: assert vars(Learner)[c.name] is ours[Learner][c.name], c.name
print('fine')
'''

def test_what_is_listed_and_nothing_else():
    "Every class and function of fastai before and after the import, after undoing, and after patching again"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', SNAPSHOT], capture_output=True, text=True)
    assert r.stdout.strip().endswith('fine'), r.stderr[-3000:]

def test_undone_is_fastais_own(unpatched):
    for c in learner_changes:
        if c.wrap is None: assert not hasattr(Learner, c.name), c.name
        else: assert vars(Learner)[c.name].__globals__['__name__'].startswith('fastai.'), c.name

def test_a_plain_optimizer_trains_alike_without_the_changes(unpatched):
    a = fit(dropout_learner(adam(wd=.1, fused=True)), lr=1e-2)
    patch_learner()
    assert_bitwise(weights(a), weights(fit(dropout_learner(adam(wd=.1, fused=True)), lr=1e-2)))

def test_what_is_missing_without_the_changes_and_back_with_them(unpatched, tmp_path):
    learn = fit(dropout_learner(sgd_schedulefree(), path=tmp_path))
    assert not learn.opt.averaged and not hasattr(learn, 'schedule_free_mode') and not hasattr(learn, 'fit_flat_varied')
    y = weights(learn)
    learn.save('y')
    patch_learner()
    learn.save('x')
    assert_bitwise(weights(learn), y)
    saved = {n: torch.load(tmp_path/f'models/{n}.pth', weights_only=False)['model'] for n in 'xy'}
    assert_bitwise(saved['y'], y)
    learn.opt.eval()
    assert_bitwise(saved['x'], weights(learn))
    learn = fit(dropout_learner(sgd_schedulefree()))
    assert learn.opt.averaged and hasattr(learn, 'schedule_free_mode') and hasattr(learn, 'fit_flat_varied')

@pytest.mark.parametrize('name', NAMES)
def test_undoing_refuses_when_other_code_came_after(name, monkeypatch):
    ours = {n: vars(Learner)[n] for n in NAMES}
    monkeypatch.setattr(Learner, name, lambda self: None)
    with pytest.raises(RuntimeError, match=f'replaced Learner.{name} after fastxtend_opt'): unpatch_learner()
    monkeypatch.undo()
    assert {n: vars(Learner)[n] for n in NAMES}==ours # nothing was undone before the error

def test_every_row_says_what_and_why():
    for c in learner_changes: assert len(c.does)>20 and len(c.without)>15, c.name
