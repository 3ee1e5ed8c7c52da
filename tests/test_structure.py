"""How the house is built: which room imports which, no cycles, sizes, and an engine that knows no algorithm.

The tests read the sources with `ast` and import nothing of the package, so they run in a second. Lists of exceptions name what is
still to be mended: the test fails on an entry that is no longer needed, which must then be removed."""
import ast,io,json,re,tokenize
from collections import Counter
from functools import lru_cache
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT/'fastxtend_opt'
# Lowest first: a module imports from its own room and from those before it
ROOMS = ('protocol','engine','optimizer','definition','training','algorithms','tools')
TOP = ('all','__main__') # above all rooms: nothing imports them

# ---------------------------------------------------------------- what imports what
def dotted(path): return '.'.join(path.relative_to(LIB).with_suffix('').parts).removesuffix('.__init__')

@lru_cache(None)
def modules(): return {dotted(p):p for p in sorted(LIB.rglob('*.py')) if p.name!='_modidx.py' and p!=LIB/'__init__.py'}

@lru_cache(None)
def tree(path): return ast.parse(path.read_text(encoding='utf-8'))

def _targets(module, names, known):
    "Modules of the package that `from module import names` reads"
    found = {o for n in names if (o := f'{module}.{n}' if module else n) in known}
    return found | ({module} if module in known and len(found)<len(names) else set())

def imports(path, known=None):
    "Names of the modules that the file at `path` imports: anywhere in it, in functions and by `import_module` too"
    known,res = known or modules(),set()
    package = ('fastxtend_opt', *path.relative_to(LIB).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import): full = [(a.name, ()) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[:len(package)+1-node.level]) if node.level else ''
            full = [('.'.join(filter(None, (base, node.module))), [a.name for a in node.names])]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module') and isinstance(node.args[0], ast.Constant):
            full = [(node.args[0].value, ())]
        else: continue
        for name,names in full:
            if name.split('.')[0]=='fastxtend_opt': res |= _targets(name.partition('.')[2], list(names) or [''], known)
    return res - {dotted(path)}

def room(name): return name.split('.')[0]
def edges(): return {(a,b) for a,p in modules().items() for b in imports(p)}

def upward(a, b):
    "Does an import of `b` by `a` go up?"
    if room(a) in TOP: return room(b)==room(a)
    return room(b) in TOP or ROOMS.index(room(b))>ROOMS.index(room(a))

KNOWN = {} # (importer, imported): what is still to be mended
LOADS = {('definition.registry','algorithms')} # `list_optimizers` imports everything in this folder to find the rows; it names no algorithm

def test_every_module_has_a_room():
    assert {room(m) for m in modules()} - {*ROOMS,*TOP}==set()

def test_no_import_goes_up():
    found = {e for e in edges() if upward(*e)}
    assert LOADS<=found, f'no longer there, remove from LOADS: {LOADS-found}'
    found -= LOADS
    assert not found-set(KNOWN), 'imports that go up: ' + ', '.join(f'{a} -> {b}' for a,b in sorted(found-set(KNOWN)))
    assert not set(KNOWN)-found, f'no longer there, remove from KNOWN: {sorted(set(KNOWN)-found)}'

def cycle(graph):
    "Names of one cycle of `graph` (name -> names), or []"
    done = set()
    def visit(name, path):
        if name in path: return path[path.index(name):]+[name]
        if name in done: return []
        for o in sorted(graph.get(name, ())):
            if (res := visit(o, [*path, name])): return res
        done.add(name)
        return []
    return next((res for name in sorted(graph) if (res := visit(name, []))), [])

def test_no_cycles():
    graph = {}
    for a,b in edges()-set(KNOWN)-LOADS: graph.setdefault(a, set()).add(b)
    assert not (found := cycle(graph)), 'modules import each other: ' + ' -> '.join(found)

def test_engine_imports_no_fastai():
    for name,path in modules().items():
        if room(name)!='engine': continue
        for node in ast.walk(tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, 'module', None) or '']
            assert not any(o.split('.')[0]=='fastai' for o in names), f'{name} imports {names}'

