# make demo: adapt a small model to a task, offline, in minutes.   make test: the whole suite on CPU.
# make attack: the long form of tests/attack, for hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench attack clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/python_cost.py
	$(BIN)/python benchmarks/train_step_cpu.py

attack: $(READY)
	$(BIN)/python tests/attack/attack_of_files.py
	$(BIN)/python -m pytest -m attack tests/attack

clean:
	rm -rf $(VENV) build dist
