# milm_ray: `make quickstart` and `make test` are all a new machine needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := uv==0.13.9
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# CUDA machines: make LOCK=requirements/gpu.lock …
LOCK ?= requirements/cpu.lock
TORCH := $(shell grep -m1 '^torch==' $(LOCK))
# PyTorch keeps its CPU builds on an index of its own; PyPI's torch is the CUDA build.
TORCH_INDEX := $(if $(findstring cpu,$(LOCK)),--extra-index-url https://download.pytorch.org/whl/cpu,)
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install quickstart serve test scenarios soak lint format lock clean

help: ## list what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv from the lock

$(VENV)/.installed: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; fix: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(UV) setuptools==78.1.1 wheel==0.48.0
	$(PIP) --retries 1 --no-deps $(TORCH_INDEX) '$(TORCH)'
	@# uv unpacks two hundred packages in a tenth of pip's CPU time; pip knows more private mirrors.
	@# Compiled here once, or the first run's dozen processes would each compile what they import.
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --compile-bytecode -r $(LOCK) || $(PIP) --no-deps -r $(LOCK)
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install ## the whole pipeline on the samples, offline; opens nothing, writes runs/quickstart
	$(BIN)/python jobs/pipeline.py --config jobs/configs/quickstart.yaml
	@echo "report: runs/quickstart/report/index.html"

serve: install ## the models of CONFIG (default: the quickstart's) as endpoints, and the chat page
	$(BIN)/python jobs/serve.py --config $(or $(CONFIG),jobs/configs/quickstart.yaml) $(ARGS)

test: lint ## lint, then the tests
	$(BIN)/python -m pytest

scenarios: install ## whole jobs, killed and run again: half an hour
	$(BIN)/python -m pytest -m scenario

soak: install ## new random examples for the properties; the transcription job killed at twenty moments
	@# The properties set their own number of examples: ten rounds stand for ten times as many.
	for round in {1..10}; do $(BIN)/python -m pytest -m hypothesis --hypothesis-profile=explore tests/unit; done
	MILM_FAULT_ROUNDS=20 $(BIN)/python -m pytest -m scenario tests/jobs/test_llm_faults.py

lint: install ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## resolve the locks anew from requirements/*.in
	$(PYTHON) requirements/lock.py

clean: ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
