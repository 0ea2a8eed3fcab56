"""Where weights come from and where they go: safetensors folders, their layouts, load and export."""
