"The optimizers in fastai's Learner on real data: every mode's loss of every batch equals native's to 1e-4, in each scenario."
import os,subprocess,sys,threading
from functools import lru_cache,partial
from pathlib import Path

import pytest,torch
from fastai.callback.fp16 import AMPMode,MixedPrecision,ModelToHalf,NonNativeMixedPrecision,_copy_state,get_master
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.callback.training import BnFreeze,GradientAccumulation,GradientClip
from fastai.learner import Callback,L,load_learner
from fastai.vision.core import TensorImageBW
from torch.amp import GradScaler,autocast

import fastxtend_opt.training.schedule
from helpers import ALL_MODES,ENGINES,MODES,assert_bitwise,assert_same,interpreted_slow,slow
from learner_utils import dls,learner,losses,no_warnings,weights

RTOL = 1e-4
SCENARIOS = {}

def scenario(opt, **kwargs):
    "Register a training: `f(learn, path)` runs with a Learner in each mode; its result is compared too"
    def _inner(f):
        SCENARIOS[f.__name__] = (f,opt,kwargs)
        return f
    return _inner

SHORT = dict(n_train=192) # six batches an epoch
def play(name, mode, path):
    f,opt,kwargs = SCENARIOS[name]
    learn = learner(opt, mode, path, **{**kwargs, 'dls_kw':{**SHORT, **kwargs.get('dls_kw', {})}})
    extra = f(learn, path)
    return dict(losses=losses(learn), extra=extra)

@pytest.fixture(scope='module')
def native(tmp_path_factory):
    "Native's losses of a scenario, trained once"
    return lru_cache(maxsize=None)(lambda name: play(name, 'native', tmp_path_factory.mktemp(name)))

# ---------------------------------------------------------------- kinds of fit
@scenario('sgd', opt_kw=dict(mom=.9, wd=.01))
def fit(learn, path):
    learn.fit(2, 5e-2)
    learn.fit(1, slice(5e-3,5e-2), wd=.1)
    assert [h['wd'] for h in learn.opt.hypers]==[.1]*3

@scenario('adam')
def fit_one_cycle(learn, path):
    learn.fit_one_cycle(4, 8e-3)
    assert 0<learn.opt.hypers[-1]['lr']<1e-4 and abs(learn.opt.hypers[-1]['mom']-.95)<.01

@scenario('qhadam')
def fit_one_cycle_discriminative(learn, path):
    learn.fit_one_cycle(3, slice(2e-4,8e-3), moms=(.9,.8,.9))
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert abs(lrs[1]/lrs[0]-40**.5)<1e-3 and abs(lrs[2]/lrs[0]-40)<1e-3

@scenario('sgd')
def fit_one_cycle_without_mom(learn, path):
    learn.fit_one_cycle(2, .2)        # it sets a `mom` that this algorithm does not read
    assert 'mom' in learn.opt.hypers[0]

@scenario('ranger')
def fit_flat_cos(learn, path): learn.fit_flat_cos(3, 8e-3)

@scenario('radam')
def fit_flat_varied(learn, path):
    learn.fit_flat_varied(4, slice(1e-3,4e-3), next_lr=[slice(2e-3,8e-3), 4e-3], change_by=[1,.5], change_time=[.125,0],
                          change_sched=SchedLin)
    learn.fit_flat_varied(3, 4e-3, start_epoch=2)

@scenario('larc', opt_kw=dict(wd=.01))
def fit_sgdr(learn, path): learn.fit_sgdr(2, 1, .5)

@scenario('lamb', opt_kw=dict(wd=.01))
def fine_tune(learn, path): learn.fine_tune(2, 2e-2, freeze_epochs=1)

@scenario('ranger')
def fine_tune_twice(learn, path):
    learn.fine_tune(1, 1e-2)            # freezing clears the state, with Ranger's slow weights
    learn.fine_tune(1, 1e-2)

@scenario('rmsprop', opt_kw=dict(mom=.9))
def reset_opt(learn, path):
    learn.fit(1, 5e-4)
    old = learn.opt
    learn.fit(1, 5e-4, reset_opt=True)
    assert learn.opt is not old

