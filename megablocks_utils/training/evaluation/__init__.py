"""Held-out examples, measured and answered by the model as it is sharded."""
