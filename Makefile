# `make demo` and `make test` do all the set-up by themselves; `make` alone tells the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --no-input
PYTEST := $(PYTHON) -m pytest

# The commands of a virtual environment know nothing of the one that is active around them.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

.PHONY: help
help: ## Tell the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Any Python >= 3.10 that runs and can make environments: a version manager's shim may do neither.
$(VENV)/bin/python:
	@for python in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$python -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.10 or newer with the venv module on PATH (Debian and Ubuntu: apt-get install python3-venv)." >&2; \
	exit 1

# requirements.txt pins everything; the demo installs no more of it than it needs.
$(VENV)/demo.stamp: requirements.txt setup.py | $(VENV)/bin/python
	@echo "Installing what the demo needs into $(VENV)"
	@$(PIP) install --quiet --constraint requirements.txt setuptools wheel
	@$(PIP) install --quiet --constraint requirements.txt --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/all.stamp: requirements.txt setup.py $(VENV)/demo.stamp
	@echo "Installing what tests, benchmarks and documentation need into $(VENV)"
	@$(PIP) install --quiet --requirement requirements.txt
	@touch $@

.PHONY: server
server: $(VENV)/demo.stamp ## Make the environment of the local Triton server, if it is not there
	@$(PYTHON) -m beam_triton.testing.serve >/dev/null

.PHONY: demo
demo: $(VENV)/demo.stamp ## Score handwritten digits on a real Triton (ENDPOINT=http://… for one that runs elsewhere)
	@$(PYTHON) -m pipelines.demo $(if $(ENDPOINT),--endpoint $(ENDPOINT))

.PHONY: flink-demo
flink-demo: engine-tools server ## The same on a Flink cluster of two task managers, started here
	@$(PYTHON) -m engines.flink_demo

.PHONY: bench
bench: $(VENV)/all.stamp server ## Benchmarks side by side with the peers, with charts (BENCH="…" for options)
	@$(PYTHON) -m benchmarks $(BENCH)

.PHONY: docs
docs: $(VENV)/all.stamp ## The documentation and API reference, into build/docs
	@$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

.PHONY: test
test: check server ## Every test that needs Python only
	$(PYTEST) tests --ignore tests/engines

.PHONY: check
check: $(VENV)/all.stamp ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

.PHONY: chaos
chaos: $(VENV)/all.stamp server ## The chaos tests, the long ones too
	$(PYTEST) tests/chaos --long
	$(PYTHON) tests/chaos/fuzz_decoder.py --runs 1000000
	@if $(PYTHON) -c 'import atheris' 2>/dev/null; then \
	  $(PYTHON) tests/chaos/fuzz_decoder.py --atheris -runs=1000000 -max_total_time=300; \
	else echo "atheris has no wheel here: the decoder was fuzzed without its guidance"; fi

.PHONY: test-engines
test-engines: engine-tools server ## Prism and Flink; needs Java 17, Maven and Go
	$(PYTEST) tests/engines

# Before anything is installed for them. The Python that judges is there to run the tests anyway.
.PHONY: engine-tools
engine-tools: $(VENV)/all.stamp
	@$(PYTHON) -m engines --tools_only

.PHONY: format
format: $(VENV)/all.stamp ## Sort imports, lay the code out, and mend what ruff can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

.PHONY: dist
dist: $(VENV)/all.stamp ## Wheel and sdist, into dist
	@$(PYTHON) -m build --no-isolation --outdir dist .

.PHONY: clean
clean: ## Remove everything that make made here; the server's environment in the user's cache stays
	rm -rf $(VENV) .cache .engines build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
