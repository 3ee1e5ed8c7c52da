"""Modules:

- `fastxtend_opt.all`: Everything: use `from fastxtend_opt.all import *` after fastai's import, so that `Adam` is this library's"""

__version__ = "0.1.0"
