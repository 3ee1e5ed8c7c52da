# make demo    train a real classifier in four modes (installs into .venv first)
# make test    check generated files, run the notebooks and the tests (which render the documentation)
# make test-all  the same with slow tests and slow cells, which take hours
# make docs    render the documentation into _site_preview/
# make bench   step times; ARGS='--help' lists the options
# make dist-check     build wheel and sdist, install the wheel into an empty environment, and step there
# make test-versions  the tests with other versions of Python and torch: CORNERS='oldest colab newest default'
# make clean   remove build products; make distclean removes .venv as well
#
# PYTHON=python3.12   the interpreter of .venv
# TORCH=torch==2.13.0 one more requirement for pip
# JOBS=3              processes of notebooks and tests; a third keeps two cores busy while others wait for a compiler or a child process

PYTHON ?= python3
TORCH  ?=
JOBS   ?= 3
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?=
NB_FLAGS ?=

CORNERS ?=

.PHONY: install demo test test-all check notebooks docs pytest bench dist-check test-versions clean distclean
.DEFAULT_GOAL := test
.NOTPARALLEL:

install: $(STAMP)

$(STAMP): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10) and "fastxtend_opt needs Python 3.10 or newer; $(PYTHON) is " \
	    + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@echo 'Installing into $(VENV): takes some minutes and several GB the first time'
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fastxtend-opt demo $(ARGS)

test: check notebooks pytest

test-all: NB_FLAGS = --flags slow
test-all: PYTEST_ARGS += -m ''
test-all: check notebooks pytest

# One torch thread per process, because the processes share the cores. Kernels go into a folder of the project, and nothing outside is used
test check notebooks docs pytest: export OMP_NUM_THREADS := 1
notebooks docs: export FASTXTEND_OPT_CACHE := $(CURDIR)/.cache/kernels
pytest: export FASTXTEND_OPT_TEST_CACHE := $(CURDIR)/.cache/kernels
notebooks docs pytest: export MPLBACKEND := agg
# Pages about GPU kernels run them in Triton's interpreter, and one process runs many notebooks
notebooks docs: export TRITON_INTERPRET := 1

check: $(STAMP)
	$(BIN)/python tools/check_generated.py

notebooks: $(STAMP) | check
	$(BIN)/nbdev-test --n-workers $(JOBS) $(NB_FLAGS)

docs: $(STAMP)
	$(BIN)/python tools/process_notebooks.py --force
	$(BIN)/python tools/render_site.py

# Last, so that the log ends with its summary
pytest: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/fastxtend-opt bench $(ARGS)

dist-check:
	$(PYTHON) tools/check_dist.py $(ARGS)

test-versions:
	$(PYTHON) tools/versions.py --corners $(CORNERS) --jobs $(JOBS) $(ARGS)

clean:
	rm -rf _proc _docs _site_preview build dist .cache .pytest_cache .hypothesis *.egg-info nbs/nbdev.yml
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
