"""The parts of the benchmark table: rows, runs, predictions, report."""
