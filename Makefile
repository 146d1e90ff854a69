# `make demo`: install, train on digits, report. `make test`: install, lint, type-check, test. `make site`: documentation.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
.PHONY: demo test neighbours lowest lint site clean

# each command goes on with a run that was interrupted, and leaves a finished one alone
demo: $(VENV)/.installed
	$(BIN)/f2d2 fit --config configs/digits_teacher.yaml
	$(BIN)/f2d2 fit --config configs/digits_student.yaml
	$(BIN)/f2d2 test --config configs/digits_student.yaml --ckpt_path last

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

# other packages' networks, solvers and pages, in an environment of their own
neighbours:
	$(MAKE) VENV=.venv-neighbours .venv-neighbours/.installed-neighbours
	.venv-neighbours/bin/python -m pytest -n auto tests/neighbours tests/test_documents.py -k neighbours

# all tests with the oldest versions of packages that pyproject.toml allows
lowest:
	$(MAKE) VENV=.venv-lowest .venv-lowest/.installed-lowest
	.venv-lowest/bin/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# some minutes: the notebooks are executed. F2D2_DOCS_STEPS=20 shortens their trainings, F2D2_DOCS_EXECUTE=off leaves them out
site: $(VENV)/.installed-dev
	rm -rf docs/api
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-neighbours: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,neighbours]'
	touch $@

$(VENV)/.installed-lowest: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --resolution lowest-direct --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-neighbours .venv-lowest .pytest_cache .mypy_cache .ruff_cache docs/_build docs/api
