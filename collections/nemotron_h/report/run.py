"""Read what a run has left in its folder: its record and the steps that it reported. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.checkpoint import folders
from nemotron_h.core import locks
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.core.paired import read_events
from nemotron_h.core.progress import STEPS, Step, read_steps

#: files of a report, in the run's folder
REPORT, PICTURE = "report.html", "loss.svg"


@dataclass(frozen=True)
class Phase:
    """Steps `first < step <= end` of a run, counted from 1, that read data in the same shares."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        record: `run.json`.
        steps: that count, ascending: a step that was trained again replaces the earlier one and those after it.
        validation: step -> validation loss.
        starts: step after which each process began, the first one's 0 among them.
        unreadable: numbers of lines of the steps' file that are none.
    """

    folder: Path
    record: dict[str, Any]
    steps: list[Step]
    validation: dict[int, float]
    starts: list[int]
    seconds: float
    unreadable: list[int]

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the resolved recipe."""
        return self.record["recipe"]

    @property
    def last(self) -> int:
        """Return the last step."""
        return max(self.record["step"], self.steps[-1].step if self.steps else 0)

    @property
    def max_steps(self) -> int:
        """Return the steps of the whole run."""
        return self.record["max_steps"]

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a step."""
        data = self.record["data"]
        return data["global_batch_size"] * data["seq_length"]

    @cached_property
    def state(self) -> tuple[str, str]:
        """Return `finished`, `running` or `stopped`, and why."""
        ended, who = self.record.get("ended"), locks.holder(self.folder)
        if ended is None and who is not None:
            return "running", f"Training in {who}; this is how far it is."
        if ended == "finished" or (ended is None and self.last >= self.max_steps):
            return "finished", ""
        return "stopped", ended or "No reason is recorded: it was killed, or trained with an earlier version."

    @property
    def tokens(self) -> np.ndarray:
        """Return the tokens at the end of each step."""
        return np.array([step.step for step in self.steps]) * float(self.tokens_per_step)

    def values(self, value: str | Callable[[Step], float]) -> np.ndarray:
        """Return a metric, or a value, of each step; NaN where it was not measured."""
        if isinstance(value, str):
            return np.array([step.metrics.get(value, math.nan) for step in self.steps], dtype=float)
        return np.array([value(step) for step in self.steps], dtype=float)

    def validated(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and values of a metric of the validations."""
        found = {s.validation_step: s.metrics[name] for s in self.steps if s.validation_step and name in s.metrics}
        return np.array(list(found)) * float(self.tokens_per_step), np.array(list(found.values()), dtype=float)

    @cached_property
    def phases(self) -> list[Phase]:
        """Return the phases that the run followed and has planned; none where its data has no phases."""
        order = self.record["data"].get("order") or {}
        plans = [*order.get("history", []), order]
        found = []
        for number, entry in enumerate(plans):
            begin = entry.get("origin", {}).get("step", 0)
            until = plans[number + 1]["origin"]["step"] if number + 1 < len(plans) else self.max_steps
            for phase in entry.get("plan", {}).get("phases", []):
                first, end = max(begin, phase["first_step"]), min(until, phase["end_step"])
                if first < end:
                    found.append(Phase(phase["name"], first, end))
        return found


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Errors:
        UserError: there is no such folder, or its record is missing, not readable or none of a run.
    """
    path = folder / folders.RECORD
    if not path.is_file():
        raise UserError(f"{folder} is no run: there is no {path}", hint="name the folder of a run: runs/NAME")
    record = read_json_object(path)
    _check(record, path)
    lines, unreadable = read_steps(folder / STEPS)
    steps: list[Step] = []
    validation: dict[int, float] = {}
    starts, seconds = [0], 0.0
    before: Step | None = None
    for step in lines:
        if before and (step.began != before.began or step.step < before.step):
            starts = [*(start for start in starts if start < step.step - 1), step.step - 1]
        while steps and steps[-1].step >= step.step:
            steps.pop()
        if before and step.step < before.step:
            validation = {at: loss for at, loss in validation.items() if at < step.step}
        measured_at = _validation_step(step, before, record)
        if measured_at is not None:
            validation[measured_at] = step.validation_loss
        if step.time is not None:
            same = before is not None and before.began == step.began
            seconds += step.time - (before.time if same and before.time is not None else step.began)
        steps.append(step)
        before = step
    if not lines:  # of a version that wrote none
        losses = read_events(folder)
        values = {"validation_loss": math.nan, "measured": [], "tokens_per_second": math.nan, "lr": math.nan}
        steps = [
            Step(step=step, steps=record["max_steps"], loss=loss, seconds_left=math.nan, **values)
            for step, loss in losses.train.items()
        ]
        validation = dict(losses.validation)
    old = steps and steps[-1].step == record["max_steps"] and steps[-1].validation_step is None
    if old and (final := record["metrics"].get("val_loss")) is not None:
        validation.setdefault(record["max_steps"], final)  # of versions that wrote no line after it
    return Run(folder, record, steps, dict(sorted(validation.items())), starts, seconds, unreadable)


def _validation_step(step: Step, before: Step | None, record: Mapping[str, Any]) -> int | None:
    """Return the step that a line's validation loss is of; lines of earlier versions do not say it."""
    if math.isnan(step.validation_loss):
        return None
    if step.validation_step is not None:
        return step.validation_step
    if before is not None and before.validation_loss == step.validation_loss:
        return None
    every = record["recipe"].get("log", {}).get("validate_every_steps")
    return (step.step - 1) // every * every if every else (before.step if before else 0)


def _check(record: dict[str, Any], path: Path) -> None:
    """Check what a report reads of a record."""
    kinds = {"recipe": dict, "model": dict, "data": dict, "metrics": dict, "step": int, "max_steps": int}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if not wrong:
        wrong = [f"data.{k}" for k in ("seq_length", "global_batch_size") if not isinstance(record["data"].get(k), int)]
    if wrong:
        raise UserError(f"{path} is no record of a run: {', '.join(wrong)} missing or of another kind")
