# `make demo` and `make test` need python3 (3.11 or newer), git and make, and do the rest in .venv.
# Another interpreter: make test PYTHON=python3.13 VENV=.venv13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick doctest docs lint types clean
.DEFAULT_GOAL := test

demo: $(VENV)/demo.stamp
	$(BIN)/python -m experiments.digits

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# While editing: what takes no more than some seconds a file.
QUICK := assign bad_input checkpoint cli codebook_array fit_knq_error fit_knq_windows imports packing plan rows rules \
	report

quick: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow" $(QUICK:%=tests/test_%.py)

doctest: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q nuqjax README.md docs

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python .ci/links.py site

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/dev.stamp
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) demo dist site

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

$(VENV)/docs.stamp: $(VENV)/venv.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@
