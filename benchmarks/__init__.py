"""Measurements: this program beside others on the same work. `python -m benchmarks NAME`."""
