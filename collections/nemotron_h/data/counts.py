"""Token counts as people write them: `15T`."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
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
