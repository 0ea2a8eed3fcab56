"""Measurements with birth certificates; run as `PYTHONPATH=. python -m benchmarks.NAME`."""
