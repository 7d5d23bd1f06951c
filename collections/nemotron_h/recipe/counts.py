"""Counts of a recipe: tokens, written as text."""

from __future__ import annotations

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import parse_count


def count_of(value: str, key: str, origin: str) -> int:
    """Parse a token count such as 15T."""
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{origin}: {key}: {error}") from error
