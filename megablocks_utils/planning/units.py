"""Bytes in words: GiB as tools show them, GB as vendors and the published table count them."""

__all__ = ["GB", "GIB", "format_gb", "format_gib"]

GB, GIB = 10**9, 1024**3
_SMALL = ((10**6, "MB"), (10**3, "kB"))


def format_gb(number: float) -> str:
    """Write bytes as decimal GB with one digit after the point; below 1 GB, as MB or kB."""
    if abs(number) >= 0.95 * GB or number == 0:
        return f"{number / GB:.1f} GB"
    for size, unit in _SMALL:
        if abs(number) >= size:
            return f"{number / size:.{1 if abs(number) < 100 * size else 0}f} {unit}"
    return f"{number:.0f} B"


def format_gib(number: float) -> str:
    """Write bytes as GiB without the unit, for a column that names it."""
    size = number / GIB
    if abs(size) >= 0.95:
        return f"{size:.1f}"
    if number == 0:
        return "0"
    return f"{size:.2f}" if abs(size) >= 0.005 else "~0"
