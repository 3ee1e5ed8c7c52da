"A real Learner on scikit-learn's handwritten digits, the same for every mode, and the results of its training."
import warnings
from contextlib import contextmanager

import torch
from torch import nn
from fastai.callback.progress import ProgressCallback
from fastai.learner import Callback,noop
from fastxtend_opt.tools.demo import digits_dls,digits_learner,digits_model,digits_splitter

from helpers import WithBackend,flags

N_TRAIN,BS = 384,32   # twelve batches an epoch

class Record(Callback):
    "Every training batch's loss, over all fits of the Learner"
    order,run_valid = 51,False          # straight after the Recorder, before the callbacks that may end the fit
    def __init__(self): self.train_losses,self.valid_losses = [],[]
    def after_batch(self): self.train_losses.append(self.learn.loss.item())
    def after_epoch(self):
        values = self.learn.recorder.values
        # an epoch that `start_epoch` skips has no values; lr_find and get_preds pass here too
        if hasattr(self.learn, 'lr_finder') or hasattr(self.learn, 'gather_preds') or not len(values) or len(values[-1])<2: return
        self.valid_losses.append(float(values[-1][1]))

def opt_func(name, mode, **kwargs):
    "`name`'s factory in `mode`: what a user passes as `opt_func`"
    from fastxtend_opt.definition.registry import get_optimizer
    f = get_optimizer(name).factory(**kwargs, **flags(mode))
    return WithBackend(f, mode) if mode in ('fused','triton') else f

def dls(seed=1, dtype=torch.float32, bs=BS, n_train=N_TRAIN, **kwargs):
    return digits_dls(bs=bs, seed=seed, n_train=n_train, dtype=dtype, **kwargs)

def learner(name, mode, path=None, dtype=torch.float32, opt_kw=None, dls_kw=None, width=8, **kwargs):
    "A Learner with three parameter groups; the same weights and batches whatever the mode"
    # SiLU, `digits_model`'s default, matters: at ReLU's kink, rounding in the last bit can turn a unit on, and move a loss by 1e-4
    data,model = dls(dtype=dtype, **(dls_kw or {})),digits_model(width, 1, seed=3).to(dtype)
    learn = digits_learner(opt_func(name, mode, **(opt_kw or {})), data, model, path=path, splitter=digits_splitter, cbs=Record(), **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def losses(learn):
    "What is compared: the loss of each training batch, and each epoch's validation loss"
    return dict(train=list(learn.record.train_losses), valid=list(learn.record.valid_losses))

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items()}

@contextmanager
def no_warnings(ignore=()):
    "Any warning is an error: fastai reports a state that it could not load as a warning"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in ignore: warnings.filterwarnings('ignore', message=o)
        yield

# ---------------------------------------------------------------- a small one with dropout and BatchNorm, for passes that must leave no
# trace in either
def dropout_learner(opt_func, cbs=(), path=None, n_train=128, bs=32, dropout=.2, **kwargs):
    torch.manual_seed(1)
    model = nn.Sequential(digits_model(4, 1, seed=3), nn.Dropout(dropout))
    learn = digits_learner(opt_func, digits_dls(bs=bs, seed=1, n_train=n_train), model, cbs=list(cbs), **kwargs)
    if path: learn.path = path
    learn.logger = noop
    return learn

def fit(learn, n=1, lr=.1, **kwargs):
    with learn.no_bar(): learn.fit(n, lr, **kwargs)
    return learn

def all_of(learn): return [t.detach().clone() for t in (*learn.model.parameters(), *learn.model.buffers())]
