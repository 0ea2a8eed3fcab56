"""Units of bytes: binary ones as tools show them, decimal ones as vendors count. Torch-free."""

__all__ = ["GB", "GIB", "KB", "MB", "MIB"]

KB, MB, GB = 10**3, 10**6, 10**9
MIB, GIB = 2**20, 2**30
