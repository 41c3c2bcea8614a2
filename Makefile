# Every target does its own set-up: all it needs is Python 3.11 or later and a package registry.
#
#   make quickstart    train a small vision-language model on handwritten digits, evaluate it, kill and resume a run
#   make test          lint and the test suite; what continuous integration runs
#   make test-unit     the tests that start no other program
#   make test-all      also the slow matrices
#   make test-pinned   the suite on the oldest supported set (torch 2.7.1, megatron-core 0.12.1); 6 GB, on demand
#   make test-megatron-0.12.1   the Megatron road's tests, slow ones too, in the same environment
#   make lint          ruff, mypy, import layers, device names
#   make clean         remove the environments and what the quickstart wrote
#
# PYTHON=/path/to/python picks the interpreter, VENV=folder the environment, PYTEST_ARGS='-k name' what is tested,
# WORKERS=4 by how many processes.

# The first name on this list that starts and is new enough; an empty answer is reported by the .venv rule.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$$p" && break; done)
VENV ?= .venv
PINNED_VENV ?= .venv-pinned
BIN := $(VENV)/bin
# Tests of one file run in one worker, one after the other; most ranks wait for each other most of the time.
WORKERS ?= 2
PYTEST_ARGS ?=
PYTEST = -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: help quickstart test test-unit test-all test-pinned test-megatron-0.12.1 lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed-quickstart
	PATH="$(abspath $(BIN)):$$PATH" python examples/quickstart/run.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

test-unit: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not ranks"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-pinned: $(PINNED_VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PINNED_VENV)/bin/python $(PYTEST) -m "not slow"

MEGATRON_TESTS = tests/accelerator/test_megatron_cpu.py tests/engine tests/models/megatron \
	tests/distributed/test_megatron_parity.py tests/training/test_vlm_road.py

test-megatron-0.12.1: $(PINNED_VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PINNED_VENV)/bin/python -m pytest $(MEGATRON_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest tests/test_architecture.py

# Byte-compiled at once: where PYTHONDONTWRITEBYTECODE is set, every rank of every run would compile anew.
INSTALL = -m pip install --quiet --disable-pip-version-check

$(VENV)/.installed-quickstart: EXTRAS = quickstart
$(VENV)/.installed-test: EXTRAS = test,quickstart,report,tensorboard,lora,video
$(VENV)/.installed-%: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(PINNED_VENV)/.installed-test: constraints-pinned.txt pyproject.toml | $(PINNED_VENV)/bin/python
	$(PINNED_VENV)/bin/python $(INSTALL) --constraint constraints-pinned.txt --editable '.[test,quickstart,report,tensorboard,lora,video]'
	@touch $@

$(BIN)/python $(PINNED_VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or say where it is with make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(@:/bin/python=)

clean:
	rm -rf $(VENV) $(PINNED_VENV) runs
