"""Where weights come from and go to: safetensors folders, their layouts, load and export."""
