"""Rehearse a training step: the real code path on one rank, without peers or weights."""
