# Two commands do everything on a fresh machine: `make demo` and `make test`. Python 3.11 or later; PYTHON names another one.
PYTHON ?= python3
BIN := .venv/bin

# Where it is set, every process that tests start would compile the package anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-long lint format clean

demo: .venv/ready
	$(BIN)/robustfair demo

# A worker for every core, one thread each (conftest.py). A test that hangs for ten minutes is stopped and named.
test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

test-long: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m ""

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist
