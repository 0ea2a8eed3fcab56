"""The processes of a run: environment, agreement, start, liveness, stopping, output folder."""
