# `make demo` and `make test` do all their own set-up; nothing but a package registry is reached.
PYTHON ?= python3
# The torch to install first. On a machine without a GPU, give a CPU build here to save gigabytes.
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?=

.PHONY: venv demo test exhaustive check bench clean

venv: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/fedaug simulate $(if $(OUT),--out $(OUT))

test: venv
	$(BIN)/python -m pytest

# Minutes of trying everything: each bit of a ledger flipped, an owner killed 500 times.
exhaustive: venv
	$(BIN)/python -m pytest -m exhaustive

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m benchmarks.ingest
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.dpsgd
	$(BIN)/python -m benchmarks.ledger
	$(BIN)/python -m benchmarks.synthesis
	$(BIN)/python -m benchmarks.floors

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
