"""Which layout is fastest: traffic by link, step cost, ranking, calibration."""
