"""Every parameter of everything that is exported has a docment, and the docment of `**kwargs` is not shown as that of the result."""
import importlib,inspect,re
import pytest
from fastcore.docments import docments
from test_structure import TOP,modules

if 'args_kwargs' not in inspect.signature(docments).parameters:
    pytest.skip('the pages are made with fastcore 2.2 or newer', allow_module_level=True)

every = pytest.mark.parametrize('module', [m for m in modules() if m not in TOP])
INTERNAL = {'CutTape','TapePart','TapeTensor'} # classes of the engine that nothing else makes

def functions(module):
    "What a module exports: functions, and the `__init__` of classes"
    mod = importlib.import_module(f'fastxtend_opt.{module}')
    for o in (getattr(mod, k) for k in getattr(mod, '__all__', ())):
        if getattr(o, '__module__', '')!=mod.__name__ or getattr(o, '__name__', '') in INTERNAL: continue
        if inspect.isclass(o): o = vars(o).get('__init__')
        if inspect.isfunction(o) and inspect.getsourcefile(o).endswith('.py'): yield o # a dataclass has an `__init__` without source

@every
def test_every_parameter_has_a_docment(module):
    missing = {}
    for f in functions(module):
        d = docments(f, args_kwargs=True)
        missing[f.__qualname__] = [k for k in inspect.signature(f).parameters if k not in ('self','args','kwargs') and not d.get(k)]
    assert not any(missing.values()), f'no docment: { {k:v for k,v in missing.items() if v} }'

@every
def test_result_is_not_kwargs(module):
    "fastcore reads the comment of the line before `)->` where that has none, and takes no comment of `**kwargs` for a parameter's"
    for f in functions(module):
        said,shown = re.findall(r'^ *\*\*?\w+,? # (.*)$', inspect.getsource(f), re.M),docments(f).get('return')
        assert not shown or shown not in said, f'{f.__qualname__}: {shown!r} is shown for the result. Say what that is: `)->...: # ...`'

def test_options_and_factories():
    "A row for each option, and results that differ"
    from fastxtend_opt.algorithms.adam import Adam,adam
    from fastxtend_opt.definition.make import OPTIONS
    for f,result in ((Adam, 'In the mode that a flag names, or native'), (adam, 'An `opt_func`, for a `Learner`')):
        d = docments(f)
        assert d['return']==result and all(d[k] for k in OPTIONS) and 'kwargs' not in d
