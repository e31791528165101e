# `make quickstart` and `make test` are all a fresh machine with Python 3.11 to 3.14 needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# cpu or gpu: which of the two vLLM builds to install.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
UV_VERSION := 0.13.9
UV := $(shell command -v uv || echo .uv/bin/uv)
RUN := HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 .venv/bin
BASE := bases/smollm2-135m
NAME ?= lora_cpu
# No package brings it, and only what serves on a CPU wants it.
LIBNUMA := [ $(EXTRA) = gpu ] || $(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
    || { echo "vLLM on a CPU needs libnuma: install it, as with 'apt-get install libnuma1'" >&2; exit 1; }

# Where a machine forbids it, every process compiles all of vLLM's and torch's sources again, which
# is two thirds of the time they take to import.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/.synced ## Install everything into .venv, bringing uv where it is missing

.uv/bin/uv:
	@echo "· uv is not installed: putting uv $(UV_VERSION) into .uv"
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.synced: pyproject.toml $(wildcard packages/*/pyproject.toml) $(filter .uv/bin/uv,$(UV))
	@($(LIBNUMA)) || true
	@echo "· installing manylora and its tools into .venv ($(EXTRA))"
	$(UV) sync --extra $(EXTRA)
	@touch $@

$(BASE)/manylora-base.json: | setup
	.venv/bin/manylora base fetch smollm2-135m $(BASE)

.PHONY: quickstart
quickstart: setup ## Train three adapters, serve them, evaluate, swap one under load
	@$(LIBNUMA)
	@$(RUN)/python recipes/quickstart/quickstart.py

# Each keeps all cores busy by itself; the others share them.
ALONE := tests/e2e tests/integration/gateway

# The trainer's files take longest: last, one would run on while the other processes are idle. By
# name, as pytest drops a directory that stands beside the one it is in.
UNIT := tests/unit/trainer $(filter-out tests/unit/trainer tests/unit/__%,$(wildcard tests/unit/*))

.PHONY: test
test: setup $(BASE)/manylora-base.json ## Run every test, those of engines and Ray Serve alone
	$(RUN)/python -m pytest $(ALONE)
	$(RUN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    $(ALONE:%=--ignore=%) tests/integration $(UNIT)

SOAK_MINUTES ?= 30
.PHONY: soak
soak: setup $(BASE)/manylora-base.json ## Run mixed load with faults for SOAK_MINUTES
	SOAK_MINUTES=$(SOAK_MINUTES) $(RUN)/python -m pytest -s --timeout=7200 \
	    tests/integration/gateway/test_chaos.py tests/e2e/test_differential.py

.PHONY: check
check: setup ## Check format, lint, types, import rules, and the protos with their stubs
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright
	.venv/bin/lint-imports
	.venv/bin/buf lint protos
	.venv/bin/hadolint deploy/docker/Dockerfile
	.venv/bin/python -m deploy.kubernetes.check
	@stubs=$$(mktemp -d); trap 'rm -rf "$$stubs"' EXIT; \
	PATH=$$PWD/.venv/bin:$$PATH .venv/bin/python protos/generate.py "$$stubs"; \
	for generated in "$$stubs"/manylora/*; do \
	    diff -r -x __pycache__ "$$generated" "packages/protos/src/manylora/$${generated##*/}" \
	    || { echo "the stubs differ from the protos: run 'make protos'" >&2; exit 1; }; \
	done

.PHONY: format
format: setup ## Format the code and mend what the linter can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.PHONY: protos
protos: setup ## Generate the stubs from the protos
	PATH=$$PWD/.venv/bin:$$PATH .venv/bin/python protos/generate.py

.PHONY: settings
settings: setup ## Write docs/settings.md from the code
	.venv/bin/python -m docs.settings

.PHONY: bench
bench: setup $(BASE)/manylora-base.json ## Run one benchmark, e.g. make bench NAME=lora_cpu
	PYTHONPATH=. $(RUN)/python benchmarks/$(NAME).py

.PHONY: requirements
requirements: setup ## Write what the images install, with hashes, from the workspace
	for extra in cpu gpu; do \
	    $(UV) export --quiet --no-dev --extra $$extra --no-emit-workspace --no-annotate --no-header \
	        --output-file deploy/docker/requirements-$$extra.txt; \
	done
	echo uv==$(UV_VERSION) | $(UV) pip compile --quiet --generate-hashes --no-annotate --no-header \
	    --no-emit-index-url --output-file deploy/docker/requirements-build.txt -

IMAGE ?= manylora
.PHONY: images
images: requirements ## Build the images IMAGE:cpu and IMAGE:gpu with docker
	for extra in cpu gpu; do \
	    docker build -f deploy/docker/Dockerfile --build-arg EXTRA=$$extra -t $(IMAGE):$$extra .; \
	done

.PHONY: clean
clean: ## Remove what the commands made (not .venv)
	rm -rf bases runs registry reports .pytest_cache .ruff_cache .hypothesis .import_linter_cache
