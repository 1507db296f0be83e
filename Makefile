# One command each; every target sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint types bench clean

setup: .venv/.ready

.venv/.ready: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/fastguard demo --out demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	mkdir -p build
	rm -f build/bench.json
	code=0; \
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json || code=$$?; \
	$(BIN)/python -m bench.ratios build/bench.json || exit $$((code ? code : 1)); \
	exit $$code

clean:
	rm -rf .venv build dist *.egg-info