# ---------------------------------------------------------------- freezing
def _freezing(learn):
    before = weights(learn)
    learn.freeze()
    learn.fit(1, 5e-3)
    after = weights(learn)
    assert torch.equal(before['0.0.weight'], after['0.0.weight']) and not torch.equal(before['4.2.weight'], after['4.2.weight'])
    learn.unfreeze()
    learn.fit(1, slice(1e-3,8e-3))
    assert not torch.equal(after['0.0.weight'], learn.model.state_dict()['0.0.weight'])
    learn.freeze_to(-2)
    learn.fit(1, 5e-3)
    # frozen weights with a grad of zeros are still decayed by fastai, which losses behind a BatchNorm would not show
    return {k:v.norm().item() for k,v in learn.model.named_parameters() if v.dim()>1}

@scenario('adam', opt_kw=dict(wd=.1))
def freeze_unfreeze(learn, path): return _freezing(learn)

@scenario('larc', opt_kw=dict(trust_coeff=.2, wd=.1))
def freeze_unfreeze_larc(learn, path): return _freezing(learn)

@scenario('ranger', opt_kw=dict(wd=.1), train_bn=False)
def freeze_unfreeze_without_bn(learn, path):
    norms = _freezing(learn)
    assert not learn.model[0][1].weight.requires_grad
    return norms

@scenario('lamb', opt_kw=dict(wd=.1))
def freeze_with_bn_in_eval(learn, path):
    learn.add_cb(BnFreeze())
    return _freezing(learn)

# ---------------------------------------------------------------- weight decay of norms and biases
def _wd(learn, path, wd): learn.fit_one_cycle(2, slice(1e-3,4e-3), wd=wd)
for _bn_bias in (False,True):
    for _opt,_wd_,_kw in (('adam',5.,{}),('rmsprop',.5,dict(decouple_wd=False)),('lamb',.5,dict(decouple_wd=False)),('ranger',5.,{})):
        f = partial(_wd, wd=_wd_)
        f.__name__ = f"wd_bn_bias_{_bn_bias}_{_opt}"
        scenario(_opt, opt_kw=_kw, wd_bn_bias=_bn_bias)(f)

@pytest.mark.parametrize('opt', ['adam','rmsprop','lamb','ranger'])
def test_wd_bn_bias_makes_a_difference(native, opt):
    a,b = (native(f'wd_bn_bias_{o}_{opt}')['losses']['train'] for o in (False,True))
    assert max(abs(x-y)/y for x,y in zip(a,b)) > 10*RTOL

# ---------------------------------------------------------------- callbacks
@scenario('adam')
def lr_find(learn, path):
    learn.fit(1, 4e-3)
    before = weights(learn)
    found = learn.lr_find(start_lr=1e-5, end_lr=1e-2, num_it=20, show_plot=False)
    assert_bitwise(weights(learn), before)
    learn.fit(1, 4e-3)                  # with the state of before lr_find
    return found.valley

@scenario('ranger')
def lr_find_at_first(learn, path):
    before = weights(learn)
    found = learn.lr_find(start_lr=1e-5, end_lr=1e-2, num_it=20, show_plot=False)
    assert_bitwise(weights(learn), before)
    assert all(not set(o)-{'do_wd','force_train'} for o in learn.opt.state_dict()['state'])
    learn.fit(1, 4e-3)
    return found.valley

@scenario('sgd', opt_kw=dict(mom=.9), dls_kw=dict(bs=16))
def gradient_accumulation(learn, path): learn.fit(2, 5e-2, cbs=GradientAccumulation(n_acc=48))

@scenario('adam', dls_kw=dict(bs=16))
def gradient_accumulation_adam(learn, path): learn.fit_one_cycle(2, 8e-3, cbs=GradientAccumulation(n_acc=64))

@scenario('radam')
def gradient_clip(learn, path): learn.fit(2, 8e-3, cbs=GradientClip(.1))

@scenario('qhadam')
def channels_last(learn, path):
    learn.fit(1, 4e-3)                  # the state is contiguous, what follows is not
    learn.fit(2, 4e-3, cbs=ChannelsLast())
    w = learn.model[2][0].convpath[0][0].weight
    assert w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()

