# `make demo` and `make test` need python3 (3.11 or newer), git and make, and do the rest in .venv.
# Another interpreter: make test PYTHON=python3.13 VENV=.venv13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick doctest lint types clean
.DEFAULT_GOAL := test

demo: $(VENV)/demo.stamp
	$(BIN)/python -m experiments.digits

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# While editing: all but the tests that take long, and fewer damaged files.
quick: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow" --fuzz 1000

doctest: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q nuqjax README.md

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/dev.stamp
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo dist

# What is installed is remembered until pyproject.toml changes. Dependency groups need pip 25.1.
$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nuqjax needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[experiments]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/venv.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[experiments,export]" --group dev
	@touch $@