def test_imports_are_seen(tmp_path, monkeypatch):
    "The reader of imports on a small package: relative and absolute, of modules and of names, in functions, by import_module"
    monkeypatch.setattr(f'{__name__}.LIB', tmp_path)
    files = {'engine/a.py':'import fastxtend_opt.engine.b\ndef f():\n    from ..tools.c import x', 'engine/b.py':'from . import a',
             'tools/c.py':'from ..engine import a, b\nimport torch',
             'tools/d.py':'import importlib\nimportlib.import_module("fastxtend_opt.tools.c")',
             'all.py':'from .engine.a import *'}
    for name,text in files.items(): (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text(text)
    known = {dotted(tmp_path/name):tmp_path/name for name in files}
    got = {name:imports(path, known) for name,path in known.items()}
    assert got=={'engine.a':{'engine.b','tools.c'}, 'engine.b':{'engine.a'}, 'tools.c':{'engine.a','engine.b'}, 'tools.d':{'tools.c'},
                 'all':{'engine.a'}}
    assert cycle(got)==['engine.a','engine.b','engine.a'] and cycle({'a':{'b'}, 'b':{'c'}})==[]
    assert upward('engine.a', 'tools.c') and upward('tools.c', 'all') and not upward('all', 'tools.c') and not upward('tools.c', 'engine.a')

# ---------------------------------------------------------------- the engine names no algorithm
def algorithm_names():
    "Names of the functions that `register` gets, and their factories, read from the modules"
    res = set()
    for name,path in modules().items():
        if room(name)!='algorithms': continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func)=='register' and node.args: res.add(ast.unparse(node.args[0]))
    return res

WORDS = {'came','pid','grams','sam'} # also English words, or names of other things
def test_engine_names_no_algorithm():
    names = algorithm_names()
    assert len(names)>40 and {'Adam','Muon','SOAP'}<=names
    lower = {n.lower() for n in names}-WORDS
    for path in (p for n,p in modules().items() if room(n)=='engine'):
        for tok in tokenize.generate_tokens(io.StringIO(path.read_text(encoding='utf-8')).readline):
            if tok.type not in (tokenize.NAME,tokenize.STRING,tokenize.COMMENT): continue
            said = set(re.findall(r'[A-Za-z]+', tok.string)) & (names|lower)
            assert not said, f'{dotted(path)}:{tok.start[0]} names {said}: {tok.line.strip()[:100]}'

# ---------------------------------------------------------------- sizes
MODULE_LINES,FUNCTION_LINES,COLUMNS = 420,40,140
LONG_MODULES = set()
LONG_FUNCTIONS = 0 # their number may only go down
LONG_LINES = dict(notebooks=0, tests=2, scripts=0) # likewise

def test_modules_fit_in_the_head():
    lines = {n:len(p.read_text(encoding='utf-8').splitlines()) for n,p in modules().items()}
    found = {n for n,k in lines.items() if k>MODULE_LINES}
    assert not found-LONG_MODULES, f'more than {MODULE_LINES} lines: { {n:lines[n] for n in found-LONG_MODULES} }'
    assert not LONG_MODULES-found, f'no longer so long, remove from LONG_MODULES: {LONG_MODULES-found}'

def long_functions(path):
    "(name, number of lines of the body) of the functions of a file whose body is longer than `FUNCTION_LINES`"
    for node in ast.walk(tree(path)):
        if not isinstance(node, (ast.FunctionDef,ast.AsyncFunctionDef)): continue
        if (n := node.body[-1].end_lineno-node.body[0].lineno+1)>FUNCTION_LINES: yield node.name,n

def test_functions_fit_on_a_screen():
    found = [f'{name}.{f} ({n})' for name,path in modules().items() for f,n in long_functions(path)]
    assert len(found)<=LONG_FUNCTIONS, f'{len(found)} functions are longer than {FUNCTION_LINES} lines; {LONG_FUNCTIONS} were: {found}'

def code_of(path):
    "Lines of the code cells of a notebook, or of a file"
    text = path.read_text(encoding='utf-8')
    if path.suffix!='.ipynb': return text.splitlines()
    return [line for c in json.loads(text)['cells'] if c['cell_type']=='code' for line in ''.join(c['source']).splitlines()]

def files(kind):
    if kind=='notebooks': return [p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    if kind=='tests': return list((ROOT/'tests').rglob('*.py'))
    by_hand = [LIB/'all.py', LIB/'__init__.py', LIB/'__main__.py', ROOT/'setup.py']
    return [*(ROOT/'tools').rglob('*.py'), *(ROOT/'bench').glob('*.py'), *by_hand]

@pytest.mark.parametrize('kind', LONG_LINES)
def test_lines_fit_on_the_page(kind):
    found = Counter({str(p.relative_to(ROOT)):n for p in files(kind) if (n := sum(len(line)>COLUMNS for line in code_of(p)))})
    assert found.total()<=LONG_LINES[kind], (f'{found.total()} lines are longer than {COLUMNS} columns; {LONG_LINES[kind]} were: '
                                             f'{found.most_common(12)}')
