# Everything a contributor runs.  Each target sets up what it needs; a second call sets up nothing.
#
#   make test PYTHON=python3.12    another interpreter (3.11 or newer), when .venv does not exist yet
#   make test JOBS=8               more test processes
#   make test ARGS="-k plugins"    further arguments for pytest

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

# One thread in each test process: JOBS processes already share the cores.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo test test-all lint types bench schemas clean help

help:
	@echo "make demo      what lorahub does, on a real model"
	@echo "make test      the tests that take seconds"
	@echo "make test-all  all tests"
	@echo "make lint      ruff: style and formatting"
	@echo "make types     mypy --strict"
	@echo "make bench     the benchmarks, results as JSON under benchmarks/out"
	@echo "make schemas   write schemas/*.schema.json anew from the records"
	@echo "make clean     remove what tools and tests left behind; .venv stays"

demo: $(READY)
	rm -rf demo-out
	$(BIN)/python examples/demo.py --out demo-out

test: $(READY)
	$(PYTEST) $(ARGS)

test-all: $(READY)
	$(PYTEST) -m "not network" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/run.py

schemas: $(READY)
	$(BIN)/python schemas/generate.py

clean:
	rm -rf build dist demo-out benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Core and plugins go in one command: no index has the core, so a plugin could not find it alone.
$(READY): pyproject.toml requirements-dev.txt constraints.txt $(PLUGINS:%=%/pyproject.toml) | $(BIN)/pip
	@echo 'Installing lorahub, its plugins and the peers of its tests into $(VENV): some minutes, several GB'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt \
	    -e '.[torch,gguf,search]' $(PLUGINS:%=-e ./%)
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"lorahub needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
