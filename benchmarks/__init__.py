"""Measurements, each with its birth certificate; run as `PYTHONPATH=. python -m benchmarks.NAME`."""
