"""How figures are written for people."""

from __future__ import annotations

from collections.abc import Sequence

_BYTE_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def human_bytes(value: float) -> str:
    """Bytes in three digits: 12.3 MiB."""
    for unit, size in _BYTE_UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def three_digits(value: float) -> str:
    """A number of one to three digits before the point, with three digits in all."""
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal; the first to the left.

    Args:
        rows: of equal length, the header first.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
