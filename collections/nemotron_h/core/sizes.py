"""Sizes in bytes: of a value in each dtype, and as text."""

from __future__ import annotations

GIB = 2**30
#: bytes per value: FP4 has one 8-bit scale per 16 values (4.5 bits), which makes the paper's 29.5 GiB of the 56B
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}


def gib(size: float) -> str:
    """Return bytes as GiB, or MiB where small."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
