# Each target works on a fresh checkout: what it needs is installed first.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CLUSTERS := .venv/.clusters
SPHINX := .venv/.sphinx
# Two processes halve the time on two cores; more than four mostly import PyTorch.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo docs test slow gpu benchmark lint types imports format ci clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) ## .venv with the pinned packages

demo: $(INSTALLED) ## learn a reward from comparisons, from start to end
	$(BIN)/rewardmodels demo

test: $(INSTALLED) ## the fast tests and every docstring's example (under three minutes)
	$(PYTEST)

slow: $(CLUSTERS) ## statistics, training, and studies on clusters
	$(PYTEST) tests -m "slow and not gpu"

gpu: $(INSTALLED) ## what needs a CUDA device
	$(BIN)/pytest tests -m gpu

benchmark: $(INSTALLED) ## time what has to be fast
	$(BIN)/rewardmodels benchmark speed

docs: $(SPHINX) ## the documentation, in docs/_build
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

imports: $(INSTALLED) ## which package may import which
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff repair what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ci: test slow docs lint types imports ## all that a change must pass

clean: ## remove the environment and the caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# What only slow tests need. Without it they are skipped, and say so.
$(CLUSTERS): $(INSTALLED)
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e ".[ray,dask,minari]" && touch $@ || \
	  echo "Could not install Ray, Dask or Minari: their tests will be skipped." >&2

$(SPHINX): $(INSTALLED)
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rewardmodels needs Python 3.11 or later; $(PYTHON) is older or isn't there." >&2; \
	  echo "Name another one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "$(PYTHON) can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf .venv; exit 1; }
	@# Compiling every module of every package would take longer than the rest of the installation.
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev,fast]"
	@touch $@
