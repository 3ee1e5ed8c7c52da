"The comparison helpers must fail where they should: every other test leans on them."
from itertools import combinations

import numpy as np,pytest,torch
from fastcore.all import L
from torch import tensor
from helpers import *

def same(a, b, **kw):
    try: assert_same(a, b, **kw)
    except Mismatch: return False
    return True

@pytest.mark.parametrize('a,b', [
    (tensor([1.,2.]), tensor([1.,2.,3.])), (tensor([1.]), tensor(1.)), (tensor([1.,1.]), tensor([[1.,1.]])),
    (tensor([1.]), tensor([1.]).double()), (tensor([1.]), [1.]), (tensor(1.), 1.), ([1.,2.], [1.]), ({'a':1}, {'b':1}),
    ({'a':1}, {'a':1,'b':2}),
    (1, 1.), (True, 1), (1, 2), ('a', 'b'), (None, 0), (tensor([1]), tensor([2])), (tensor([1.]), tensor([1.1])), (1., 1.1),
    (tensor([float('nan')]), tensor([1.])), (tensor([1.]), tensor([float('nan')])), (tensor([float('nan')]), tensor([float('nan')])),
    (tensor([float('inf')]), tensor([1.])), (tensor([float('inf')]), tensor([-float('inf')])), (float('nan'), float('nan')),
    (np.ones(2), np.ones(2, dtype=np.float32)), (np.ones(2), np.ones(3)), ([tensor([1.]), tensor([2.])], [tensor([1.]), tensor([2.5])])])
def test_assert_same_fails(a, b): assert not same(a, b, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('a,b', [
    (tensor([1.,2.]), tensor([1.,2.0005])), ([1.,2.], (1.,2.)), (L(1.,2.), [1.,2.]), ({'a':[tensor(1)]}, {'a':L(tensor(1))}), (None, None),
    ('a','a'),
    (tensor([float('inf'),1.]), tensor([float('inf'),1.])), (1., np.float64(1.)), (torch.empty(0), torch.empty(0)),
    (np.ones(2), np.ones(2))])
def test_assert_same_passes(a, b): assert same(a, b, rtol=1e-3, atol=1e-3)

def test_assert_same_nan():
    nan = float('nan')
    assert same(tensor([nan,1.]), tensor([nan,1.]), equal_nan=True) and same(nan, nan, equal_nan=True)
    assert not same(tensor([nan,1.]), tensor([1.,nan]), equal_nan=True)
    assert not same(tensor([nan,1.]), tensor([nan,2.]), equal_nan=True)

def test_assert_same_names_the_place():
    with pytest.raises(Mismatch, match=r"\['state'\]\[1\]\['grad_avg'\]: 1 of 2 values differ"):
        assert_same({'state': [{}, {'grad_avg': tensor([1.,2.])}]}, {'state': [{}, {'grad_avg': tensor([1.,3.])}]}, rtol=1e-3)

def test_assert_same_tolerance_is_relative_to_b():
    assert same(tensor([1000.]), tensor([1001.]), rtol=1e-3) and not same(tensor([1.]), tensor([1.01]), rtol=1e-3)

def test_assert_bitwise():
    assert_bitwise({'a':[tensor([float('nan')]),1.]}, {'a':[tensor([float('nan')]),1.]})
    for a,b in [(tensor([0.]), tensor([-0.])), (0., -0.), (tensor([1.]), tensor([1.+2**-23]))]:
        with pytest.raises(Mismatch): assert_bitwise(a, b)

def test_assert_ulps():
    a = tensor([1.,3.,1e-30], dtype=torch.bfloat16)
    b = torch.nextafter(a, torch.full_like(a, 10.))
    assert_ulps([{'x':a,'step':3}], [{'x':b,'step':3}], 1)
    with pytest.raises(Mismatch, match='more than 1 ulp'): assert_ulps(a, torch.nextafter(b, torch.full_like(a, 10.)), 1)
    with pytest.raises(Mismatch, match='more than 0 ulp'): assert_ulps(a, b, 0)
    with pytest.raises(Mismatch, match='inf or NaN'): assert_ulps(a, torch.full_like(a, float('inf')), 1)
    assert ulp(tensor(1., dtype=torch.bfloat16)) == 2**-7 and ulp(tensor(1.)) == 2**-23 and ulp(tensor(1., dtype=torch.float16)) == 2**-10

def test_grad_stream_is_the_same_for_every_layout_and_dtype():
    p = make_params(shapes=[(3,4,2,2)], big=False, channels_last=False)[0]
    q,r = torch.nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last)),torch.nn.Parameter(p.detach().double())
    for o in (p,q,r): GradStream(3).set([o], 5)
    assert torch.equal(p.grad, q.grad) and q.grad.stride()==q.stride() and torch.equal(p.grad, r.grad.float())
    assert p.grad.flatten()[1]==0

def test_unchanged_sees_a_change():
    from fastai.optimizer import SGD
    p = make_params(shapes=[(3,)], big=False, channels_last=False)
    opt = SGD(p, lr=.1)
    GradStream().set(p, 0)
    with pytest.raises(Mismatch):
        with unchanged(p, opt): opt.step()

def test_less_noise_forgives_no_more_than_the_noise():
    "Four times the largest difference of its tensor; structure, NaN, infinities and other tensors stay as they are"
    b,noisy = {'x':[tensor([1.,2.]), 3], 'y':tensor([1.])},{'x':[tensor([1.,2.1]), 3], 'y':tensor([1.])}
    def off(x, y=1.): return less_noise({'x':[tensor([1.,2.]) + x, 3], 'y':tensor([y])}, b, noisy)
    assert same(off(.39), b, atol=1e-6) and same(off(-.39), b, atol=1e-6)
    for o in (off(.5), off(-.5), off(0., 1.01), off(float('nan')), off(float('inf')),
              less_noise({'x':[tensor([1.,2.])], 'y':tensor([1.])}, b, noisy)):
        assert not same(o, b, atol=1e-3)
    assert same(less_noise(b, b, {'x':[tensor([1.,float('nan')]), 3], 'y':tensor([1.])}), b)

def test_nudged_stream_moves_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        p,q = (torch.nn.Parameter(torch.zeros(400, dtype=dtype)) for _ in range(2))
        GradStream(3).set([p], 5); NudgedStream(3, dtype=dtype).set([q], 5)
        steps = ((q.grad.double()-p.grad.double())/ulp(p.grad))[p.grad!=0]
        assert set(steps.tolist())=={-1.,1.}

def test_pairwise_covers_and_repeats():
    rows = [(a, b, c, d) for a in 'xyz' for b in range(4) for c in range(3) for d in 'pq' if (a, d)!=('z','q')]
    pairs = lambda rs: {p for r in rs for p in combinations(enumerate(r), 2)}
    few = pairwise(rows, group=lambda r: r[0], dear=lambda r: r[3]=='q' and r[0])
    assert pairs(few)==pairs(rows) and len(few)<len(rows)/2 and few==pairwise(rows, group=lambda r: r[0], dear=lambda r: r[3]=='q' and r[0])
