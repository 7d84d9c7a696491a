# Each target sets up what it needs, in a virtual environment of its own under $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py unsync/_core.pyx

.PHONY: help demo test test-compiled test-pure test-upstream lint bench bench-micro clean

help:
	@echo "make demo    set up and run the census of the standard library"
	@echo "make test    set up and run all tests, on the compiled core and on the fallback"
	@echo "make lint    ruff, cython-lint and mypy"
	@echo "make bench   compare with every other way to do the work, and write the tables"
	@echo "make bench-micro   measure the two cores with pytest-benchmark"
	@echo "make clean   remove everything that was generated"

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# Editable: the extension is built into unsync/, and built again when its source changes.
$(VENV)/.unsync: $(VENV)/.pip $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.bench: $(VENV)/.%: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

demo: $(VENV)/.unsync
	$(BIN)/python examples/census.py

test: test-compiled test-pure test-upstream

test-compiled: $(VENV)/.unsync $(VENV)/.test
	UNSYNC_NO_EXTENSIONS= UNSYNC_TEST_CORE=compiled $(BIN)/pytest

test-pure: $(VENV)/.unsync $(VENV)/.test
	UNSYNC_NO_EXTENSIONS=1 UNSYNC_TEST_CORE=pure $(BIN)/pytest

# The suite of upstream's last release of the seed, unchanged, against both cores.
test-upstream: $(VENV)/.unsync $(VENV)/.test
	UNSYNC_NO_EXTENSIONS= $(BIN)/python tests/upstream.py
	UNSYNC_NO_EXTENSIONS=1 $(BIN)/python tests/upstream.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint unsync
	$(BIN)/mypy
	$(BIN)/basedpyright

# Every way to do the work, side by side, each in an environment of its own; then the pages.
bench: $(VENV)/.bench
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/report.py

bench-micro: $(VENV)/.unsync $(VENV)/.test $(VENV)/.bench
	UNSYNC_NO_EXTENSIONS= $(BIN)/pytest bench --benchmark-columns=median,iqr,ops
	UNSYNC_NO_EXTENSIONS=1 $(BIN)/pytest bench --benchmark-columns=median,iqr,ops

clean:
	rm -rf .venv* build dist wheelhouse *.egg-info unsync/*.so unsync/*.pyd unsync/*.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
