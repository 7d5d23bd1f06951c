"""Switches of a blend's phases inside one run: exact integer arithmetic, no torch.

Rule: a position in tokens becomes a step by rounding `tokens / (seq_length * global_batch_size)` to the nearest whole
step (halves go up). The same rule gives the run's number of steps, and every switch is computed from the run's
**tokens**, not from its rounded steps. With 8192 * 768 tokens a step this gives the iterations that follow from the
paper's plans (paper 2.2.3, 2.4): 15 T tokens, switches at 60 %, 80 % and the last 380 B tokens -> 2,384,186 steps,
switches at 1,430,511 / 1,907,349 / 2,323,786; 20 T -> 3,178,914 and 1,907,349 / 2,543,132 / 3,118,515.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import Phase, Until


@dataclass(frozen=True)
class Horizon:
    """The length of a run.

    Args:
        tokens: of the whole run.
        tokens_per_step: `seq_length * global_batch_size`.
    """

    tokens: int
    tokens_per_step: int

    @classmethod
    def from_steps(cls, steps: int, tokens_per_step: int) -> Horizon:
        """Return a run of exactly `steps` steps."""
        return cls(steps * tokens_per_step, tokens_per_step)

    def step_at(self, tokens: int | Fraction) -> int:
        """Return the whole step nearest to a position in tokens; halves go up."""
        return int((tokens / Fraction(self.tokens_per_step) + Fraction(1, 2)) // 1)

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.step_at(self.tokens)


@dataclass(frozen=True)
class PhaseSpan:
    """Phase number `index` is trained in steps `first_step <= step < end_step` (steps count from 0)."""

    index: int
    name: str
    first_step: int
    end_step: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.end_step - self.first_step


def phase_end(until: Until, horizon: Horizon) -> Fraction:
    """Return the position in tokens where a phase ends. A fraction counts as the decimal it was written as."""
    if until.fraction is not None:
        return Fraction(str(until.fraction)) * horizon.tokens
    if until.tokens is not None:
        return Fraction(parse_count(until.tokens))
    return Fraction(horizon.tokens - parse_count(until.last_tokens))


def phase_spans(phases: Sequence[Phase], horizon: Horizon) -> list[PhaseSpan]:
    """Return the steps of every phase; together they cover the run once, without gaps.

    Errors:
        UserError: when the run has no step, or a phase would be empty or end outside of the run: its switch does not
            come after the one before and before the end.
    """
    if horizon.steps < 1:
        raise UserError(f"the run has {horizon.tokens:,} tokens, less than a step of {horizon.tokens_per_step:,}")
    ends = [horizon.step_at(phase_end(phase.until, horizon)) for phase in phases[:-1] if phase.until is not None]
    ends.append(horizon.steps)
    spans = []
    for index, (phase, first, end) in enumerate(zip(phases, [0, *ends[:-1]], ends, strict=True)):
        if not first < end <= horizon.steps:
            raise UserError(
                f"phase {phase.name!r} of the blend would run from step {first:,} to step {end:,} of a run of "
                f"{horizon.steps:,} steps ({horizon.tokens:,} tokens)",
                "Make the run longer, or change `until` of the blend's phases; a phase needs one step or more.",
            )
        spans.append(PhaseSpan(index, phase.name, first, end))
    return spans
