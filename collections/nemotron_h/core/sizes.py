"""Sizes in bytes, of a value in each dtype and as text, and counts as text."""

from __future__ import annotations

from fractions import Fraction

GIB = 2**30
#: bytes per value: FP4 has one 8-bit scale per 16 values (4.5 bits), which makes the paper's 29.5 GiB of the 56B
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def gib(size: float) -> str:
    """Return bytes as GiB, or MiB where small."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def short_count(count: float | Fraction) -> str:
    """Return a count in the unit that fits, with four significant digits: `14.62T`, `380B`, `983k`."""
    for size, unit in _UNITS:
        if count >= size * 0.99995:
            return f"{float(count / size):.4g}{unit}"
    return f"{float(count):.4g}"
