"""Quantities as people write them: durations, bytes, and token counts such as `15T`."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from fractions import Fraction

from nemotron_h.core.errors import UserError


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def rough(seconds: float) -> str:
    """Return hours, minutes and seconds, or days where it is more than two."""
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)


def brief(seconds: float) -> str:
    """Return seconds with as many digits as matter where they are few, else as `rough`."""
    return f"{seconds:.2g} s" if seconds < 100 else rough(seconds)


def seconds_of(duration: str, where: str = "") -> int:
    """Return the seconds of `HH:MM:SS` or `D-HH:MM:SS`.

    Args:
        duration: as it was written.
        where: what stands before the duration in an error, such as `my.yaml: time: `.
    Errors:
        UserError: another form, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,3}):([0-5]\d):([0-5]\d)", str(duration).strip(), re.ASCII)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        problem = "no time" if found else "not a duration"
        raise UserError(f"{where}{str(duration)[:40]!r} is {problem}", hint="write HH:MM:SS or D-HH:MM:SS")
    return total


GIB = 2**30
#: bytes per value: FP4 has one 8-bit scale per 16 values (4.5 bits), which makes the paper's 29.5 GiB of the 56B
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}


def gib(size: float) -> str:
    """Return bytes as GiB, or MiB where small."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SHORT = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_COUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?)\s*([KMBT]?)", re.IGNORECASE)
#: ours: more tokens than there is text, and less than 64 bits
_MOST_TOKENS = 10**18


def parse_count(value: int | float | str) -> int:
    """Return a token count from `15T`, `380B`, `5M`, `8k` or a plain number (decimal units: T = 1e12).

    Errors:
        ValueError: when `value` is none of these, is not positive, is above 10^18, or is not a whole number of tokens.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a token count")
    match = _COUNT.fullmatch(str(value).strip().replace("_", ""))
    count = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    if isinstance(value, int | float):
        count = float(value)
    if not (0 < count <= _MOST_TOKENS and abs(count - round(count)) <= 1e-9 * count):
        shown = repr(value) if len(str(value)) <= 40 else f"{str(value)[:40]}..."
        raise ValueError(f"{shown} is not a token count: write for instance 15T, 380B, 5M or 250000")
    return round(count)


def count_of(value: str, key: str, origin: str) -> int:
    """Return the token count of a recipe's key, as `parse_count` reads it.

    Errors:
        UserError: it is none; names the recipe and the key.
    """
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{origin}: {key}: {error}") from error


def short_count(count: float | Fraction) -> str:
    """Return a count in the unit that fits, with four significant digits: `14.62T`, `380B`, `983k`."""
    for size, unit in _SHORT:
        if count >= size * 0.99995:
            return f"{float(count / size):.4g}{unit}"
    return f"{float(count):.4g}"
