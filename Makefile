# `make demo` and `make test` need python3 (3.11 or newer), git and make, and do the rest in .venv.
# Another interpreter: make test PYTHON=python3.13 VENV=.venv13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick doctest docs lint types clean
.DEFAULT_GOAL := test

demo: $(VENV)/demo.stamp
	$(BIN)/python -m experiments.studies.digits

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

# While editing: what takes no more than some seconds a file.
QUICK := test_cli.py test_imports.py checkpoint/test_checkpoint.py compress/test_plan.py compress/test_rules.py \
	knq/test_error.py knq/test_windows.py laws/test_bad_input.py leaf/test_assign.py leaf/test_codebook_array.py \
	leaf/test_packing.py leaf/test_rows.py report/test_report.py

quick: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow" $(QUICK:%=tests/%)

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
