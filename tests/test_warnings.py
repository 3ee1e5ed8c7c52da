"Importing the package and stepping in every mode adds no warning to those that fastai and torch give."
import json,subprocess,sys

import pytest

SCRIPT = '''
import json,sys,traceback,warnings
seen = []
def show(message, category, *args, **kwargs):
    seen.append([category.__name__, str(message)[:200], ''.join(traceback.format_stack(limit=8)[:-1])])
warnings.showwarning = show
warnings.simplefilter('always')
import fastai.basics
from fastai.callback import schedule
counts = dict(fastai=len(seen))
def ours(name): counts[name],seen[:] = [w for w in seen],[]
seen.clear()
import fastxtend_opt.all
from fastxtend_opt.all import *
import torch
ours('import')
for mode in ('native','foreach','jit','fused'):
    for f in (SGD, Adam, Ranger, Lamb, AdamWScheduleFree, AdaFactor):
        p = torch.nn.Parameter(torch.ones(4,4))
        opt = f([p], lr=.1, **({} if mode=='native' else {mode:True}))
        for _ in range(7):
            p.grad = torch.ones(4,4)
            opt.step(); opt.zero_grad()
        opt.load_state_dict(opt.state_dict())
    ours(mode)
torch.jit.script(torch.nn.Identity())
ours('control')
print(json.dumps(counts))
'''

def test_no_warning_of_ours():
    "All warnings shown, each time: none between the import of fastai and the last step. The control says that torch's would have been seen"
    r = subprocess.run([sys.executable, '-W', 'always', '-c', SCRIPT], capture_output=True, text=True)
    assert r.returncode==0, r.stderr[-3000:]
    counts = json.loads(r.stdout.splitlines()[-1])
    for k in ('import','native','foreach','jit','fused'): assert counts[k]==[], (k, counts[k])
    if not counts['control']: pytest.skip('this torch does not warn of torch.jit.script')
    assert 'torch.jit.script' in counts['control'][0][1]
