# Every target does its own set-up. A second run finds it done.

PYTHON ?= python3
DATA ?= digits
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
WHEEL_TEST := build/wheel-test

.DELETE_ON_ERROR:
.PHONY: help setup demo test lint types format bench notebooks docs docs-serve wheel-test

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## Create .venv with the package, the baselines and the developers' tools
	@echo '.venv is ready'

# torch goes first: constraints.txt names the build, and nothing installed after it may ask for another. curvlinops goes
# last, alone: backpack asks for torchvision, and so for another torch, though nothing that is used here imports it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("apo needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) -e '.[baselines,tutorials,docs,dev]'
	$(BIN)/python $(PIP_INSTALL) --no-deps curvlinops-for-pytorch backpack-for-pytorch
	@touch $@

demo: $(READY)  ## Tune three far-off learning rates; DATA=digits or fashion-mnist
	$(BIN)/python -m baselines demo --data $(DATA)

# One process a core, one thread a process: the tests' tensors are small, and threads only get in each other's way. A file
# stays in one process, as its tests share what is costly to make.
test: $(READY)  ## Run the tests; PYTEST_ARGS='-k rules -x' narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(READY)  ## Check the code with ruff, and its format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## Check the types with mypy
	$(BIN)/mypy $(wildcard apo baselines benchmarks docs/site)

format: $(READY)  ## Format the code, apply ruff's safe fixes, and follow the lines that docs/concepts.md quotes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/python -m tests.concepts

bench: $(READY)  ## Measure what a training step costs, beside the peers; BENCH_ARGS='mlp --rounds 3' narrows it
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(BENCH_ARGS)

notebooks: $(READY)  ## Run the tutorials and store them as notebooks with their outputs (about 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/execute.py

# mkdocs-material advertises its successor unless it is told not to.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)  ## Build the documentation into build/site; a link that leads nowhere is an error
	$(BIN)/python -m mkdocs build

docs-serve: $(READY)  ## Show the documentation at http://127.0.0.1:8000 and follow changes
	$(BIN)/python -m mkdocs serve

wheel-test: $(READY)  ## Build the wheel and run the README's program from it in a clean environment
	rm -rf $(WHEEL_TEST)
	mkdir -p $(WHEEL_TEST)
	awk '/^```/ && inside { exit } inside; /^```python/ { inside = 1 }' README.md > $(WHEEL_TEST)/program.py
	@test -s $(WHEEL_TEST)/program.py || { echo 'README.md has no ```python block to run' >&2; exit 1; }
	$(BIN)/python -m build --outdir $(WHEEL_TEST) .
	$(BIN)/python -c 'import sys, zipfile; names = zipfile.ZipFile(sys.argv[1]).namelist(); \
		others = [n for n in names if not n.startswith(("apo/", "apo-"))]; \
		sys.exit(f"the wheel holds more than apo: {others}" if others else "the wheel lacks apo/py.typed" if "apo/py.typed" not in names else 0)' \
		$(WHEEL_TEST)/apo-*.whl
	$(PYTHON) -m venv $(WHEEL_TEST)/venv
	$(WHEEL_TEST)/venv/bin/python $(PIP_INSTALL) torch
	$(WHEEL_TEST)/venv/bin/python $(PIP_INSTALL) $(WHEEL_TEST)/apo-*.whl
	cd $(WHEEL_TEST) && venv/bin/python -I program.py
	rm -rf $(WHEEL_TEST)
