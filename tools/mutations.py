#!/usr/bin/env python
"""Plant twenty small bugs, one at a time, in a copy of the package, and run the tests until one fails.

Each line of `MUTATIONS` is a bug that somebody could make: text that occurs exactly once in the package, and what replaces it. The
notebooks are left alone, because the tests import the generated modules. For each bug the tests that should notice it run first, and the
rest of the default selection only if they don't. One line per bug says which test failed, or SURVIVED. The exit status is the number of
survivors.

    python tools/mutations.py                    # all bugs, the default selection of the tests
    python tools/mutations.py kahan cohort_key   # only these
    python tools/mutations.py --check            # only check that each text still occurs once
    python tools/mutations.py --tests DIR        # the tests of another tree, to compare two selections"""
import argparse, os, re, shutil, subprocess, sys, tempfile, time
from collections import namedtuple
from pathlib import Path

root = Path(__file__).resolve().parent.parent
PACKAGE = 'fastxtend_opt'
Mutation = namedtuple('Mutation', 'name what old new first') # `first`: arguments of pytest for the tests that should notice

def bug(name, what, old, new, *first): return Mutation(name, what, old, new, first)

MATRIX = 'tests/test_matrix.py'
def matrix(k): return (MATRIX, '-k', f'test_equals_native and ({k})')

MUTATIONS = [
    # the engine
    bug('stale_address', 'a fused step reads the gradients from their old addresses',
        'return c in self.tables and self.tables[c].refresh()', 'return c in self.tables and c.unchanged()', *matrix('adam')),
    bug('cohort_key', 'parameters with different step counts share a cohort',
        'key = (i, p.device, slots, repr(numbers), shape, extra)', 'key = (i, p.device, slots, shape, extra)',
        *matrix('late_and_vanishing')),
    bug('no_gradient_yet', 'a parameter whose gradient comes later is never stepped',
        'return all(p.grad is None for p in self.idle) and all(', 'return all(', *matrix('no_grads_at_first or late_and_vanishing')),
    bug('tied_weights', 'parameters that share memory are stepped at the same time',
        'if a < end: shared |= {i, last}', 'if a < end: shared |= set()', MATRIX, '-k', 'tied'),
    bug('inplace', 'foreach overwrites a value that is still needed',
        'a < SCALAR_REF and last[a] == j and ', 'a < SCALAR_REF and ', MATRIX, '-k', 'foreach and test_users_steppers'),
    bug('overwritten', 'a later pass of a kernel reads a slot that an earlier pass has overwritten',
        'self.at.get(i, k) < k: self.at[i] = k; return True', 'self.at.get(i, k) < -k: self.at[i] = k; return True',
        'tests/test_axes.py', '-k', 'test_against_native and fused'),
    bug('kahan', "the compensation is kept but not added back to the weights",
        'if comp is not None: loads[0].ref = (loads[0] + comp.to(torch.float32)).ref', 'if comp is not None: pass', 'tests/test_storage.py',
        '-k', 'test_modes_agree'),
    bug('widening', "a bfloat16 optimizer keeps its copy of the weights in bfloat16",
        'torch.promote_types(low.state, torch.float32) if k in tape.weights', 'low.state if k in tape.weights', 'tests/test_storage.py',
        '-k', 'test_kahan_follows_float64 and schedulefree'),
    bug('rounding_step', 'stochastic rounding draws the same numbers at every step',
        "self.tape.emit('sround_bfloat16', t, self.seed, self.step,", "self.tape.emit('sround_bfloat16', t, self.seed, 0,",
        'tests/test_storage.py', '-k', 'test_modes_agree'),
    bug('operation', 'TorchScript forgets the sign in `number - tensor`',
        "'{0}.neg_().add_({1})'", "'{0}.add_({1})'", 'tests/test_adamp.py', '-k', 'jit'),
    # optimizers and what is around them
    bug('schedule', "gradient release steps a group with another group's learning rate",
        'key = c.slots,tuple(c.numbers.items()),tuple(hyper.items()),*args', 'key = c.slots,tuple(c.numbers.items()),tuple(hyper),*args',
        'tests/test_gradient_release.py', '-k', 'test_same_weights'),
    bug('load_state', 'loading drops the step counter',
        'copy.copy(v) for k,v in state.items()}', "copy.copy(v) for k,v in state.items() if k != 'step'}",
        MATRIX, '-k', 'checkpoint and adam'),
    # algorithms
    bug('sign', 'Lookahead moves the slow weights away from the fast ones',
        'slow_p.add_(p.data-slow_p, alpha=la_alpha)', 'slow_p.sub_(p.data-slow_p, alpha=la_alpha)', 'tests/test_oracles.py', '-k',
        'ranger'),
    bug('off_by_one', 'Lookahead synchronises one step late',
        '(self.count+1)%self.k == 0', 'self.count%self.k == 0 and self.count > 0', 'tests/test_oracles.py', '-k', 'ranger'),
    bug('swapped_betas', 'LAMB corrects each average for the other one\'s coefficient',
        'debias1,debias2 = debias(mom, 1-mom, step),debias(sqr_mom, 1-sqr_mom, step)\n    update = (grad_avg/debias1)',
        'debias2,debias1 = debias(mom, 1-mom, step),debias(sqr_mom, 1-sqr_mom, step)\n    update = (grad_avg/debias1)',
        'tests/test_oracles.py', '-k', 'lamb'),
    bug('bias_correction', 'NAdam does not correct the average of the squared gradients',
        '(sqr_avg/(1-sqr_mom**step)).sqrt_() + eps, value=-lr)', 'sqr_avg.sqrt() + eps, value=-lr)', 'tests/test_oracles.py', '-k',
        'nadam'),
    bug('eps', 'Adan adds eps inside the root', '(sqr_avg/debias3).sqrt() + eps', '(sqr_avg/debias3 + eps).sqrt()',
        'tests/test_oracles.py', '-k', 'adan'),
    bug('wd_order', 'Lion decays the weights after the step instead of before',
        '[weight_decay, lion_step, lion_average]', '[lion_step, lion_average, weight_decay]', 'tests/test_oracles.py', '-k', 'lion'),
    bug('axis', 'Adam-mini averages over the first axes instead of the last', 'dim=tuple(range(1, p.ndim))', 'dim=tuple(range(p.ndim-1))',
        'tests/test_oracles.py', '-k', 'adam_mini'),
    bug('zero_norm', 'LAMB never moves a parameter that is all zeros',
        'torch.where((r1==0) | (r2==0), 1.', 'torch.where(r2==0, 1.', 'tests/test_oracles.py', '-k', 'lamb'),
]

