"""Every parameter of everything that is exported has a docment, and the docment of `**kwargs` is not shown as that of the result."""
import importlib,inspect,re
from functools import lru_cache
import pytest
from fastcore.docments import docments
from test_structure import TOP,modules

def exported():
    for name in modules():
        if name in TOP or name.endswith('_template'): continue
        mod = importlib.import_module(f'fastxtend_opt.{name}')
        for k in getattr(mod, '__all__', ()):
            o = getattr(mod, k)
            if getattr(o, '__module__', '')==mod.__name__ and (inspect.isfunction(o) or inspect.isclass(o)): yield pytest.param(o, id=f'{name}.{k}')

EVERY = list(exported())

def functions(o):
    "`o` itself, or `__init__` and the public methods that a class defines"
    if not inspect.isclass(o): return [o]
    if not issubclass(o, object) or issubclass(o, tuple): return []
    return [f for k,f in vars(o).items() if inspect.isfunction(f) and (k=='__init__' or not k.startswith('_'))]

def lacks(f):
    "Names of the parameters of `f` without docment"
    try: d,ps = docments(f, args_kwargs=True),inspect.signature(f).parameters
    except (OSError,TypeError): return []
    return [k for k in ps if k not in ('self','cls','args','kwargs') and not d.get(k)]

@pytest.mark.parametrize('o', EVERY)
def test_every_parameter_has_a_docment(o):
    missing = {f.__qualname__:ks for f in functions(o) if (ks := lacks(f))}
    assert not missing, f'no docment: {missing}'

@pytest.mark.parametrize('o', EVERY)
def test_result_is_not_kwargs(o):
    "fastcore reads the comment of the line before `)->` where that has none, and takes no comment of `**kwargs` for a parameter's"
    for f in functions(o):
        try: said = re.findall(r'^ *\*\*?\w+,? # (.*)$', inspect.getsource(f), re.M)
        except (OSError,TypeError): continue
        shown = docments(f).get('return')
        assert not shown or shown not in said, f'{f.__qualname__}: {shown!r} is shown for the result: give it a docment of its own, `)->... # ...`'
