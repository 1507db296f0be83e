"""Training, tuning and evaluation of the embedded model that `fastguard.testbed` loads: `python -m bench.testbed --help`."""
