"""Modules:

- `fastxtend_opt.all`: Everything: use `from fastxtend_opt.all import *` after fastai's import, so that names such as `Adam` are this library's"""

__version__ = "0.1.0"
