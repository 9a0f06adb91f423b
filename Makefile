# make test: everything a change must pass. make demo: the whole pipeline on real text, on this machine.

PYTHON ?= python3.11
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: help venv test lint types unit chaos demo clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv and install everything into it

# torchvision comes along with mosaicml-streaming, which megaloop uses without its vision part. Beside a CPU build of
# torch the torchvision that pip finds does not import, and transformers, which tries it, then fails with it.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev,demo,harness]
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	@touch $@

test: lint types unit  ## lint, types and tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## pytest; PYTEST_ARGS="-k resume" to choose
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

chaos: $(STAMP)  ## kill ranks at 200 random moments and compare with the undisturbed run: half an hour
	MEGALOOP_CHAOS_KILLS=200 $(BIN)/python -m pytest -q -s tests/train/test_chaos.py

demo: $(STAMP)  ## text to shards to a trained model, resumed, exported and generating: under 5 minutes
	@VENV=$(abspath $(VENV)) tools/demo.sh

clean:  ## remove what make and the demo wrote
	rm -rf $(VENV) *.egg-info build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-data demo-export runs/demo
