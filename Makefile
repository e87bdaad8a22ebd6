# `make reproduce` and `make test`: each sets up a virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread a process: on small problems several times faster than two processes of two threads.
export OMP_NUM_THREADS ?= 1

.PHONY: reproduce test lint unit slow fuzz faults clean

reproduce: $(READY)
	$(BIN)/thalweg reproduce

test: lint unit

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/pyright

unit: $(READY)
	$(BIN)/python -m pytest -n 2

slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

# Ten minutes for each reader; `make fuzz SECONDS_EACH=60` for less.
SECONDS_EACH ?= 600
fuzz: $(READY)
	THALWEG_FUZZ_SECONDS=$(SECONDS_EACH) $(BIN)/python -m pytest -n 2 -m slow --timeout 0 tests/test_fuzzing.py

# Every fault of the table in docs/reliability.md, which this writes; `make faults MINUTES=5` for less.
MINUTES ?= 60
faults: $(READY)
	$(BIN)/python -m benchmarks.reliability --minutes $(MINUTES) --page docs/reliability.md

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
