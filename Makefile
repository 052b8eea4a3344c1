# PYTHON  the interpreter that the environment is made with
# STORE   where `make demo` keeps its records: a URL, for example sqlite:////tmp/demo.db, or `postgres` for an embedded PostgreSQL
# BACKEND what `make demo` runs the work with: its own queue, celery, rq or trigger
# WORKERS how many tests run at a time: most of them wait for a worker, a broker or a lease
# ARGS    passed on to pytest, the benchmarks or Jaeger's script, for example ARGS="-k spool"
PYTHON ?= python3
STORE ?=
BACKEND ?= own
WORKERS ?= 3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
RUNTIME := $(VENV)/.runtime
EMBEDDED := $(VENV)/.embedded
DEV := $(VENV)/.dev
CELERY := $(VENV)/.celery
RQ := $(VENV)/.rq
TRIGGER := $(VENV)/.trigger

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench jaeger clean

help:
	@echo "make demo    run webhooks and a schedule through workers, kill one, show every record and its span"
	@echo "             (BACKEND=celery or rq: the same on Celery or RQ, with a Valkey that comes along;"
	@echo "              BACKEND=trigger: on the local engine, asked for over Trigger.dev's contract)"
	@echo "make test    run the tests, WORKERS=3 at a time (ARGS=... goes to pytest; OTELEXEC_TEST_LONG=1 adds the long sweeps, 2 the longest)"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make types   mypy and pyright"
	@echo "make bench   print the benchmark ratios"
	@echo "make jaeger  run a real Jaeger on loopback, without Docker (needs Go; built once)"
	@echo "make clean   remove the environment, builds and caches of this folder"

demo: $(if $(filter celery,$(BACKEND)),$(CELERY),$(if $(filter rq,$(BACKEND)),$(RQ),$(if $(filter trigger,$(BACKEND)),$(TRIGGER),$(RUNTIME)))) $(if $(filter postgres,$(STORE)),$(EMBEDDED))
	$(if $(STORE),OTELEXEC_STORE='$(STORE)') $(BIN)/otelexec demo --backend $(BACKEND)

# Most tests start processes: without compiled files, each would compile every module anew.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(DEV)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy
	$(BIN)/pyright

bench: $(DEV)
	$(BIN)/python -m tests.benchmarks $(ARGS)

jaeger:
	@$(check_python)
	@$(PYTHON) examples/jaeger/run.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-min build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	|| { echo "otelexec needs Python 3.11 or newer, and '$(PYTHON)' is not that: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

$(VENV)/.pip: constraints.txt
	@$(check_python)
	@echo "Setting up $(VENV): once, about a minute"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt --upgrade pip
	@touch $@

$(RUNTIME): $(VENV)/.pip pyproject.toml
	@$(PIP) --constraint constraints.txt --build-constraint constraints.txt --editable .
	@touch $@

$(EMBEDDED): $(RUNTIME)
	@$(PIP) --constraint constraints.txt --group embedded
	@touch $@

$(CELERY): $(RUNTIME)
	@$(PIP) --constraint constraints.txt --build-constraint constraints.txt --editable '.[celery]' --group demo
	@touch $@

$(RQ): $(RUNTIME)
	@$(PIP) --constraint constraints.txt --build-constraint constraints.txt --editable '.[rq]' --group demo-rq
	@touch $@

$(TRIGGER): $(RUNTIME)
	@$(PIP) --constraint constraints.txt --build-constraint constraints.txt --editable '.[trigger]'
	@touch $@

$(DEV): $(RUNTIME)
	@$(PIP) --constraint constraints.txt --group dev
	@touch $@
