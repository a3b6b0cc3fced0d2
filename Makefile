# make demo: adapt a small model to a task, offline, in minutes.   make test: the whole suite on CPU.
# make attack: the long form of tests/attack, for hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.tested
SHELL := bash
.SHELLFLAGS := -o pipefail -c

# A virtual environment with one extra of the package. Its progress is one line that changes; errors are on stderr.
define install
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12")'
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(1)]' \
	| awk -v again=$$(test -t 2 && printf '\\r\\033[K' || printf '\\n') '/^ *(Collecting|Building|Installing)/ \
		{ printf "%sinstalling, step %d: %s", (n++ ? again : ""), n, substr($$0, 1, 70); fflush() } END { print "" }'
touch $@
endef

.PHONY: demo test lint bench attack clean

$(READY): pyproject.toml constraints.txt
	$(call install,train)

$(TESTED): pyproject.toml constraints.txt
	$(call install,test)
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(TESTED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(TESTED)
	$(BIN)/python benchmarks/python_cost.py
	$(BIN)/python benchmarks/train_step_cpu.py

attack: $(TESTED)
	$(BIN)/python tests/attack/attack_of_files.py
	$(BIN)/python -m pytest -m attack tests/attack

clean:
	rm -rf $(VENV) build dist
