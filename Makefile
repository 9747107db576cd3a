# `make demo` trains and distils small models on this machine; `make test` checks the code. Both set up .venv first.

PYTHON ?= python3
CANARY_PYTHON ?= python3.12
EXTRAS ?=
JOBS ?= 2

BIN := .venv/bin
comma := ,
empty :=
space := $(empty) $(empty)
# EXTRAS may be written with commas or spaces; a stamp in .venv stands for each set of extras that is installed.
EXTRA_LIST := $(subst $(comma),$(space),$(EXTRAS))
joined = $(subst $(space),$(comma),$(strip $(1)))
CORE_STAMP := .venv/.installed$(subst $(space),,$(addprefix -,$(EXTRA_LIST)))
TEST_STAMP := .venv/.installed-test$(subst $(space),,$(addprefix -,$(EXTRA_LIST)))
# -qq: no progress and no warnings; errors are shown.
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-launch test-slurm lint bench-cpu plans plan-accuracy experiment experiment-teacher chaos fuzz canary clean

help: ## show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), EXTRAS= (of: cuda tpu quant verify llama hf), JOBS=$(JOBS) test processes"

demo: $(CORE_STAMP) ## set up and run the demonstration
	@$(BIN)/llama4 demo

test: $(TEST_STAMP) ## set up, lint, and run the tests but the slow ones
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-slow: $(TEST_STAMP) ## run the slow tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow

# Open MPI is Debian's openmpi-bin; what is not installed is skipped.
test-launch: ## hold rendered files against schemas and linters; train by local, mpirun and Ray
	@$(MAKE) --no-print-directory EXTRAS="$(sort $(EXTRA_LIST) launch-test)" test-launch-run

.PHONY: test-launch-run
test-launch-run: $(TEST_STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 0 tests/launch/test_render.py tests/launch/test_preflight.py \
	tests/launch/test_hosts.py tests/test_docker.py

# As root, on Debian: two nodes of a real SLURM on this machine, stopped again by their pids.
test-slurm: $(TEST_STAMP) ## train on a real SLURM: stopped, killed, requeued, resumed
	@command -v slurmctld > /dev/null && command -v munged > /dev/null || \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
	@LLAMA4_TEST_SLURM=1 $(BIN)/python -m pytest -n 0 tests/launch/test_slurm.py

lint: $(TEST_STAMP) ## check style, format and types
	@$(BIN)/ruff check --output-format concise
	@$(BIN)/ruff format --check
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# Beside transformers, which the extra `verify` brings.
bench-cpu: ## time the training step beside transformers' and fill docs/performance.md
	@$(MAKE) --no-print-directory EXTRAS="$(sort $(EXTRA_LIST) verify)" bench-cpu-run

.PHONY: bench-cpu-run
bench-cpu-run: $(TEST_STAMP)
	@$(BIN)/python -m tools.bench_cpu --docs docs/performance.md

plans: ## make docs/plans anew; compiled where the extras tpu and cuda, and tokamax, are installed
	@$(BIN)/python -m tools.plans

plan-accuracy: ## hold the planner's estimates against the compilers' figures
	@$(BIN)/python -m tools.plan_accuracy

experiment-teacher: $(CORE_STAMP) ## train the teacher of the experiment, half an hour
	@$(BIN)/python -m tools.experiment --teacher

experiment: $(CORE_STAMP) ## distil in many ways over five seeds, with controls, and write docs/experiments.md
	@$(BIN)/python -m tools.experiment

fuzz: $(CORE_STAMP) ## damaged and made-up input for all that reads any, ten minutes, and write docs/reliability.md
	@$(BIN)/python -m tools.fuzz --docs docs/reliability.md

chaos: $(CORE_STAMP) ## break runs in every known way, under an hour on two quiet cores, and write docs/reliability.md
	@$(BIN)/python -m tools.chaos --docs docs/reliability.md

canary: ## run the tests on Python 3.12 with the newest releases, unpinned
	@test -x .venv-canary/bin/python || $(CANARY_PYTHON) -m venv --clear .venv-canary
	@echo "installing the newest releases into .venv-canary"
	@.venv-canary/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[$(call joined,test $(EXTRA_LIST))]'
	@.venv-canary/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

clean: ## remove the environments and the caches, not the runs
	rm -rf .venv .venv-canary .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"PYTHON={sys.executable} is Python \
	{sys.version_info[0]}.{sys.version_info[1]}; 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) -m venv --clear .venv

$(CORE_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv: llama4_jax $(EXTRA_LIST)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.$(if $(EXTRA_LIST),[$(call joined,$(EXTRA_LIST))])'
	@touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv: llama4_jax test $(EXTRA_LIST)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[$(call joined,test $(EXTRA_LIST))]'
	@touch $@
