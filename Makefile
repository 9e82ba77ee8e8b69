# make serve   install what is missing and start the server on the embedded model (FLAGS="--port 8000": with flags)
# make install install what is missing, and say which command is next
# make test    run the whole suite, but for the tests of real models
# make check   formatting, lint, types and the quick tests
# GPU=1 or GPU=0 on a command line decides whether torch comes with CUDA; else a look at the machine does.
# TORCH_INDEX=URL names the package index that torch comes from.
# make real-models   download real models (700 MB, kept in the user's cache) and run the tests that need them

NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
FLAGS ?=
GPU ?= auto
TORCH_INDEX ?=
INSTALL = $(BIN)/python deploy/install.py --gpu "$(GPU)" --torch-index "$(TORCH_INDEX)"
# A stamp for each way to install: an install is repeated only when what it depends on has changed.
STAMP := $(VENV)/.installed$(if $(filter-out auto,$(GPU)),-gpu-$(GPU))

# Files of tests go to as many processes as there are cores, four at most: a test of whole servers takes about 2 GB.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: serve install test check numbers real-models format clean
.DEFAULT_GOAL := serve

serve: $(STAMP)
	$(BIN)/quartet serve $(FLAGS)

install: $(STAMP)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) -m "not real_models"

real-models: $(VENV)/.installed-test
	$(BIN)/python -m tests.real_models || echo "real models: not all could be fetched, tests of the others are skipped"
	$(BIN)/python -m pytest -m real_models -rs --durations=10 tests/model tests/ring

numbers: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" tests/unit/kernels tests/unit/scheduler_service/model/test_deterministic.py \
		tests/model/test_parity.py

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" tests/unit tests/simulated_ring tests/test_architecture.py

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Quartet needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(STAMP): pyproject.toml constraints.txt deploy/install.py | $(BIN)/python
	@$(INSTALL)
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt deploy/install.py | $(BIN)/python
	@$(INSTALL) --extras test,agents
	@touch $@ $(STAMP)
