# Everything goes through one virtual environment, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files run at once; those that start ranks want two cores each. What is marked `alone` runs after them.
JOBS ?= 2
STAMP := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install quickstart test test-all check format clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@# Ours, but of a Python that is gone or too old or new: begin anew. Another's environment is its owner's.
	@if [ "$(VENV)" = .venv ] && [ -e .venv ] && ! .venv/bin/python -c '$(SUPPORTED)' 2>/dev/null; then rm -rf .venv; fi
	@test -x $(BIN)/python || $(PYTHON) -c '$(SUPPORTED)' || \
		{ echo "clipcov_stream needs Python 3.10 to 3.12; $(PYTHON) is none of these: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the stack into $(VENV): about 5 minutes and 7 GB the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python tools/quickstart.py

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -m "alone and not slow and not gpu"

test-all: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