@scenario('lamb')
def channels_last_and_back(learn, path):
    learn.to_channelslast(use_amp=False)
    learn.fit(1, 4e-3)
    learn.to_contiguous()
    learn.fit(1, 4e-3)

@scenario('adam')
def save_model(learn, path):
    learn.fit(3, 8e-3, cbs=SaveModelCallback(with_opt=True, fname='best'))
    learn.fit(1, 4e-3)

@scenario('ranger')
def save_model_every_epoch(learn, path):
    learn.fit(2, 8e-3, cbs=SaveModelCallback(with_opt=True, fname='each', every_epoch=True))
    assert (path/'models'/'each_1.pth').exists()
    learn.load('each_0', with_opt=True)
    learn.fit(1, 8e-3)

@scenario('sgd', opt_kw=dict(mom=.9))
def reduce_lr_on_plateau(learn, path):
    learn.fit(4, slice(8e-3,8e-2), cbs=ReduceLROnPlateau(patience=1, min_delta=10., factor=2.))
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert lrs[-1]<=8e-2/4              # written into the hypers in place, by the callback
    return lrs

@scenario('rmsprop')
def early_stopping(learn, path):
    learn.fit(5, 5e-4, cbs=EarlyStoppingCallback(min_delta=10., patience=1))
    assert len(learn.record.valid_losses)==2 and len(learn.record.train_losses)==12

class _ToImages(Callback):
    "Inputs of fastai's tensor class, as its vision pipelines produce them"
    def before_batch(self): self.learn.xb = tuple(TensorImageBW(o) for o in self.xb)

@scenario('adam')
def tensor_subclasses(learn, path): learn.fit(2, 4e-3, cbs=_ToImages())

# ---------------------------------------------------------------- mixed precision, as far as there is any on the CPU
# fastai 2.8 writes autocast('cuda') and GradScaler('cuda') into MixedPrecision: without a GPU both disable themselves with a warning, and
# to_fp16 and to_bf16 train in float32. NonNativeMixedPrecision asserts a CUDA device. The classes below take the same ways on the CPU.
_no_cuda = [".*CUDA is not available.*", ".*User provided device_type of 'cuda'.*", ".*torch.cuda.amp.*"]

def _mixed(learn):
    with no_warnings(_no_cuda): learn.fit(2, 4e-3)

@scenario('adam')
def to_bf16(learn, path): _mixed(learn.to_bf16())

@scenario('ranger')
def to_fp16(learn, path): _mixed(learn.to_fp16())

class CPUMixedPrecision(MixedPrecision):
    "fastai's callback with autocast and loss scaling for the CPU"
    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode==AMPMode.BF16 else torch.float16
        self.autocast,self.scales = autocast('cpu', dtype=dtype),L()
        self.learn.scaler = GradScaler('cpu', **{**self.kwargs, 'enabled':dtype==torch.float16})
        self.dtypes,self.cancelled = set(),0
    def after_pred(self):
        self.dtypes.add(self.learn.pred.dtype)
        super().after_pred()
    def after_cancel_step(self): self.cancelled += 1

@scenario('adam', dls_kw=dict(n_train=128))
def autocast_bf16(learn, path):
    amp = CPUMixedPrecision('bf16')
    learn.fit(1, 1e-3, cbs=amp)
    assert amp.dtypes=={torch.bfloat16}

@scenario('sgd', opt_kw=dict(mom=.9))
def autocast_fp16_with_overflow(learn, path):
    amp = CPUMixedPrecision('fp16', init_scale=2.**24, growth_interval=2)
    learn.fit(2, 1e-2, cbs=amp)
    assert amp.dtypes=={torch.float16} and 0<amp.cancelled<12    # some steps were skipped, others were not
    return amp.cancelled

class CPUNonNative(NonNativeMixedPrecision):
    "fastai's float32 master weights for a float16 model, without its check for CUDA"
    def before_fit(self):
        if self.learn.opt is None: self.learn.create_opt()
        self.model_pgs,self.master_pgs = get_master(self.opt, self.flat_master)
        self.old_pgs = self.opt.param_lists
        _copy_state(self.learn.opt, self.model_pgs, self.master_pgs)
        if self.dynamic: self.count = 0

