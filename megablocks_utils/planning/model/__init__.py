"""What a plan is about: a model's shape from its config.json, GPUs, units, predictions."""
