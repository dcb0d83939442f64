# make train | make test: each creates .venv, installs pinned requirements and builds what is missing.
#
#   make venv PYTHON=python3.12                                    another Python
#   make venv PIP_ARGS="--extra-index-url https://..."             where to find torch
#   make train ARGS="--full"                                       arguments of the example

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
CXX ?= c++
PIP_ARGS ?=
PYTEST_ARGS ?=
ARGS ?=
TRAIN_ARGS ?= $(ARGS)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(VENV)/.sources
PYTHON_DIRS := $(wildcard torchrec_cafe tests examples benchmarks torchx_components)
CXX_FILES = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
NATIVE := pyproject.toml CMakeLists.txt $(shell find csrc)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

FORCE:
.PHONY: FORCE train test check venv build lint format cpp-test cuda-compile pytest clean
.NOTPARALLEL:

# Options and data are checked in one process first: an error is one line, not a process group's traces.
train: $(BUILT)
	@python -m examples.dlrm.prepare $(TRAIN_ARGS)
	@torchx run -s local_cwd torchx_components/dlrm.py:train $(if $(TRAIN_ARGS),-- $(TRAIN_ARGS))

# pytest comes last, so that its summary is the last line.
test: lint cpp-test cuda-compile pytest
check: test

venv: $(INSTALLED)
build: $(BUILT)

# A compiler and Python are checked before anything is written; the stamp is written last.
$(INSTALLED): requirements-cpu.txt packaging/fbgemm-gpu-cpu-shim/pyproject.toml
	@command -v $(PYTHON) >/dev/null \
	  || { echo "error: $(PYTHON) not found: install Python 3.11 or later, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), but Python 3.11 or later is needed: set PYTHON=..." >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null \
	  || { echo "error: no C++ compiler: $(firstword $(CXX)) not found; install g++ 12 or later, or set CXX=..." >&2; exit 1; }
	@echo "Installing pinned requirements into $(VENV) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@rm -f $@ $(BUILT)
	@$(BIN)/python -m pip install -q $(PIP_ARGS) -r requirements-cpu.txt
	@touch $@

# An editable install knows the modules it was made with, so a new one calls for another.
$(SOURCES): $(INSTALLED) FORCE
	@find torchrec_cafe torchx_components -name '*.py' | LC_ALL=C sort >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(BUILT): $(INSTALLED) $(SOURCES) $(NATIVE)
	@command -v $(firstword $(CXX)) >/dev/null \
	  || { echo "error: no C++ compiler: $(firstword $(CXX)) not found; install g++ 12 or later, or set CXX=..." >&2; exit 1; }
	@echo "Building torchrec_cafe ..."
	@rm -f $@
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

lint: $(BUILT)
	@ruff check -q .
	@ruff format -q --check .
	@clang-format --dry-run -Werror $(CXX_FILES)
	@pyright | tail -n 40

cpp-test: $(INSTALLED)
	@cmake -G Ninja -S tests/csrc -B build/cpp-test --log-level=WARNING >/dev/null
	@ninja -C build/cpp-test --quiet
	@ctest --test-dir build/cpp-test --output-on-failure --no-tests=error | tail -n 40

# Compiles and links the CUDA sources as a check, even against a torch without CUDA; runs nothing.
cuda-compile: $(INSTALLED)
	@if ! command -v nvcc >/dev/null; then \
	  echo "cuda-compile: nvcc not found, CUDA sources not compiled"; \
	elif [ -z "$(wildcard csrc/cuda/*.cu)" ]; then \
	  echo "cuda-compile: no CUDA sources in csrc/cuda"; \
	else \
	  cmake -G Ninja -S . -B build/cuda-compile --log-level=WARNING \
	    -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DCAFE_CUDA=ON -DCAFE_CUDA_CHECK=ON '-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;100-real' >/dev/null && \
	  ninja -C build/cuda-compile --quiet cuda_kernels && \
	  echo "cuda-compile: CUDA sources compile and link for sm_80, sm_90, sm_100"; \
	fi

pytest: $(BUILT)
	@python -m pytest $(PYTEST_ARGS)

format: $(INSTALLED)
	@ruff check -q --fix-only .
	@ruff format -q .
	@clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist $(BUILT) .pytest_cache .ruff_cache .hypothesis
