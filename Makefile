PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test lint format wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed-dev  ## create .venv with everything a developer needs

demo: .venv/.installed  ## run the demonstration (writes demo-out/)
	$(BIN)/codedinvnet demo

test: lint  ## every check: lint, types, tests
	$(BIN)/pytest

lint: .venv/.installed-dev  ## style and types, changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed-dev  ## repair the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: .venv/.installed-dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## delete caches and build products; keeps .venv, data and runs
	rm -rf build dist src/*.egg-info demo-out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +

# The virtual environment in two steps: what the demo needs, then the developer's tools.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@
