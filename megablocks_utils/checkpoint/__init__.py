"""Where weights come from and go to: safetensors folders, naming on the Hub, checkpoints of a run."""
