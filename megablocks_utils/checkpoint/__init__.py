"""Where weights come from and go to: safetensors folders, Hub naming, checkpoints of a run."""
