"""Rows of a phase that are several short sequences in place of one long: what a blend says of them, and its checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest, number, within
from nemotron_h.schema.ranges import COUNT

SUM_TOLERANCE = 0.05
"""Weights that miss 100 by more than this (in percent points) must say `normalize: true`."""


@dataclass
class ShortRows:
    """Rows of `data.seq_length` tokens that are sequences of fewer, beside the long ones of a phase.

    Args:
        seq_length: tokens of a sequence; `data.seq_length` is a multiple of it. States, convolutions, attention and
            positions begin anew at each.
        share: of the phase's tokens that are in such rows, in (0, 1).
        weights: category -> weight, as those of the phase, which then are those of its long rows alone. Empty: the
            phase's.
        normalize: divide the weights by their sum.
    """

    seq_length: int = number(least=1, most=COUNT)
    share: float = number(above=0, below=1)
    weights: dict[str, float] = field(default_factory=dict, metadata=within(least=0, most=1e12))
    normalize: bool = False


class HasShortRows(Protocol):
    """A phase of a blend, as far as it is looked at here."""

    name: str
    short: ShortRows | None


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Return category -> share; shares sum to 1."""
    total = math.fsum(weights.values())
    return {category: weight / total for category, weight in weights.items()}


def weight_problems(
    key: str, weights: Mapping[str, float], normalize: bool, categories: Iterable[str]
) -> Iterator[str]:
    """Yield what is wrong with the weights of a phase, or of its short rows."""
    for category in weights:
        if category not in categories:
            yield f"{key}.{category}: no source has this category. {nearest(category, categories)}"
    total = math.fsum(weights.values())
    if not total > 0:
        yield f"{key}: sum to {total}"
    elif abs(total - 100) > SUM_TOLERANCE and not normalize:
        yield f"{key}: sum to {total:.6g}, not 100: correct them or add `normalize: true`"


def short_problems(key: str, short: ShortRows, categories: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with a phase's short rows, whatever the run."""
    if short.weights:
        yield from weight_problems(f"{key}.weights", short.weights, short.normalize, categories)
    elif short.normalize:
        yield f"{key}.normalize: unused: there are no weights of their own"


@functools.cache
def _fraction(share: float) -> tuple[int, int]:
    """Return the decimal that a share was written as, as numerator and denominator."""
    return Fraction(str(share)).as_integer_ratio()


def short_rows(rows: int, share: float) -> int:
    """Return how many of the first `rows` rows of a phase, whole steps of them, are short: exactly the share, less what
    is not a whole row.
    """
    numerator, denominator = _fraction(share)
    return rows * numerator // denominator


def check_short_rows(
    phases: Sequence[HasShortRows], rows: Sequence[int], seq_length: int, phase_order: str = "blend"
) -> None:
    """Check that the short rows of a blend's phases fit a run.

    Args:
        phases: of the blend.
        rows: that each of them has.
        seq_length: tokens of a row.
        phase_order: as `data.phase_order`.
    Errors:
        UserError: rows do not divide into sequences of the phase's length, the share is less than a row, or the order
            of the phases is random.
    """
    for index, phase in enumerate(phases):
        if phase.short is None:
            continue
        length, key = phase.short.seq_length, f"phases[{index}].short"
        if length >= seq_length or seq_length % length:
            fits = next((n for n in range(min(length, seq_length // 2), 0, -1) if seq_length % n == 0), None)
            raise UserError(
                f"{key}.seq_length = {length:,} of phase {phase.name!r}: data.seq_length = {seq_length:,} is not a "
                "multiple of it, twice or more",
                f"The nearest below is {fits:,}." if fits else "Raise data.seq_length.",
            )
        if not short_rows(rows[index], phase.short.share):
            raise UserError(
                f"{key}.share = {phase.short.share:g} of the {rows[index]:,} rows of phase {phase.name!r} is less than "
                "a row",
                "Raise it, make the run longer, or leave `short` out.",
            )
        if phase_order != "blend":
            raise UserError(
                f"data.phase_order = {phase_order}: {key} makes rows of phase {phase.name!r} shorter than others",
                "Leave data.phase_order out.",
            )
