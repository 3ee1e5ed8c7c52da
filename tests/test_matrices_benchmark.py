"`bench --matrices`: cases, missing contestants, goals, the report"
import json

import pytest,torch
from fastxtend_opt.algorithms.muon import muon
from fastxtend_opt.tools import benchmark as B
from fastxtend_opt.tools.bench import matrices
from fastxtend_opt.tools.bench.contestants import fastai_style
from fastxtend_opt.tools.cli import main

SMALL = B.matrix_cases[0]._replace(rows=lambda: [(0,1,(16,8)), (0,1,(8,16))], model='two matrices', modes=('native','foreach'))

def test_cases_are_complete():
    for c in B.matrix_cases:
        assert c.rows() and c.goal_mode in c.modes and (c.goal is None) == bool(c.remark), c.name
        assert {m for _,_,m in c.rows() if c.optimizer != 'prodigy' and len(m) != 2} == set()
    assert len(B.vit_matrices()) == 48 and sum(a*b for _,_,(a,b) in B.vit_matrices()) == 12*12*384*384

def test_muon_case_is_the_same_algorithm():
    "Ours and torch's go the same way, as far as bfloat16 lets them"
    ends = []
    def _ours(pset, lr): return fastai_style(muon(foreach=True, **SMALL.hypers), pset, lr)
    for c in (B.Contestant('fastxtend_opt', 'foreach', _ours), matrices._peer_of(SMALL, .01)):
        ps = B.ParamSet(SMALL.rows())
        before,opt = [p.detach().clone() for p in ps.params],c.make(ps, 1e-2)
        for t in range(5): ps.restore(); opt.step()
        ends.append(torch.cat([(p.detach()-b).flatten() for p,b in zip(ps.params, before)]))
    assert (ends[0]-ends[1]).norm() < .08*ends[1].norm()

def test_gradients_take_turns():
    ps = B.ParamSet(SMALL.rows(), sets=3)
    seen = []
    for _ in range(6): ps.restore(); seen.append(torch.cat([p.grad.flatten() for p in ps.params]))
    assert all(torch.equal(a, b) for a,b in zip(seen[:3], seen[3:])) and len({float(o[0]) for o in seen}) == 3
    one = B.ParamSet(SMALL.rows())
    a = [g.clone() for g in one.grads]
    for g in one.grads: g.zero_()
    one.restore()
    assert all(torch.equal(p.grad, o) for p,o in zip(one.params, a)) and all(torch.equal(p, q) for p,q in zip(one.params, ps.params))

def test_turns_and_goals():
    res = B.bench_matrix_case(SMALL, rounds=3, warmup=1)
    assert [r['contestant'] for r in res['rows']] == ['fastxtend_opt native','fastxtend_opt foreach','torch Muon'] and not res['missing']
    # each round begins with a different one
    assert len(res['order']) == 3 and sorted(map(tuple, res['order'])) != [tuple(res['order'][0])]*3
    assert (res['goal']['value'] == pytest.approx(res['rows'][2]['step']['median']/res['rows'][1]['step']['median'])
            and res['goal']['reached'] is (res['goal']['value'] >= 1.5))
    assert B.bench_matrix_case(SMALL._replace(goal=None), 1, 0)['goal']['reached'] is None

def test_missing_ones_are_named():
    res = B.bench_matrix_case(SMALL._replace(optimizer='nobody'), 1, 0)
    assert ([m['who'] for m in res['missing']] == ['fastxtend_opt nobody'] and "no optimizer 'nobody'" in res['missing'][0]['why']
            and res['goal']['value'] is None)
    res = B.bench_matrix_case(SMALL._replace(lib='not_a_library'), 1, 0)
    assert 'not_a_library' in res['missing'][0]['why'] and [r['vs_peer'] for r in res['rows']] == [None]*2
    with pytest.raises(ValueError, match="'adam' has no case. Those that have one: muon"): B.bench_matrices('adam')

def test_report_files_and_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrices, 'matrix_cases', [SMALL, SMALL._replace(name='Nobody', optimizer='nobody')])
    assert main(['bench','--matrices','--rounds','1','--warmup','0','--out',str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert '| Muon, bfloat16 | foreach | torch Muon |' in said and '- Nobody, fastxtend_opt nobody:' in said and 'written:' in said
    res = json.loads((tmp_path/'matrices.json').read_text())
    assert res['kind'] == 'matrices' and (tmp_path/'matrices.md').read_text() == B.matrices_report(res)+'\n'
    assert main(['bench','--matrices','--optimizers','adam','--quiet']) == 2 and 'has no case' in capsys.readouterr().err

def test_the_catalogue_leaves_them_out():
    from fastxtend_opt.definition.registry import list_optimizers
    assert 'muon' in [o.name for o in list_optimizers(kind='matrix')] and isinstance(B.peer_table['muon']['torch'], str)
