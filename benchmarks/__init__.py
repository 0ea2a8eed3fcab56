"""Measurements with their provenance; run as `PYTHONPATH=. python -m benchmarks.NAME`."""
