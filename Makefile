# The verbs of this repository. `make demo` and `make test` do all their own set-up.
SHELL := /bin/bash
PYTHON ?= python3
# Elsewhere than on a plain CPU machine: make setup TORCH="torch --index-url <the CUDA or CPU index of your choice>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FOLDERS := app kernels probe steering
WORKERS ?= 2
# Threads that wait sleep instead of spinning: tests and training share few cores.
export OMP_WAIT_POLICY ?= PASSIVE
STORE ?= out/demo.duckdb
PORT ?= 8501

.PHONY: help setup demo test test-families lint types soak bench train-demo clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## virtual environment with everything in it (.venv)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moescope needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,lm-eval]'
	touch $(STAMP)

demo: setup ## trace, analyse and steer the demo model, then open the dashboard (CHECK=1: all but serve)
	$(BIN)/moescope demo --store $(STORE) $(if $(CHECK),--check,--port $(PORT))

test: setup ## all tests but the long ones
	$(BIN)/python -m pytest -m "not soak and not families" -n $(WORKERS) --dist loadfile $(ARGS)

test-families: setup ## recording and steering of every model family on tiny models
	$(BIN)/python -m pytest -m "families and not soak" -n $(WORKERS) $(ARGS)

soak: setup ## the long tests (SOAK=share runs that share of the repetitions, default 1)
	MOESCOPE_SOAK=$(or $(SOAK),1) $(BIN)/python -m pytest -m soak $(ARGS)

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# No type checker follows the import hook of an editable install, so the folders are linked.
build/types/moescope: Makefile
	mkdir -p $@
	$(foreach folder,$(FOLDERS),ln -sfn ../../../$(folder) $@/$(folder);)
	touch $@

types: setup build/types/moescope ## mypy, strict
	$(BIN)/mypy

bench: setup ## measurements as ratios, side by side in one run
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

train-demo: setup ## train the demo models again from their seed
	$(BIN)/python -m moescope.probe.demo.train

clean: ## remove what was built and installed here
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
