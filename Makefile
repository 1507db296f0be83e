# One command each; every target sets up what it needs in .venv first.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: setup demo test check package lint types bench clean

setup: .venv/.dev

.venv/.demo: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

.venv/.dev: .venv/.demo
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# Needs what fastguard runs on, and matplotlib.
demo: .venv/.demo
	$(BIN)/fastguard demo --out demo

# The library's core (bench/ is in `make check`): at most 5 minutes on 2 cores.
test: setup
	$(PYTEST) -m "not slow" --ignore=tests/bench

# Everything, at most 20 minutes on 2 cores, and the distributions with their metadata.
check: setup package
	$(PYTEST)

package: setup
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Ratios by turns: five and a half minutes of one core, compiling included.
bench: setup
	mkdir -p build
	rm -f build/bench.json
	code=0; \
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json || code=$$?; \
	$(BIN)/python -m bench.ratios build/bench.json || exit $$((code ? code : 1)); \
	exit $$code

clean:
	rm -rf .venv build dist *.egg-info
