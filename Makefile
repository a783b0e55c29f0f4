# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test lint types check soak bench bench-train reference pins

help:  ## Show what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## Install metier and everything its tests need into .venv.

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"$(PYTHON) is Python {v.major}.{v.minor}; metier needs 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[rag,dev]'
	@touch $@

demo: $(READY)  ## Run the whole loop on real built-in data: no network, no accelerator.
	$(BIN)/metier demo

# One thread per worker: two test processes with two threads each would only fight for the cores.
test: $(READY)  ## Run every test.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(READY)  ## Check style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## Check types.
	$(BIN)/mypy

check: lint types test  ## Everything a change must pass.

soak: $(READY)  ## Kill trainings 200 times; they must end as if nobody had (minutes).
	$(BIN)/python benchmarks/soak.py

bench: $(READY)  ## Measure again what the documentation claims (hours; needs the data sets).
	set -e; for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script; done

bench-train: $(READY)  ## Measure training side by side with other libraries (hours; see benchmarks/README.md).
	$(BIN)/python benchmarks/train.py

reference: $(READY)  ## Write docs/reference.md from the code.
	$(BIN)/python docs/write_reference.py

pins: $(READY)  ## Write constraints.txt from what is installed in .venv.
	{ head -n 2 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