@pytest.mark.parametrize('mode', ALL_MODES)
def test_non_native_fp16_is_refused_by_fastai(mode):
    learn = learner('adam', mode)
    with pytest.raises(AssertionError, match='requires'): learn.to_non_native_fp16().fit(1)

@scenario('adam', dls_kw=dict(n_train=96))
def master_weights(learn, path):
    learn.fit(1, 1e-3)
    learn.add_cbs([ModelToHalf(), CPUNonNative(dynamic=False, loss_scale=8)])
    learn.fit(1, 1e-3)                  # steps other parameters than before, with the state moved to them
    learn.remove_cbs([ModelToHalf, CPUNonNative])
    learn.fit(1, 1e-3)                  # and the old ones again

# ---------------------------------------------------------------- the comparison
# the interpreter takes seconds for a fit: the GPU's kernels go through these by default, and through all with -m slow
INTERPRETED = ('fit_one_cycle','freeze_unfreeze_larc','autocast_fp16_with_overflow')
def test_interpreted_scenarios_exist(): assert set(INTERPRETED) <= set(SCENARIOS)

# and those of foreach and jit through these and some more, as they have the tape in common with fused
SHARED = (*INTERPRETED,'lr_find','master_weights','channels_last_and_back','wd_bn_bias_False_lamb','save_model')
@pytest.mark.parametrize('name,mode', [slow(n, m, id=f'{n}-{m}', when=n not in dict(triton=INTERPRETED, fused=SCENARIOS).get(m, SHARED))
                                       for n in SCENARIOS for m in MODES])
def test_losses_equal_native(native, name, mode, tmp_path):
    ref = native(name)
    assert len(ref['losses']['train'])>=4
    assert_same(play(name, mode, tmp_path), ref, rtol=RTOL)

@pytest.mark.parametrize('opt', ['sgd','rmsprop','adam','radam','qhadam','larc','lamb','ranger'])
def test_every_optimizer_appears(opt): assert any(o[1]==opt for o in SCENARIOS.values())

@pytest.mark.parametrize('mode', MODES)
def test_modes_are_in_use(mode):
    for name in ('adam','ranger'):
        learn = learner(name, mode)
        learn.create_opt()
        opts = [learn.opt, getattr(learn.opt, 'opt', None)]     # Lookahead may be a wrapper
        assert any(isinstance(o, ENGINES[mode]) for o in opts)

# ---------------------------------------------------------------- checkpoints
_numpy = ['numpy.core is deprecated']   # fastai 2.8's load_model names np.core

CHECKPOINTED = dict(adam=4e-3, ranger=8e-3, larc=.2)

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Train for ten steps in a mode and save: the folder, and the losses of one more epoch"
    def _inner(name, mode):
        path = tmp_path_factory.mktemp(f'{name}_{mode}')
        learn = learner(name, mode, path, dls_kw=dict(n_train=320))
        learn.fit(1, CHECKPOINTED[name])
        learn.save('ten', with_opt=True)
        return path,_go_on(learn, name)
    return lru_cache(maxsize=None)(_inner)

def _go_on(learn, name):
    learn.dls = dls(seed=7)
    n = len(learn.record.train_losses)
    learn.fit(1, slice(CHECKPOINTED[name]))
    return learn.record.train_losses[n:]

def _across(name, mode, into):
    "By default to native and back, and one optimizer from any mode to any, with Triton's interpreter only to native and back"
    if 'triton' in (mode,into): return name=='adam' and 'native' in (mode,into)
    return name=='adam' or 'native' in (mode,into)

@pytest.mark.parametrize('name,mode,into', [slow(n, a, b, when=not _across(n, a, b)) for n in CHECKPOINTED for a in ALL_MODES
                                            for b in ALL_MODES])
def test_save_and_load_across_modes(saved, name, mode, into):
    path,after = saved(name, mode)
    learn = learner(name, into, path)
    learn.create_opt()
    with no_warnings(_numpy): learn.load('ten', with_opt=True)
    got = _go_on(learn, name)
    if mode==into: assert got==after
    else: assert_same(got, after, rtol=RTOL)

