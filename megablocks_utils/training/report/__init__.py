"""What a run shows and measures: metrics, progress, summaries, loss curve, run.json."""
