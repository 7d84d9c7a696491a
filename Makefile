# Each target sets up what it needs, in a virtual environment of its own under $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SOURCES := pyproject.toml setup.py unsync/_core.pyx

.PHONY: help demo test test-compiled test-pure test-upstream test-cython lint docs wheels
.PHONY: cibuildwheel bench bench-service bench-micro bench-against bench-import clean

help:
	@echo "make demo    set up and run the census of the standard library"
	@echo "make test    set up and run all tests, on the compiled core and on the fallback"
	@echo "make lint    ruff, cython-lint, mypy, basedpyright; the workflows too"
	@echo "make docs    build the documentation site into build/docs"
	@echo "make wheels  build, check and test the wheels for the interpreters at hand"
	@echo "make bench   compare with every other way to do the work, and write the tables"
	@echo "make bench-service   load real services, with each way to call, and write the tables"
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

GROUPS := test services lint docs wheels cibuildwheel bench
$(GROUPS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

demo: $(VENV)/.unsync
	$(BIN)/python examples/census.py

test: test-compiled test-pure test-upstream

test-compiled: $(VENV)/.unsync $(VENV)/.test $(VENV)/.services
	UNSYNC_NO_EXTENSIONS= UNSYNC_TEST_CORE=compiled $(BIN)/pytest

test-pure: $(VENV)/.unsync $(VENV)/.test $(VENV)/.services
	UNSYNC_NO_EXTENSIONS=1 UNSYNC_TEST_CORE=pure $(BIN)/pytest

# The suite of upstream's last release of the seed, unchanged, against both cores.
test-upstream: $(VENV)/.unsync $(VENV)/.test
	UNSYNC_NO_EXTENSIONS= $(BIN)/python tests/upstream.py
	UNSYNC_NO_EXTENSIONS=1 $(BIN)/python tests/upstream.py

# Built with a given Cython, say CYTHON="cython==3.1.0", and tested as it is installed.
test-cython:
	rm -rf .venv-cython
	$(MAKE) VENV=.venv-cython .venv-cython/.pip
	.venv-cython/bin/python -m pip install --quiet --group test-basic $(CYTHON)
	.venv-cython/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	UNSYNC_TEST_CORE=compiled UNSYNC_TEST_INSTALLED=1 .venv-cython/bin/pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint unsync
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/actionlint
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

# Into dist/. WHEELS="--pythons 3.12" limits it; python .ci/wheels.py --help tells what else there is.
wheels: $(VENV)/.wheels
	$(BIN)/python .ci/wheels.py $(WHEELS)

# Into wheelhouse/: what a release gets of this system; on Linux it takes a container engine.
cibuildwheel: $(VENV)/.cibuildwheel
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/cibuildwheel

# From scratch each time, so that a warning is not missed for a page that is built already.
docs: $(VENV)/.unsync $(VENV)/.docs
	$(BIN)/sphinx-build -W -n --keep-going -q -E -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

# Every way to do the work, side by side, each in an environment of its own; then the pages.
bench: $(VENV)/.bench
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/report.py

# Flask, FastAPI and Django under their servers, on PostgreSQL and Redis, loaded by wrk; then the page.
# SERVICE="--only fastapi/unsync fastapi/def" limits it; --help tells what else there is.
bench-service: $(VENV)/.bench
	.ci/databases
	PYTHONPATH=bench:tests $(BIN)/python -m service $(SERVICE)
	PYTHONPATH=bench:tests $(BIN)/python -m service --pinned $(SERVICE)
	PYTHONPATH=bench:tests $(BIN)/python -m service.tables

bench-micro: $(VENV)/.unsync $(VENV)/.test $(VENV)/.bench
	UNSYNC_NO_EXTENSIONS= $(BIN)/pytest bench --benchmark-columns=median,iqr,ops
	UNSYNC_NO_EXTENSIONS=1 $(BIN)/pytest bench --benchmark-columns=median,iqr,ops

# The micro-benchmarks with another commit's package, say BASE=main, then with this one.
bench-against: $(VENV)/.test $(VENV)/.bench
	rm -rf build/base build/benchmarks && git worktree prune
	git worktree add --quiet --detach build/base $(BASE)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps ./build/base
	$(BIN)/pytest bench --benchmark-storage=build/benchmarks --benchmark-save=base
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps .
	$(BIN)/pytest bench --benchmark-storage=build/benchmarks --benchmark-save=this
	rm -rf build/base $(VENV)/.unsync && git worktree prune
	$(BIN)/pytest-benchmark --storage=build/benchmarks compare --group-by=fullname --columns=median,iqr

bench-import: $(VENV)/.unsync
	$(BIN)/python bench/import_time.py

# Files, Redis, processes and PostgreSQL, with something killed on the way: a line of JSON for a run.
.PHONY: bench-pipeline
bench-pipeline: $(VENV)/.unsync $(VENV)/.services $(VENV)/.bench
	$(BIN)/python bench/service/pipeline.py --rounds 3

clean:
	rm -rf .venv* build dist wheelhouse *.egg-info unsync/*.so unsync/*.pyd unsync/*.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
