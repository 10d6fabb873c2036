# Every target makes its own .venv first; nothing else has to be set up.
#   make install PYTHON=python3.12   picks the interpreter (3.11 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# deepspeed is built from source and imports torch while it builds, so these come first. Nothing is
# compiled then, yet its set-up probes the accelerator and wants nvcc where there is a GPU:
# DS_ACCELERATOR=cpu, for that command alone, makes it the same on every host.
BUILD_FIRST := $(shell grep -E '^(torch|setuptools|wheel|numpy|ninja)==' requirements.lock)
# In the order of tests/conftest.py, not that of how many tests are in a file.
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-large lint docs bench bench-gpu

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(STAMP)  ## make .venv with the exact versions of requirements.lock

$(STAMP): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: '$(PYTHON)' is missing or older than Python 3.11; say: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(BUILD_FIRST)
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

demo: $(STAMP)  ## the whole job on embedded real text: tokenizer, training on 2 processes, resume, export
	$(BIN)/v4 demo

test: $(STAMP)  ## the tests that a change usually breaks, file by file in two processes
	$(PYTEST) -m 'not slow and not large'

test-all: $(STAMP)  ## the rest of the suite, marked slow: four ranks, two hosts, kills, combinations
	$(PYTEST) -m 'slow and not large'

test-large: $(STAMP)  ## tests of up to 32 processes at once
	$(BIN)/python -m pytest tests -m large -s

lint: $(STAMP)  ## ruff, mypy, the import contracts, the Dockerfiles, and the links between pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile Dockerfile.cpu
	$(BIN)/md-dead-link-check --no-color

docs: $(STAMP)  ## the documentation as a site with search, in site/index.html
	$(BIN)/zensical build --strict
	@echo "look at it: $(BIN)/zensical serve"

bench: $(STAMP)  ## tokens per second and memory compared with transformers
	$(BIN)/python -m benchmarks.steps.vs_transformers
	$(BIN)/python -m benchmarks.steps.grid

bench-gpu: $(STAMP)  ## a GPU: kernels checked and timed, steps timed; SHORT=1 takes minutes
	$(BIN)/python -m benchmarks.gpu $(if $(SHORT),--short); code=$$?; \
	  [ $$code = 2 ] || $(BIN)/python docs/write_performance.py; exit $$code
