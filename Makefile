# `make demo`: install, train on digits, report. `make test`: install, lint, type-check, test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
.PHONY: demo test lint clean

# each command goes on with a run that was interrupted, and leaves a finished one alone
demo: $(VENV)/.installed
	$(BIN)/f2d2 fit --config configs/digits_teacher.yaml
	$(BIN)/f2d2 fit --config configs/digits_student.yaml
	$(BIN)/f2d2 test --config configs/digits_student.yaml --ckpt_path last

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
