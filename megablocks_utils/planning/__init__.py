"""What a run will need, before it is started: memory, traffic, rank order; formulas, no torch."""
