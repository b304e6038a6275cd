# PYTHON chooses the interpreter; the tools are taken from beside it.
PYTHON ?= python3
export PATH := $(dir $(shell command -v $(PYTHON))):$(PATH)

# A process for every core; one that has nothing left takes half of another's tests.
PARALLEL = -n auto --dist worksteal
SHARD = 1/1
KERNEL_SOURCES = $(shell find kernels_cu -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.PHONY: help check quick lint test compile-all fuzz bench docs gpu dist format

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

check: lint quick  ## lint and the quick tests: before every commit

quick:  ## the quick tests
	$(PYTHON) -m pytest $(PARALLEL) -q -m "not slow and not gpu"

lint:  ## formatting, ruff, mypy, clang-format (pip install -e '.[dev]')
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror $(KERNEL_SOURCES)

test:  ## every test that this machine can run
	$(PYTHON) -m pytest $(PARALLEL)

compile-all:  ## every kernel for every architecture, with the checks of tests/compile; needs NVRTC, no GPU (SHARD=1/8)
	$(PYTHON) -m tests.compile.all --shard $(SHARD)

fuzz:  ## the property tests with many examples
	HYPOTHESIS_PROFILE=nightly $(PYTHON) -m pytest $(PARALLEL) tests/fuzz

bench:  ## the benchmark on the CPU (pip install -e '.[bench]'); that on a GPU is part of `make gpu`
	$(PYTHON) benchmarks/bench_cpu.py

docs:  ## the documentation as a site, build/site/index.html (pip install -e '.[docs]')
	$(PYTHON) -m mkdocs build --strict

gpu:  ## record, test, check and measure on a GPU, in about 9 minutes
	$(PYTHON) -m tests.gpu.run

dist:  ## source archive and wheel in dist/, checked, and tried outside of the tree (pip install -e '.[dev]')
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) -m tests.dist dist/*.whl

format:  ## rewrite the files as the formatters want them
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	clang-format -i $(KERNEL_SOURCES)
