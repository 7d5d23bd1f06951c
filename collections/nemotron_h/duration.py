"""Durations as Slurm writes them."""

from __future__ import annotations

import re

from nemotron_h.errors import UserError


def seconds_of(duration: str) -> int:
    """Seconds of `HH:MM:SS` or `D-HH:MM:SS`.

    Errors:
        UserError: another form.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", str(duration).strip())
    if not found:
        raise UserError(f"{duration!r} is not a duration", hint="write HH:MM:SS or D-HH:MM:SS, in quotes")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
