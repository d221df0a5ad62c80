# Needs Python 3.11 or newer with pip, and make; everything else goes into .venv.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types setup docs docs-reference

demo: $(READY) ## Compare seven methods on handwritten digits; the results go into a new folder under demo-runs/
	$(BIN)/fedstill demo

test: $(READY) ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Check types
	$(BIN)/mypy

docs: $(READY) ## Build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-reference: $(READY) ## Write the pages that are made from the code: docs/configuration.md, docs/commands.md
	$(BIN)/python tools/reference.py

setup: $(READY) ## Make .venv with the pinned packages

# The build's own packages first, so that they are the pinned ones too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[dev,docs]'
	@touch $@
