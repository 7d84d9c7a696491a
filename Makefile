# Each target sets up what it needs, in a virtual environment of its own under $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
SOURCES := pyproject.toml setup.py unsync/_core.pyx

.PHONY: help demo test test-core test-cython environment lint docs wheels
.PHONY: cibuildwheel bench bench-service bench-micro bench-against bench-import clean

help:
	@echo "make demo    set up and run the census of the standard library"
	@echo "make test    set up and run all tests, on the compiled core and on the fallback"
	@echo "make test-core   the tests of the two cores alone, in about a minute"
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

# What `make test`, `make lint` and `make docs` need, so that they can run side by side.
environment: $(addprefix $(VENV)/.,unsync test services lint docs)

GROUPS := test services lint docs wheels cibuildwheel bench
$(GROUPS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

demo: $(VENV)/.unsync
	$(BIN)/python examples/census.py

# All of the suite on both cores, side by side, and upstream's own; .ci/tiers.py says what runs where.
test: $(VENV)/.unsync $(VENV)/.test $(VENV)/.services
	$(BIN)/python .ci/tiers.py test

# The two cores alone, for every save.
test-core: $(VENV)/.unsync $(VENV)/.test
	$(BIN)/python .ci/tiers.py test-core

# Built with a given Cython, say CYTHON="cython==3.1.0", and tested as it is installed.
test-cython:
	rm -rf .venv-cython
	$(MAKE) VENV=.venv-cython .venv-cython/.pip
	.venv-cython/bin/python -m pip install --quiet --group test-basic $(CYTHON)
	.venv-cython/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	UNSYNC_TEST_CORE=compiled UNSYNC_TEST_INSTALLED=1 .venv-cython/bin/pytest tests/core
	UNSYNC_TEST_CORE=compiled UNSYNC_TEST_INSTALLED=1 .venv-cython/bin/pytest tests/world

# What users see is checked for the oldest Python, which pyproject.toml names, and for the newest.
NEWEST := 3.15
lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint unsync
	$(BIN)/mypy
	$(BIN)/mypy --python-version $(NEWEST) unsync tests/support/check_types.py
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/basedpyright --pythonpath $(BIN)/python --pythonversion $(NEWEST) unsync tests/support/check_types.py
	$(BIN)/actionlint
	$(BIN)/zizmor --offline --quiet --persona pedantic .github

# Into dist/, and tests what pip makes of it. WHEELS="build 3.12" limits it;
# .ci/wheels.py says what else there is.
WHEELS ?= all
wheels: $(VENV)/.wheels
	$(BIN)/python .ci/wheels.py $(WHEELS)

# Into wheelhouse/: what a release gets of this system; on Linux it takes a container engine.
cibuildwheel: $(VENV)/.cibuildwheel
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/cibuildwheel

# From scratch each time, so that a warning is not missed for a page that is built already. And the
# pages show the figures that were measured.
docs: $(VENV)/.unsync $(VENV)/.docs
	$(BIN)/sphinx-build -W -n --keep-going -q -E -d build/doctrees docs build/docs
	$(BIN)/python bench/report.py --check
	PYTHONPATH=bench $(BIN)/python -m service.tables --check
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

# What each row of the package takes, counted, beside what it took at another commit: BASE=main.
# With OF=COMMIT that commit is counted, not the checkout. It fails if a row takes over 3 % more
# instructions, or more system calls.
.PHONY: bench-instructions
bench-instructions: $(VENV)/.unsync $(VENV)/.test
	$(BIN)/python bench/instructions.py --against $(BASE) $(if $(OF),--of $(OF))

# Files, Redis, processes and PostgreSQL, with something killed on the way: a line of JSON for a run.
.PHONY: bench-pipeline
bench-pipeline: $(VENV)/.unsync $(VENV)/.services $(VENV)/.bench
	$(BIN)/python bench/service/pipeline.py --rounds 3

clean:
	rm -rf .venv* build dist wheelhouse *.egg-info unsync/*.so unsync/*.pyd unsync/*.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
