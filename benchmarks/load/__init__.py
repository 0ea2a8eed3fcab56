"""Loading a model: ours against transformers' own ways."""
