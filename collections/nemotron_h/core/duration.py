"""Durations as text: as Slurm writes them, and to read."""

from __future__ import annotations

import re
from datetime import timedelta

from nemotron_h.core.errors import UserError


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def rough(seconds: float) -> str:
    """Return hours, minutes and seconds, or days where it is more than two."""
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)


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
