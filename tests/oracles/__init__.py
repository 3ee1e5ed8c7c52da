"""What each algorithm of the catalogue is tested against: a module an optimizer, named as it, with

    REFERENCE   (theta, hypers, decay of this tensor) -> an object of `tests/reference/`: `step(g, lr)` moves `theta`
    STATE       name of our state -> attribute of that object
    CASES       hyperparameters of the trajectories, two or more; `wd` and `decouple_wd` come from the test
    DEFAULTS    the function's hyperparameters and defaults as the specification has them, in order, without `decouple_wd`
    PEERS       other libraries: (function made by `peer`, hyperparameters, names of the decays in which both agree)
    DEVIATIONS  ports that differ, as the page says: (function made by `peer`, hyperparameters, least distance seen, relative to the way)
    WHOLE_MODEL does a step depend on all tensors? (default: no) REFERENCE then takes lists of thetas and decays, has an object a tensor in
    `inner`, and `step` takes lists ROUNDED     names of state that rounding decides in float32, so that modes are not compared by it there
    (default: none) SIGNED      does the last bit of a sum decide the direction of a step? (default: no)

The older ones stand in `test_oracles.py` itself."""
import importlib,pkgutil
from functools import wraps

def load(): return {m.name: importlib.import_module(f'{__name__}.{m.name}') for m in pkgutil.iter_modules(__path__)}

def peer(late=True, same_lr=False, **tol):
    """Mark `f`, which makes from hyperparameters a function of torch's parameter groups. `late`: does it count the steps of a tensor, not
    of a group? `same_lr`: do all tensors have to have one learning rate? `rtol`, `atol`: where it agrees less closely than 1e-10, with the
    reason in its docstring"""
    def _inner(f):
        f.late,f.same_lr,f.tol = late,same_lr,tol
        return f
    return _inner
