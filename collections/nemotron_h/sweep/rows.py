"""The rows of a sweep's table: what was planned of each point, and what its run's folder says."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nemotron_h.report.run import Run, read_run
from nemotron_h.sweep.file import SEED
from nemotron_h.sweep.points import Point, planned_row

Row = dict[str, Any]
#: ours: share of a run's last steps whose mean is its training loss
LAST = 0.05


def row_of(point: Point) -> Row:
    """Return the row of a point; of one that is not finished what was planned."""
    row = planned_row(point)
    if not point.is_finished():
        return {**row, "state": "not finished"}
    run = read_run(point.run.folder)
    train = train_loss(run)
    validation = run.validation.get(point.steps)  # of another step it says nothing about the finished model
    return {
        **row,
        "loss": validation if run.validation else train,
        "train_loss": train,
        "validation_loss": validation,
        "seconds": round(run.seconds, 1),
        "folder": str(point.run.folder),
        "state": "finished",
    }


def train_loss(run: Run) -> float:
    """Return the mean loss of a run's last steps."""
    losses = [step.loss for step in run.steps]
    return statistics.fmean(losses[-max(1, round(LAST * len(losses))) :]) if losses else math.nan


class Spread(NamedTuple):
    """Mean of some values, their sample standard deviation (NaN of one), and how many they are."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if self.count > 1 else "")


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean and spread of the values that are there; None where none is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known))


def groups(points: Sequence[Point], rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Return the labels and rows of each combination, over its seeds, in the order of the file."""
    by_labels: dict[tuple, tuple[dict[str, Any], list[Row]]] = {}
    for point, row in zip(points, rows, strict=True):
        labels = {axis: label for axis, label in point.labels.items() if axis != SEED}
        by_labels.setdefault(tuple(labels.items()), (labels, []))[1].append(row)
    return list(by_labels.values())
