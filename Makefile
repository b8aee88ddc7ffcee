# `make run` trains the smoke curriculum on this machine, `make test` runs the tests; both set up the environment first.
SHELL := /bin/bash
VENV := .venv
QUARRY := $(VENV)/bin/quarry
STAMP := $(VENV)/.installed
# Tests use this many processes; each may start two ranks. More than two cores: those on Slurm wait most of the time.
TEST_PROCESSES ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup run test lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with quarry in it (uv if present, else pip)

$(STAMP): requirements.lock pyproject.toml .python-version
	bash scripts/setup.sh $(VENV)
	@touch $@

run: $(STAMP)  ## train the smoke curriculum here, under runs/ (no GPU needed)
	$(QUARRY) launch curriculum=smoke cluster=local $(OVERRIDES)

test: $(STAMP)  ## the tests
	bash scripts/slurm_packages.sh
	bash scripts/sandbox_packages.sh
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=30 $(PYTEST)

lint: $(STAMP)  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lock: $(STAMP)  ## resolve requirements.lock anew
	bash scripts/lock.sh $(VENV)

clean:  ## remove caches and build folders (keeps .venv and runs/)
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis build *.egg-info
