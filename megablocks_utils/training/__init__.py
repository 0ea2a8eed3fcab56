"""Training: data, steps, both loops, and what a run shows and leaves behind."""
