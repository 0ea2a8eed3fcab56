"""Bytes in words: GiB as tools show them, GB as vendors and the published table count them."""

from dataclasses import dataclass

from megablocks_utils.byte_units import GB, GIB, KB, MB, MIB

__all__ = ["Unit", "choose_unit", "format_count", "format_gb"]

_SMALL = ((MB, "MB"), (KB, "kB"))


def format_gb(number: float) -> str:
    """Write bytes as decimal GB with one digit after the point; below 1 GB, as MB or kB."""
    if abs(number) >= 0.95 * GB or number == 0:
        return f"{number / GB:.1f} GB"
    for size, unit in _SMALL:
        if abs(number) >= size:
            return f"{number / size:.{1 if abs(number) < 100 * size else 0}f} {unit}"
    return f"{number:.0f} B"


@dataclass(frozen=True)
class Unit:
    """What the bytes of a table are counted in.

    Attributes:
        binary: name of the binary unit.
        binary_size: its bytes.
        decimal: name of the decimal one.
        decimal_size: its bytes.
    """

    binary: str
    binary_size: int
    decimal: str
    decimal_size: int

    def format_binary(self, number: float) -> str:
        """Write bytes in the binary unit, without its name."""
        size = number / self.binary_size
        if abs(size) >= 0.95:
            return f"{size:.1f}"
        if number == 0:
            return "0"
        return f"{size:.2f}" if abs(size) >= 0.005 else "~0"

    def format_decimal(self, number: float) -> str:
        """Write bytes in the decimal unit, without its name."""
        return f"{number / self.decimal_size:.1f}"


def choose_unit(number: float) -> Unit:
    """Return GiB and GB, or MiB and MB where `number` bytes, the largest of a table, are few."""
    if number < GIB // 2:
        return Unit("MiB", MIB, "MB", MB)
    return Unit("GiB", GIB, "GB", GB)


def format_count(number: int) -> str:
    """Write a count of parameters in billions or millions."""
    return f"{number / GB:.1f} B" if number >= GB // 2 else f"{number / 10**6:.1f} M"
