"""Where weights come from and go to: safetensors folders, names on the Hub, checkpoints."""
