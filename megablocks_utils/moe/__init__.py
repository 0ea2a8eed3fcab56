"""The dropless MoE layer in plain PyTorch.

Legend of every shape in this package: T tokens on this rank, H hidden size, I intermediate size,
E experts of the layer, L experts on this rank (E / ep_size), K experts per token (top-k),
N = T * K routed rows, R rows received from the ep group.
"""
