"""Everything: `from fastxtend_opt.all import *`, after fastai's, so that `Adam` and its like are this library's

Written by hand; `tests/test_package.py` holds it against the modules. The commands (`tools.cli`, `tools.demo`) are not part of it."""
from .engine.ops import *
from .engine.tape import *
from .engine.cohort import *
from .engine.foreach import *
from .engine.torchscript import *
from .engine.build import *
from .engine.phases import *
from .engine.cpp import *
from .engine.triton import *
from .engine.fused import *
from .engine.optimizer import *
from .engine.registry import *
from .algorithms.sgd import *
from .algorithms.rmsprop import *
from .algorithms.adam import *
from .algorithms.radam import *
from .algorithms.qhadam import *
from .algorithms.larc import *
from .algorithms.lamb import *
from .algorithms.lookahead import *
from .algorithms.ranger import *
from .algorithms.adan import *
from .algorithms.lion import *
from .algorithms.stableadam import *
from .algorithms.sophia import *
from .algorithms.schedulefree import *
from .training.schedule import *
from .training.decoupled_decay import *
from .training.low_precision import *
from .training.gradient_release import *
from .training.optimizer_accumulation import *
from .tools.plots import *
from .tools.benchmark import *
from .tools.catalogue import *
