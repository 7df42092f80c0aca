# All targets run from .venv with the pinned packages that `make setup` installs, by uv if it runs, else by pip.
#   make setup PYTHON=python3.12    another interpreter
#   make setup UV=                  pip although uv runs
#   make test WORKERS=8             eight test processes

PYTHON ?= python3
UV ?= $(shell uv --version >/dev/null 2>&1 && echo uv)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.robustq-installed
# One thread per process: threads of several processes would wait for each other. The tests of a file share trained
# networks and stay in one process.
WORKERS ?= 2
RUN_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=15

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-slow lint pins clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with the pinned packages (skipped if up to date)

quickstart: setup  ## train, harden, export and re-check on the digits (about two minutes)
	$(BIN)/robustq quickstart

test: setup  ## run the fast tests
	$(RUN_TESTS) -m "not slow and not gpu"

test-slow: setup  ## run the slow tests
	$(RUN_TESTS) -m "slow and not gpu"

lint: setup  ## run ruff check, ruff format --check, mypy --strict and import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-cache --no-logo

pins:  ## write requirements files from pyproject.toml (needs uv; UPGRADE=1 for newer versions)
	@[ -n "$(UV)" ] || { echo "make pins needs uv, which does not run on this machine: install uv first" >&2; exit 2; }
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make pins" --quiet $(if $(UPGRADE),--upgrade) -o requirements.txt
	$(UV) pip compile --group reference --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-emit-index-url --custom-compile-command "make pins" --quiet -o requirements-reference.txt

clean:  ## remove caches, build output and .venv (keeps runs/ and export-out/)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip refuses hashes together with -e: the pinned packages are installed first, then robustq without dependencies. Its
# build uses the installed setuptools (--no-build-isolation) and downloads nothing.
$(STAMP): requirements.txt requirements-reference.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "robustq needs Python 3.11 or newer; '$(PYTHON)' is older or does not run:" \
			"$$("$(PYTHON)" --version 2>&1 | head -n 1). Name another one: make setup PYTHON=python3.12" >&2; exit 2; }
ifneq ($(UV),)
	@$(BIN)/python -c '' 2>/dev/null || $(UV) venv --python "$(PYTHON)" --clear $(VENV)
	$(UV) pip install --python $(BIN)/python --require-hashes -r requirements.txt
	$(UV) pip install --python $(BIN)/python --require-hashes --no-deps -r requirements-reference.txt
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	@$(BIN)/python -c '' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements-reference.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
endif
	@touch $@
