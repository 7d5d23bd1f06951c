"""The relative loss gap of runs that read the same batches: losses from their TensorBoard events, and arithmetic."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron_h.core.errors import UserError

TRAIN, VALIDATION = "reduced_train_loss", "val_loss"


@dataclass(frozen=True)
class Losses:
    """Step -> loss, steps from 1; a validation loss stands at the last step before it.

    Attributes:
        missing: steps without a training loss: a process that was killed had written a checkpoint, not yet the loss.
    """

    train: dict[int, float]
    validation: dict[int, float]
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A relative loss gap over tokens.

    Attributes:
        tokens: trained on, at each point.
        gap: of the second run to the first, (first - second) / first; negative where the second's loss is larger.
    """

    tokens: np.ndarray
    gap: np.ndarray

    def summary(self) -> dict[str, float]:
        """Return the last gap and the largest by magnitude, each with where it is."""
        at = int(np.abs(self.gap).argmax())
        return {
            "last": float(self.gap[-1]),
            "last_at_tokens": int(self.tokens[-1]),
            "largest": float(self.gap[at]),
            "largest_at_tokens": int(self.tokens[at]),
        }

    def as_dict(self) -> dict[str, list]:
        """Return the curve as plain lists."""
        return {"tokens": self.tokens.tolist(), "gap": self.gap.tolist()}


def read_events(folder: Path) -> Losses:
    """Return the losses of a run's TensorBoard events, of all of its processes; of a step that several of them trained,
    the last. Both are empty where there are no events.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[float, int, float]]] = {TRAIN: [], VALIDATION: []}  # time, step, loss
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0 keeps all
        events.Reload()
        tags = events.Tags()["scalars"]
        train = [(e.wall_time, e.step + 1, e.value) for e in events.Scalars(TRAIN)] if TRAIN in tags else []
        found[TRAIN] += train
        times = [time for time, _, _ in train]
        for event in events.Scalars(VALIDATION) if VALIDATION in tags else []:
            # Lightning's own step of a validation is wrong after a resume
            before = bisect.bisect_right(times, event.wall_time)
            if before:
                found[VALIDATION].append((event.wall_time, train[before - 1][1], event.value))
    by_step = {tag: {step: loss for _, step, loss in sorted(events)} for tag, events in found.items()}
    return Losses(*(dict(sorted(by_step[tag].items())) for tag in (TRAIN, VALIDATION)))


def read_losses(folder: Path, steps: int) -> Losses:
    """Return the losses of a run, as `read_events` does, up to its last step.

    Args:
        folder: of the run.
        steps: that it has.
    Errors:
        UserError: the last step is missing, or more than one step and 1 % of all.
    """
    read = read_events(folder)
    missing = tuple(step for step in range(1, steps + 1) if step not in read.train)
    if missing and (missing[-1] == steps or len(missing) > max(1, steps // 100)):
        raise UserError(
            f"the events in {folder} lack the loss of {len(missing)} of {steps} steps, from step {missing[0]}",
            hint="remove that folder to train it again",
        )
    train, validation = (
        {step: loss for step, loss in losses.items() if step <= steps} for losses in (read.train, read.validation)
    )
    return Losses(train, validation, missing)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values, from the first that has so many on: [n - window + 1] of [n].

    A NaN is left out; where all of a window are, the mean is NaN too.
    """
    known, ones = ~np.isnan(values), np.ones(window)
    counts = np.convolve(known, ones, mode="valid").round()
    sums = np.convolve(np.where(known, values, 0), ones, mode="valid")
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def relative_gap(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return (reference - other) / reference: (BF16 - FP8) / BF16 of the paper's figure 5."""
    return (reference - other) / reference


def train_curve(reference: Losses, other: Losses, tokens_per_step: int, window: int) -> Curve:
    """Return the gap of the training losses, each smoothed over `window` steps, at the window's end. A step that one of
    the two lacks is left out of both.
    """
    steps = range(1, max(reference.train) + 1)
    both = reference.train.keys() & other.train.keys()
    first, second = (
        smoothed(np.array([run.train[step] if step in both else np.nan for step in steps]), window)
        for run in (reference, other)
    )
    known = ~np.isnan(first)
    tokens = (np.arange(len(first)) + window) * tokens_per_step
    return Curve(tokens[known], relative_gap(first, second)[known])


def validation_curve(reference: Losses, other: Losses, tokens_per_step: int) -> Curve | None:
    """Return the gap of the validation losses; None where there are none."""
    steps = sorted(reference.validation.keys() & other.validation.keys())
    if not steps:
        return None
    first, second = (np.array([run.validation[step] for step in steps]) for run in (reference, other))
    return Curve(np.array(steps) * tokens_per_step, relative_gap(first, second))