def sources(tree): return [p for p in sorted((tree/PACKAGE).rglob('*')) if p.suffix in ('.py','.h','.cpp') and '__pycache__' not in p.parts]

def place(m, tree):
    "The file that has the text of `m`; `ValueError` unless it is there exactly once"
    found = [(p, n) for p in sources(tree) if (n := p.read_text(encoding='utf-8').count(m.old))]
    if sum(n for _,n in found)!=1:
        raise ValueError(f"{m.name}: the text occurs {sum(n for _,n in found)} times in {PACKAGE}, not once: {m.old!r}. Name the code as "
                         f"it is now.")
    return found[0][0]

def copy_tree(dst, tests):
    "What the tests need, without the environment, caches and outputs"
    skip = shutil.ignore_patterns('.git', '.venv', '.cache', '_proc', '_docs', '_site_preview', '__pycache__', '.pytest_cache')
    shutil.copytree(root, dst, ignore=skip, symlinks=True)
    if tests:
        shutil.rmtree(dst/'tests')
        shutil.copytree(tests, dst/'tests', ignore=skip)

def run_tests(tree, cache, args, jobs):
    "The name of the first test that fails, '' if none does"
    env = {**os.environ, 'PYTHONPATH':str(tree), 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg', 'FASTXTEND_OPT_TEST_CACHE':str(cache)}
    env.pop('FASTXTEND_OPT_CACHE', None)
    workers = ['-n', str(jobs), '--dist', 'loadgroup'] if jobs > 1 else ['-p', 'no:xdist']
    cmd = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '--tb=line', *workers, *args]
    r = subprocess.run(cmd, cwd=tree, env=env, capture_output=True, text=True, start_new_session=True)
    if r.returncode==0: return ''
    if r.returncode in (3, 4, 5): raise RuntimeError(f'pytest {" ".join(args)} ended with {r.returncode}:\n{(r.stdout+r.stderr)[-2000:]}')
    failed = re.findall(r'^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$', r.stdout, re.M)
    return failed[0] if failed else f'the process died with {r.returncode}' # a crash is noticed too

def try_mutation(m, tree, cache, jobs):
    "Plant `m` in the copy, run the tests, take it out again; the name of the test that failed, or ''"
    p = place(m, tree)
    text = p.read_text(encoding='utf-8')
    p.write_text(text.replace(m.old, m.new), encoding='utf-8')
    try:
        # the pages are not tests of behaviour: a module that differs from its notebook must not count
        return run_tests(tree, cache, m.first, 1) or run_tests(tree, cache, ['--ignore', 'tests/test_docs.py'], jobs)
    finally: p.write_text(text, encoding='utf-8')

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('names', nargs='*', help='mutations to try; all without')
    ap.add_argument('--check', action='store_true', help='only look for the texts')
    ap.add_argument('--jobs', type=int, default=2, help='processes of the whole default selection')
    ap.add_argument('--tests', type=Path, help='folder of tests to run instead of tests/')
    ap.add_argument('--cache', type=Path, help='kernels to begin with; they are copied')
    args = ap.parse_args(argv)
    known = [m.name for m in MUTATIONS]
    if unknown := set(args.names) - set(known): ap.error(f"no mutation {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    chosen = [m for m in MUTATIONS if not args.names or m.name in args.names]
    for m in chosen: place(m, root)
    if args.check: return print(f'{len(chosen)} mutations fit') or 0
    survivors = 0
    with tempfile.TemporaryDirectory(prefix='mutations_') as tmp:
        tree,cache = Path(tmp)/'tree',Path(tmp)/'kernels' # kernels are found by their text, so those of a bug don't mix with others
        copy_tree(tree, args.tests)
        if args.cache: shutil.copytree(args.cache, cache, ignore_dangling_symlinks=True)
        cache.mkdir(mode=0o700, exist_ok=True)
        for m in chosen:
            start = time.time()
            test = try_mutation(m, tree, cache, args.jobs)
            survivors += not test
            print(f"{m.name:16} {'caught by '+test if test else 'SURVIVED'}   ({m.what}; {time.time()-start:.0f} s)", flush=True)
    print(f'{len(chosen)-survivors} of {len(chosen)} caught')
    return survivors

if __name__=='__main__': sys.exit(main())
