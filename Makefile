# `make quickstart` and `make test` each work as the first command on a fresh Linux machine.
#   ARGS="..."  is passed on: make quickstart ARGS="--help", make test ARGS="-k windows"
#   VENV=folder, PYTHON=/path/to/python3.12: see tools/bootstrap.sh

VENV ?= .venv
export VENV
# Compiling costs the small models of tests and quickstart more start-up than it saves.
export TORCHDYNAMO_DISABLE = 1

# A file's tests go to one process, which makes what they share once.
TEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup quickstart evidence test test-long lint typecheck format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make the virtual environment (the other targets do so by themselves)
	@bash tools/bootstrap.sh

quickstart: setup ## run the whole pipeline with a tiny model on this CPU
	@exec $(VENV)/bin/python -m examples.quickstart $(ARGS)

evidence: setup ## slow tests, benchmarks and the ablation, hours; into benchmarks/results/
	@exec $(VENV)/bin/python benchmarks/evidence.py $(ARGS)

test: lint typecheck ## lint, type check, then all tests that need neither a GPU nor minutes each
	@exec $(TEST) -m "not long and not slow and not gpu" $(ARGS)

test-long: setup ## the tests that take half a minute or more each, kills and real Slurm jobs for the most part
	@exec $(TEST) -m "long and not slow and not gpu" $(ARGS)

lint: setup ## ruff and the layer table
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/lint-imports --no-logo

typecheck: setup ## mypy --strict
	@$(VENV)/bin/mypy

format: setup ## format, and mend what ruff can
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

clean: ## remove the virtual environment and all caches; runs/ stays
	rm -rf .venv .venv.lock .venv.discarded build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
