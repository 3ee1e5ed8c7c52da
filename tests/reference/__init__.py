"""Slow float64 versions of the algorithms, on numpy arrays and in the papers' notation: one object a tensor, `step(g, lr)` moves `theta`.

They share no code with fastai, with torch.optim or with the package under test: only the formulas of the papers, with the choices
that the project took where papers leave one (they are named in each docstring). `lr` is given at each step, because it is scheduled.
"""
from .sgd import SGD
from .rmsprop import RMSProp
from .adam import Adam
from .radam import RAdam
from .qhadam import QHAdam
from .larc import LARS
from .lamb import LAMB
from .lookahead import Lookahead,Ranger
from .adan import Adan
from .lion import Lion
from .stableadam import StableAdamW
from .sophia import SophiaG
from .schedulefree import SGDScheduleFree,AdamWScheduleFree,RAdamScheduleFree
