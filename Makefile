# Everything a person or CI does here. `make help` lists it.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SHELL  := bash

# Two test processes of one thread each beat one process of two threads on two cores.
# `make test TESTS=tests/graphs ARGS=-x` runs a part.
WORKERS ?= 2
TESTS   ?=
ARGS    ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fuzz bench bench-partition bench-memory clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install pipeflow in it, with everything development needs

# Once, and again when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pipeflow needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## train a small CNN on real digits as a pipeline on 3 devices, in one command
	$(BIN)/pipeflow train examples/digits.py

test: setup ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS) $(TESTS)

check: setup ## format, lint, types, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# FUZZ_FACTOR times the examples of the tests, but at most FUZZ_SECONDS for each law; says how many held.
fuzz: setup ## the laws on fresh random draws, many more than the tests take, in the time there is
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m hypothesis $(ARGS) $(TESTS)

bench: setup ## planning times, and pipeflow beside torch.distributed.pipelining and an earlier commit
	$(BIN)/python -m benchmarks.planning
	$(BIN)/python -m benchmarks.runtime
	$(BIN)/python -m benchmarks.versions

bench-partition: setup ## the partitioners on published cost graphs, against proven optima and other rules
	$(BIN)/python -m benchmarks.partition

bench-memory: setup ## bytes that every rank holds at most, predicted and counted
	$(BIN)/python -m benchmarks.memory

clean: ## remove everything the other targets made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
