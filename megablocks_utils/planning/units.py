"""Bytes in words: GiB as tools show them, GB as vendors and the published table count them."""

__all__ = ["GB", "GIB", "format_gb", "format_gib"]

GB, GIB = 10**9, 1024**3


def format_gb(number: int) -> str:
    """Write bytes as decimal GB: one digit after the point, more below 1 GB."""
    return f"{_write(number / GB)} GB"


def format_gib(number: int) -> str:
    """Write bytes as GiB, without the unit: for a column that names it."""
    return _write(number / GIB)


def _write(number: float) -> str:
    if abs(number) >= 0.95 or number == 0:
        return f"{number:.1f}"
    return f"{number:.2f}" if abs(number) >= 0.005 else f"{number:.4f}"
