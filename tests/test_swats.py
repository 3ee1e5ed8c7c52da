"SWATS: the switch of a group, against a reference of our own, and that nothing waits for it."
import copy

import numpy as np,pytest,torch
from torch import nn
from fastxtend_opt.algorithms.swats import SWATS,switch_group
from fastxtend_opt.training.gradient_release import prepare_for_gradient_release
from helpers import *
from reference.swats import SWATS as Reference,agree

def run(mode, n=30, skip=lambda i: (), **kw):
    ps,stream = make_params(((),(6,),(4,3),(5,)), torch.float64, big=False, channels_last=False),GradStream(4, spikes=(9,))
    with backend_of(mode): opt = SWATS(two_groups(ps), lr=[.01,.02], **{**dict(switch_tol=.05), **kw}, **flags(mode))
    refs,rates = [Reference(p.detach().numpy(), kw.get('mom', .9), kw.get('sqr_mom', .999), 1e-9, .05, kw.get('wd', 0.),
                            kw.get('decouple_wd', False)) for p in ps],[]
    for i in range(n):
        lrs = [.01*(1-i/40),.02*(1-i/40)]
        opt.set_hyper('lr', lrs)
        stream.set(ps, i, skip=skip(i))
        for j,(p,o) in enumerate(zip(ps, refs)):
            if p.grad is not None: o.step(p.grad.numpy(), lrs[j//2])
        agree(refs[:2]); agree(refs[2:])
        opt.step()
        for j,(p,o) in enumerate(zip(ps, refs)):
            assert_same(p.detach().numpy(), np.array(o.theta), rtol=1e-9, atol=1e-11, path=f'step {i}, tensor {j}')
        rates.append([o.rate for o in refs])
    for p,o in zip(ps, refs):
        assert_same(float(opt.state[p]['sgd_rate']), float(o.rate), rtol=1e-9, atol=1e-12)
        assert_same(opt.state[p]['sgd_avg'].numpy(), np.array(o.b), rtol=1e-9, atol=1e-11)
    return rates

KWS = {}, dict(sqr_mom=.9), dict(wd=.1), dict(wd=.1, decouple_wd=True)
@pytest.mark.parametrize('kw,mode', [slow(kw, m, id=f'{kw}-{m}', when=m=='triton' and kw!=dict(wd=.1)) for kw in KWS for m in ALL_MODES])
def test_against_the_reference(mode, kw):
    "Groups switch separately during the run (with weight decay as L2 one of them does not)"
    rates = run(mode, **kw)
    at = [next((i for i,r in enumerate(rates) if r[j]), None) for j in (0,2)]
    assert at[0] is not None and 0 < at[0] < 28 and (at[1] is None) == (kw==dict(wd=.1)), at

@interpreted_slow(ALL_MODES)
def test_late_and_missing_gradients(mode):
    "A tensor that was not stepped has its group's rate when it is back; one whose first gradient comes late takes one step of Adam"
    run(mode, skip=lambda i: [1] if i < 22 else [2] if i%3 else [])

@interpreted_slow(ALL_MODES)
def test_gradient_release_and_accumulation(mode):
    def go(release):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        with backend_of(mode): opt = SWATS([list(m[0].parameters()), list(m[2].parameters())], lr=.01, switch_tol=.3, **flags(mode))
        if release: prepare_for_gradient_release(m, opt)
        for i in range(24):
            opt.optimizer_accumulation = i%3 < 2
            m(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            opt.step(); opt.zero_grad()
        return snapshot(list(m.parameters()), opt)
    a,b = go(False),go(True)
    assert_bitwise(b, a)
    assert any(float(s['sgd_rate']) > 0 for s in a['opt']['state'])

@interpreted_slow(ALL_MODES)
def test_checkpoint_in_each_phase(mode):
    def opt_of(ps):
        with backend_of(mode): return SWATS(two_groups(ps), lr=.01, switch_tol=.05, sqr_mom=.9, **flags(mode))
    ps,stream = make_params(((6,),(4,3)), torch.float64, big=False, channels_last=False),GradStream(4)
    opt = opt_of(ps)
    for i in range(24):
        stream.set(ps, i); opt.step()
        if i in (1,12,20):
            qs = copy_params(ps); new = opt_of(qs); new.load_state_dict(detach_copy(opt.state_dict()))
            for q,p in zip(qs, ps): q.grad = p.grad.clone()
            twin_ps = copy_params(ps); twin = opt_of(twin_ps); twin.load_state_dict(detach_copy(opt.state_dict()))
            for q,p in zip(twin_ps, ps): q.grad = p.grad.clone()
            new.step(); twin.step()
            assert_bitwise(snapshot(qs, new), snapshot(twin_ps, twin))
    assert float(opt.state[ps[0]]['sgd_rate']) > 0
    copied = copy.deepcopy(opt)
    assert copied.after_step is switch_group

@pytest.mark.parametrize('mode', ALL_MODES)
def test_nothing_is_read(mode, monkeypatch):
    "No value of a tensor is asked for in a step"
    ps = make_params(((6,),(4,3)), torch.float32, big=False, channels_last=False)
    with backend_of(mode): opt = SWATS(ps, lr=.01, switch_tol=.5, **flags(mode))
    for i in range(3): GradStream().set(ps, i); opt.step()
    def no(*args, **kwargs): raise AssertionError('a step waits for a value')
    for k in ('item','__bool__','tolist','__float__','__int__','__index__'): monkeypatch.setattr(torch.Tensor, k, no)
    for i in range(3, 6):
        GradStream().set(ps, i)
        if mode in ('native','foreach','jit'): opt.step()
