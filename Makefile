# `make` alone lists what there is. Everything lives in .venv; nothing outside this folder but ~/.cache/fulltune.

PYTHON ?= python3
# Processes that share the tests; each may start two ranks.
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup bench-deps demo test test-unit test-long test-faults test-cluster test-cluster-short test-compat scores lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned, tested versions

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) launcher/check_system.py
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned versions into $(VENV) (a few minutes the first time; log: $(VENV)/install.log)"
	@launcher/install.sh $(BIN)/python
	@touch $@

bench-deps: $(STAMP) ## install what benchmarks/ compares with (trl, gigatoken, accelerate, scikit-learn)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-input --no-build-isolation -e '.[bench]' -c constraints.txt

demo: $(STAMP) ## train a small model from nothing on this machine: corpus to generated text
	@$(BIN)/fulltune demo

PYTEST = $(BIN)/python -m pytest
PARALLEL = -n $(TEST_PROCESSES) --dist loadgroup

test: $(STAMP) ## the tests, real DeepSpeed on 2 CPU ranks where ranks matter (21 minutes on 2 cores)
	@$(PYTEST) $(PARALLEL)

test-unit: $(STAMP) ## those of them that start no ranks (4 minutes on 2 cores)
	@$(PYTEST) $(PARALLEL) -m unit

test-long: $(STAMP) ## long forms of them, and whole benchmarks on small inputs
	@FULLTUNE_TESTS=long $(PYTEST) $(PARALLEL) -m "long and not cluster"

test-cluster: $(STAMP) ## the tests on a real Slurm and on hosts with sshd, made here (needs root; installs slurm-wlm, openssh-server, pdsh)
	@FULLTUNE_CLUSTER=required $(PYTEST) -m cluster

test-cluster-short: $(STAMP) ## the shorter of them, skipped where no cluster can be started
	@$(PYTEST) -rs -m "cluster and not long"

test-faults: $(STAMP) ## long campaigns: kills, hangs, failing storage, damage; FULLTUNE_FAULT_SEED, FULLTUNE_FAULT_ROUNDS
	@FULLTUNE_ALL_TESTS=1 $(PYTEST) -m faults -s

test-compat: $(STAMP) ## exports read by transformers 4.45 and 4.57 (installed into .venv/readers; 3 minutes on 2 cores)
	@$(PYTEST) -m compat

scores: $(STAMP) ## how good MiniLM becomes on eight data sets, beside transformers' Trainer (hours; SCORES=--quick: minutes; goes on where it stopped)
	@$(BIN)/python benchmarks/scores.py $(SCORES)

lint: $(STAMP) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff lay out the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, caches and build folders; runs, stores and the demo stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
