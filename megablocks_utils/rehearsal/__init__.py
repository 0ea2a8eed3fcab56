"""Rehearse a training step: the real code path with one real rank, imaginary peers, no weights."""
