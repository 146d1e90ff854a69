# `make demo`: install, train on digits, report. `make test`: install, lint, type-check, test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TEACHER = runs/digits/teacher
STUDENT = runs/digits/student
# go on where an interrupted run stopped; one that stopped before its first checkpoint starts again
fit = @if [ -f $(1)/checkpoints/last.ckpt ]; then \
	  $(BIN)/f2d2 fit --config $(2) --ckpt_path $(1)/checkpoints/last.ckpt; \
	else rm -rf $(1) && $(BIN)/f2d2 fit --config $(2); fi && touch $@

.PHONY: demo test lint clean

demo: $(STUDENT)/.trained
	$(BIN)/f2d2 test --config configs/digits_student.yaml --ckpt_path $(STUDENT)/checkpoints/last.ckpt

$(TEACHER)/.trained: | $(VENV)/.installed
	$(call fit,$(TEACHER),configs/digits_teacher.yaml)

$(STUDENT)/.trained: $(TEACHER)/.trained | $(VENV)/.installed
	$(call fit,$(STUDENT),configs/digits_student.yaml)

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
