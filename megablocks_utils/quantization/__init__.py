"""Frozen weights of experts in 4 or 8 bits: formats, packed tensors, and their use."""
