"""Every family of transformers' registry, trained for a step and compared with stock."""
