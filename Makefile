# Two commands on a fresh machine: `make demo` and `make test`. What they do is written out in README.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test check clean
help:
	@echo "make demo   a virtual environment, an installation, and +recipe=bert_sst2 trained to the end"
	@echo "make test   a virtual environment, what the tests need, and the tests"
	@echo "make check  formatting, lint and types"
	@echo "make clean  removes the virtual environment and build files"

demo: $(VENV)/.demo
	$(BIN)/python -m runner +recipe=bert_sst2

# Whole files go to one process each: what a file's tests share is made once.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A marker file for each set of dependencies: installed once, again when a declaration changes.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[text]"
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e ".[text,test]"
	@touch $@
