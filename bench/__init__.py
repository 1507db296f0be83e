"""Benchmarks. Run from the repository root: `python -m bench.<name>`, or pytest-benchmark suites through `make bench`."""
