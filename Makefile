# heatkv: everything runs in .venv, which is made when it is missing. Packages come from PyPI alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one thread each: more would only wait for each other on a small machine.
TEST_JOBS ?= 2
test test-all: export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check docs format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(VENV)/.installed  ## install, then five methods at equal bytes on the bundled model: a table and a picture
	$(BIN)/heatkv eval experiment=demo

test: $(VENV)/.dev  ## install with the tools, then run the tests
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m "not slow and not gpu"

test-all: $(VENV)/.dev  ## also the tests that take minutes, or a GPU where there is one
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m ""  # -m of pyproject leaves out the slow ones

check: $(VENV)/.dev  ## format, lint, types, import rules, stale tables, file sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_docs.py --check
	@find heatkv_cli tests scripts -name '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 500 {print "over 500 lines: " $$2; bad = 1} END {exit bad}'

docs: $(VENV)/.dev  ## write what README.md and docs/methods.md say of methods, from conf/method and docstrings
	$(BIN)/python scripts/make_docs.py

format: $(VENV)/.dev  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) runs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install torch torchvision
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ $(VENV)/.installed
