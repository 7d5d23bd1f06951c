"""Steps, phase switches, time and GPU-hours of a run. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Phase
from nemotron_h.data.phases import Horizon, PhaseSpan, phase_spans

#: model FLOPs utilisation that a plan assumes where `--mfu` gives none, with where it was reached
DEFAULT_MFU = {
    "bf16": (0.39, "torchtitan, Llama-3-8B on 8 H100 in BF16 with torch.compile: 33 to 39 %"),
    "fp8": (0.355, "the published Nemotron-H-56B FP8 run on 128 H100 (dgxc-benchmarking 25.08), FLOPs counted exactly"),
}


def default_mfu(precision: str) -> tuple[float, str]:
    """Return the assumed utilisation of the peak rate of a recipe's precision, and its source."""
    return DEFAULT_MFU["fp8" if precision.startswith("fp8") else "bf16"]


@dataclass(frozen=True)
class Schedule:
    """Duration of a run.

    Attributes:
        tokens, steps, warmup_steps: of the run.
        phases: the blend's phases, in steps.
        tokens_per_second: of all GPUs.
        gpus: how many.
        checkpoints: written over the run.
        start: its date, or None.
    """

    tokens: int
    steps: int
    warmup_steps: int
    phases: list[PhaseSpan]
    tokens_per_second: float
    gpus: int
    checkpoints: int
    start: datetime | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds of training alone, without starts, validation and failures."""
        return self.tokens / self.tokens_per_second

    @property
    def step_seconds(self) -> float:
        """Return the seconds of one step."""
        return self.seconds / self.steps

    @property
    def gpu_hours(self) -> float:
        """Return the GPU-hours of the whole run."""
        return self.seconds / 3600 * self.gpus

    def date(self, step: int) -> datetime | None:
        """Return the date when a step begins; None without a start."""
        return None if self.start is None else self.start + timedelta(seconds=step * self.step_seconds)


def plan_schedule(
    tokens: int,
    tokens_per_step: int,
    warmup_tokens: int,
    phases: Sequence[Phase],
    tokens_per_second: float,
    gpus: int,
    checkpoint_every: int,
    start: datetime | None = None,
) -> Schedule:
    """Return the schedule of a run.

    Args:
        tokens, tokens_per_step, warmup_tokens: as in the recipe.
        phases: of the blend.
        tokens_per_second: of all GPUs together.
        gpus: how many.
        checkpoint_every: steps between checkpoints; the last step writes one too.
        start: when step 0 begins.
    Errors:
        UserError: a phase does not fit into the run, or the run ends after the calendar does.
    """
    horizon = Horizon(tokens, tokens_per_step)
    schedule = Schedule(
        tokens=tokens,
        steps=horizon.steps,
        warmup_steps=horizon.step_at(warmup_tokens),
        phases=phase_spans(phases, horizon),
        tokens_per_second=tokens_per_second,
        gpus=gpus,
        checkpoints=math.ceil(horizon.steps / checkpoint_every),
        start=start,
    )
    try:
        schedule.date(schedule.steps)
    except OverflowError as error:
        days = schedule.seconds / 86400
        raise UserError(f"--start: the run takes {days:,.0f} days, and dates end with the year 9999") from error
    return schedule
