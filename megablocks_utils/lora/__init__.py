"""Low-rank adapters: which modules get them, and their files."""
