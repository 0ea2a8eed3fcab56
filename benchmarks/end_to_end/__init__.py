"""A training step: ours against transformers' own expert parallelism."""
