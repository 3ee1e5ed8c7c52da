"One kernel cache per test session, shared by its workers; one torch thread per process unless a test asks for more."
import atexit,dataclasses,os,shutil,tempfile
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['TRITON_INTERPRET'] = '1' # mode 'triton': the GPU's kernels, on CPU tensors

def _session_cache():
    "A private folder for this session; `FASTXTEND_OPT_TEST_CACHE` names one to keep between sessions"
    kept = os.environ.get('FASTXTEND_OPT_TEST_CACHE')
    if kept:
        Path(kept).mkdir(mode=0o700, parents=True, exist_ok=True)
        return kept
    path = tempfile.mkdtemp(prefix='fastxtend_opt_tests_')
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path

# pytest-xdist's workers inherit the controller's environment, so that each kernel is built once a session
if 'PYTEST_XDIST_WORKER' not in os.environ: os.environ['FASTXTEND_OPT_CACHE'] = _session_cache()

import helpers,pytest,torch
from fastxtend_opt.engine import build,triton_launch
from fastxtend_opt.optimizer.passes import dry_run
from fastxtend_opt.definition.make import MODES
from fastxtend_opt.definition.registry import list_optimizers
from helpers import CORE,INTERPRETED,backend_of
torch.set_num_threads(1)
triton_launch.GPU_BLOCK,triton_launch.GPU_PROGRAMS = 4096,1 # few programs for the interpreter, and chunks of several blocks

def _lighten_interpreter():
    """Halve the time of Triton's interpreter: don't look for integer overflows (`test_integers_do_not_overflow` does), and cache everything
    that depends on a type alone instead of computing it for each value"""
    try:
        from triton.runtime import interpreter as ti
        import triton.language.core as tl
    except ImportError: return
    ti.interpreter_builder.options = dataclasses.replace(ti.interpreter_builder.options, sanitize_overflow=False)
    dtypes,np_dtype,with_element_ty,init = {},ti._get_np_dtype,tl.block_type.with_element_ty,tl.tensor.__init__
    def _np_dtype(t):
        # a pointer has no hash
        key = t if type(t) is tl.dtype else type(t) is tl.block_type and type(t.element_ty) is tl.dtype and t.element_ty
        if not key: return np_dtype(t)
        if key not in dtypes: dtypes[key] = np_dtype(key)
        return dtypes[key]
    def _with_element_ty(self, scalar_ty):
        if type(scalar_ty) is not tl.dtype: return with_element_ty(self, scalar_ty)
        made = self.__dict__.setdefault('_made', {})
        if scalar_ty not in made: made[scalar_ty] = with_element_ty(self, scalar_ty)
        return made[scalar_ty]
    def _init(self, handle, type):
        if '_tensor' in type.__dict__: self.__dict__.update(type.__dict__['_tensor'], handle=handle)
        else:
            init(self, handle, type)
            type._tensor = {k:v for k,v in self.__dict__.items() if k != 'handle'}
    ti._get_np_dtype,tl.block_type.with_element_ty,tl.tensor.__init__ = _np_dtype,_with_element_ty,_init
_lighten_interpreter()

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests marked slow (the whole cross product, long property tests)')

def _has_modes(item, rows={}):
    "Does the test's optimizer have the modes that the test names?"
    params = getattr(getattr(item, 'callspec', None), 'params', {})
    if not rows: rows.update((o.name, o) for o in list_optimizers())
    row = next((rows.get(getattr(params[k], 'name', params[k])) for k in ('name','row','optimizer')
                if isinstance(getattr(params.get(k), 'name', params.get(k)), str)), None)
    modes = {'fused' if v=='triton' else v for v in params.values() if isinstance(v, str)} & set(MODES)
    return row is None or modes <= set(row.modes)

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    "Mark tests of the engine slow outside `CORE`, and leave out modes that an optimizer does not have"
    lacking = [o for o in items if not _has_modes(o)]
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [o for o in items if o not in set(lacking)]
    for item in items:
        if item.get_closest_marker('engine') is None: continue
        params = item.callspec.params
        name = next(params[k] for k in ('name','row','optimizer') if k in params)
        name = getattr(name, 'name', name)
        if name not in (INTERPRETED if 'triton' in params.values() else CORE): item.add_marker(pytest.mark.slow)

def pytest_configure(config):
    if config.getoption('--slow'): config.option.markexpr = '' # pyproject.toml deselects them with -m 'not slow'
    helpers.SLOW = config.option.markexpr!='not slow'

# Kernels are compiled with -O1, in half the time, except in these modules: users' -O3. The pages of all algorithms compare kernels of -O3
# with native. (`test_package` compiles nothing: it compares the flags in `all` with those in `build`, which must be the package's own.)
FULL = build.CPP_FLAGS
FAST = FULL if os.environ.get('FASTXTEND_OPT_TEST_O3') else tuple('-O1' if o=='-O3' else o for o in FULL)
OPTIMIZED = {'test_engine','test_ops','test_package','test_kernel_cache','test_benchmark','test_learner','test_state_machine','test_triton'}

@pytest.fixture(autouse=True)
def compiler_flags(request):
    params = getattr(getattr(request.node, 'callspec', None), 'params', {})
    full = request.module.__name__ in OPTIMIZED or 'shampoo' in map(str, params.values()) # roots of matrices amplify the last bit
    build.CPP_FLAGS = FULL if full else FAST
    yield
    build.CPP_FLAGS = FULL

@pytest.fixture(autouse=True)
def triton_backend(request):
    "In tests of mode 'triton', fused optimizers use Triton"
    params = getattr(getattr(request.node, 'callspec', None), 'params', {})
    with backend_of('triton') if any(isinstance(v, str) and v == 'triton' for v in params.values()) else nullcontext(): yield

@pytest.fixture(autouse=True)
def without_a_training_loop(request):
    """Shared tests give an optimizer only gradients, which steppers that need more (AdaHessian's) use instead. The test module of such an
    algorithm sets `TRAINS = True`"""
    with nullcontext() if getattr(request.module, 'TRAINS', False) else dry_run(): yield

@pytest.fixture
def one_thread():
    "One torch thread during the test"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def threads():
    "Set torch's threads during a test, and restore them afterwards"
    n = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(n)
