# `make` lists the targets. Each target installs what it needs first.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --no-input
PYTEST := $(PYTHON) -m pytest
OLDEST_VENV := .venv-beam-oldest
WHEEL_VENV := .venv-wheel
# Two processes whatever the machine has: the tests of one file stay together and share its server.
PARALLEL := --numprocesses 2 --dist loadfile

# An active virtual environment must not affect the one of this project.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

# Other clients (requests, gRPC, urllib) would look for the servers on this machine through the proxy that pip may need.
export no_proxy := localhost,127.0.0.1,::1,$(or $(no_proxy),$(NO_PROXY))
export NO_PROXY := $(no_proxy)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Any Python >= 3.10 that runs and can make environments; a version manager's shim may do neither.
$(VENV)/bin/python:
	@for python in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$python -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.10 or newer with the venv module on PATH (Debian and Ubuntu: apt-get install python3-venv)." >&2; \
	exit 1

# requirements.txt pins every version; the demo installs only the packages that it needs.
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
server: $(VENV)/demo.stamp ## Install the local Triton server, unless it is there
	@$(PYTHON) -m beam_triton.testing.serve >/dev/null

# Outside the time limits of tests: onnxruntime brings 250 MB, each time.
.PHONY: model-packages
model-packages: $(VENV)/demo.stamp
	@for requirements in pipelines/model_repository_*/*/requirements.txt; do \
	  $(PYTHON) -m beam_triton.testing.serve $$(sed 's/^/--package=/' $$requirements) >/dev/null || exit 1; \
	done

.PHONY: demo
demo: $(VENV)/demo.stamp ## Score handwritten digits on a local Triton (ENDPOINT=http://… uses another one)
	@$(PYTHON) -m pipelines.demo $(if $(ENDPOINT),--endpoint $(ENDPOINT))

.PHONY: flink-demo
flink-demo: engines server ## Score the digits on a local Flink cluster with two task managers
	@$(PYTHON) -m engines.flink_demo

.PHONY: bench
bench: $(VENV)/all.stamp server ## Run the benchmarks, this library beside others (BENCH="…" passes options)
	@$(PYTHON) -m benchmarks $(BENCH)

.PHONY: docs
docs: $(VENV)/all.stamp ## Build the documentation and API reference in build/docs
	@$(PYTHON) -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

.PHONY: test
test: check unit integration chaos-short ## Run every test that needs Python only

.PHONY: unit
unit: $(VENV)/all.stamp ## Run the unit tests, which need no server
	$(PYTEST) tests/unit $(PARALLEL)

.PHONY: integration
integration: $(VENV)/all.stamp server model-packages worker-packages ## Run the tests against a real Triton
	$(PYTEST) tests/integration $(PARALLEL)

.PHONY: check
check: $(VENV)/all.stamp ## Run ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

.PHONY: chaos-short
chaos-short: $(VENV)/all.stamp server
	$(PYTEST) tests/chaos $(PARALLEL)

.PHONY: chaos
chaos: $(VENV)/all.stamp server ## Run the tests in which servers and networks fail, the long ones too; fuzz the decoder
	$(PYTEST) tests/chaos tests/integration/test_benchmarks_smoke.py --long
	$(PYTHON) tests/chaos/fuzz_decoder.py --runs 1000000
	@if $(PYTHON) -c 'import atheris' 2>/dev/null; then \
	  $(PYTHON) tests/chaos/fuzz_decoder.py --atheris -runs=1000000 -max_total_time=300; \
	else echo "The decoder was fuzzed without coverage guidance: atheris has no wheel for this platform"; fi

.PHONY: test-engines
test-engines: engines flink-function server ## Run the tests on Prism, Flink and Spark; needs Java 17, Maven and Go
	$(PYTEST) tests/engines

.PHONY: test-foreign
test-foreign: $(VENV)/all.stamp foreign-servers ## Run the tests on MLServer, KServe, PyTriton and OMLE's server
	$(PYTEST) tests/foreign $(PARALLEL)

# Outside the time limits of tests: a server brings hundreds of megabytes.
.PHONY: foreign-servers
foreign-servers: $(VENV)/all.stamp
	@$(PYTHON) -m tests.foreign.environments

# What users meet of Beam, on the oldest release that setup.py takes.
OLDEST_TESTS := tests/unit/transforms $(addprefix tests/integration/test_,$(addsuffix .py, \
	run_inference model_updates keyed_models beam_base_test transform rows windows numpy_batches arrow_batches \
	embeddings enrichment sequences roll_over))

$(OLDEST_VENV)/stamp: tests/requirements-beam-oldest.txt | $(VENV)/bin/python
	@echo "Installing the oldest Beam into $(OLDEST_VENV)"
	@$(PYTHON) -m venv --clear $(OLDEST_VENV)
	@$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --requirement $<
	@touch $@

.PHONY: test-beam-oldest
test-beam-oldest: $(OLDEST_VENV)/stamp server ## Run the tests of the Beam transforms on Beam 2.70, the oldest
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS) $(PARALLEL)

.PHONY: engines
engines: $(VENV)/all.stamp ## Install Prism, Flink and Spark in .engines; needs Java 17, Maven and Go
	@$(PYTHON) -m engines install

.PHONY: flink-function
flink-function: $(VENV)/all.stamp
	@$(PYTHON) -m engines install-flink-function

.PHONY: worker-packages
worker-packages: $(VENV)/all.stamp
	@$(PYTHON) -m engines install-worker-packages

.PHONY: format
format: $(VENV)/all.stamp ## Format the code, sort imports and fix what ruff can fix
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

.PHONY: dist
dist: $(VENV)/all.stamp ## Build the wheel and the sdist in dist
	@rm -rf build dist
	@$(PYTHON) -m build --no-isolation --outdir dist . >/dev/null
	@$(PYTHON) -m twine check --strict dist/*

.PHONY: test-wheel
test-wheel: dist ## Install the wheel in an environment that has nothing else, and use it there
	@echo "Installing the wheel into $(WHEEL_VENV)"
	@$(PYTHON) -m venv --clear $(WHEEL_VENV)
	@$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
	  --constraint requirements.txt dist/*.whl
	$(PYTEST) tests/wheel

.PHONY: clean
clean: ## Remove everything that make made here, but not the server in the user's cache
	rm -rf $(VENV) $(OLDEST_VENV) $(WHEEL_VENV) .cache .engines build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