@interpreted_slow(ALL_MODES)
def test_state_matters(saved, mode):
    "Without the optimizer's state the losses differ, so the comparison above depends on it"
    path,after = saved('adam', mode)
    learn = learner('adam', mode, path)
    with no_warnings(_numpy): learn.load('ten', with_opt=False)
    got = _go_on(learn, 'adam')
    assert max(abs(x-y)/y for x,y in zip(got,after)) > 10*RTOL

@interpreted_slow(ALL_MODES)
def test_loading_into_a_used_learner_goes_back(saved, mode):
    path,after = saved('ranger', mode)
    learn = learner('ranger', mode, path)
    learn.fit(2, 1e-2)
    with no_warnings(_numpy): learn.load('ten', with_opt=True)
    assert _go_on(learn, 'ranger')==after

@pytest.mark.parametrize('mode,name', [slow(m, n, when=m=='triton') for m in ALL_MODES
                                       for n in (['adam'] if m=='triton' else ['adam','ranger','lamb'])])
def test_export_and_load_learner(mode, name, tmp_path):
    def train(m, path, fname):
        learn = learner(name, m, path)
        learn.fit(1, 4e-3)
        learn.export(fname)
        return learn
    learn = train(mode, tmp_path, 'a.pkl')
    with no_warnings(['load_learner.*']): loaded = load_learner(tmp_path/'a.pkl')
    assert loaded.opt is None
    data = dls(seed=5)
    preds = learn.get_preds(dl=data.valid)[0]
    assert_bitwise(loaded.get_preds(dl=data.valid)[0], preds)
    # both continue: the exported one with its state, the loaded one with a new optimizer of the same kind
    loaded.dls = data
    loaded.fit(1, 4e-3)
    assert type(loaded.opt) is type(learn.opt)
    learn.dls = dls(seed=5)
    learn.fit(1, 4e-3)
    if mode!='native':
        ref = train('native', tmp_path, 'b.pkl')
        with no_warnings(['load_learner.*']): ref_loaded = load_learner(tmp_path/'b.pkl')
        ref.dls,ref_loaded.dls = dls(seed=5),dls(seed=5)
        ref.fit(1, 4e-3); ref_loaded.fit(1, 4e-3)
        assert_same(losses(learn), losses(ref), rtol=RTOL)
        assert_same(losses(loaded), losses(ref_loaded), rtol=RTOL)

# ---------------------------------------------------------------- threads and processes
@interpreted_slow(ALL_MODES)
def test_fit_in_a_thread(native, mode, threads):
    "Two Learners train at the same time in two threads without disturbing each other; a step uses two threads"
    if mode=='fused': threads(2)
    jobs = [learner('adam', mode, dls_kw=SHORT),learner('ranger', mode, dls_kw=SHORT)]
    errors = []
    def run(learn, fit):
        try: fit(learn, None)
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=o) for o in zip(jobs, (fit_one_cycle,fit_flat_cos))]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not errors, errors
    for learn,name in zip(jobs, ('fit_one_cycle','fit_flat_cos')): assert_same(losses(learn), native(name)['losses'], rtol=RTOL)

_WORKERS = """
import sys,torch
from helpers import assert_same
from learner_utils import learner,losses
torch.set_num_threads(2)
def train(mode, workers, step_first):
    learn = learner('adam', mode, dls_kw=dict(num_workers=workers, n_train=128))
    if step_first:                      # the kernel's threads exist before the first worker is forked
        learn.create_opt()
        for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
        learn.opt.step()
        learn.opt.clear_state()
    learn.fit(2, 1e-3)                  # workers are forked anew for each epoch, so before and after steps
    return losses(learn)
for step_first in (False,True):
    ref = train('native', 0, step_first)
    for mode in sys.argv[1:]: assert_same(train(mode, 2, step_first), ref, rtol=1e-4, path=f'{mode} {step_first}')
print('all trained')
"""
def test_data_loader_workers():
    "Two worker processes, forked before and after fused steps; in a separate process, so that a deadlock is a failure"
    here = Path(__file__).parent
    env = {**os.environ, 'OMP_NUM_THREADS':'2', 'OMP_WAIT_POLICY':'passive',
           'PYTHONPATH':os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH','')])}
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', _WORKERS, *MODES[:3]], env=env, capture_output=True, text=True, timeout=240)
    assert res.returncode==0 and 'all trained' in res.stdout, res.stderr[-3000:]
