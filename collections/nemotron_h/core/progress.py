"""Progress with an ETA: a live bar on a terminal, a plain line now and then elsewhere; and that of a run, in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nemotron_h.core.files import parsed_lines
from nemotron_h.core.units import duration

#: seconds between plain lines
_EVERY_S = 10.0
#: in a run's folder: a JSON line for each `Step` that it reports, of every process that trained there
STEPS = "progress.jsonl"
#: in a run's folder: the seconds of a step of each rank, as `training/callbacks/stragglers.py` last compared them
RANK_TIMES = "rank_times.json"


@dataclass(frozen=True)
class Step:
    """A step of a run, as the run reports it.

    Attributes:
        step, steps: its number, from 1, and how many the run has.
        loss: of the step.
        validation_loss: the last that was measured; NaN before there is one.
        measured: what else was, by stages and machines that measure more: texts.
        tokens_per_second: over the last steps, all ranks together.
        lr: learning rate.
        seconds_left: of the run, at the pace of this process.
        validation_step: the step that `validation_loss` was measured after, 0 for the untrained model.
        metrics: what else was measured of the step, by name: gradient norm, rates, memory, terms of the loss.
        time, began: of this line and of the process that writes it, in seconds since 1970.

    Files of earlier versions lack the last four.
    """

    step: int
    steps: int
    loss: float
    validation_loss: float
    measured: list[str]
    tokens_per_second: float
    lr: float
    seconds_left: float
    validation_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    time: float | None = None
    began: float | None = None

    def losses(self) -> str:
        """Return both losses on one line."""
        validation = "   -  " if math.isnan(self.validation_loss) else f"{self.validation_loss:6.4f}"
        return f"loss {self.loss:6.4f}  validation {validation}"

    def line(self) -> str:
        """Return all of it on one line."""
        measured = "".join(f"{text}  " for text in self.measured)
        return (
            f"step {self.step:>{len(str(self.steps))}}/{self.steps}  {self.losses()}  "
            f"{self.tokens_per_second:>9,.0f} tokens/s  {measured}lr {self.lr:.2e}  ETA {duration(self.seconds_left)}"
        )

    def append(self, file: Path) -> None:
        """Add it to a file as a line of JSON."""
        with file.open("a") as opened:
            opened.write(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def parse(cls, line: str | bytes) -> Step:
        """Return the step of a line.

        Errors:
            ValueError: it is none.
        """
        try:
            step = cls(**json.loads(line))
            numbers = [getattr(step, name) for name in _NUMBERS]
        except TypeError as error:
            raise ValueError(str(error)) from error
        if not isinstance(step.metrics, dict) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("a value is no number")
        return step


_NUMBERS = ("step", "steps", "loss", "validation_loss", "tokens_per_second", "lr", "seconds_left")


def read_steps(file: Path) -> tuple[list[Step], list[int]]:
    """Return the steps of a file and the numbers of unreadable lines, as `parsed_lines` does."""
    return parsed_lines(file, Step.parse)


class Steps:
    """The steps that a run reports from now on; it may be killed, resumed or begun anew meanwhile.

    Args:
        folder: of the run; it need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / STEPS
        self.read = self.file.stat().st_size if self.file.is_file() else 0

    def new(self) -> list[Step]:
        """Return the steps that were reported since the last call; a line that is still being written waits."""
        if not self.file.is_file():
            self.read = 0
            return []
        with self.file.open("rb") as opened:
            if opened.seek(0, 2) < self.read:  # another file: the run was begun anew
                self.read = 0
            opened.seek(self.read)
            lines, newline, _ = opened.read().rpartition(b"\n")
        self.read += len(lines + newline)
        steps = []
        for line in lines.splitlines():
            with contextlib.suppress(ValueError):  # half a line, of a run that was killed or a full disk
                steps.append(Step.parse(line))
        return steps


class StageProgress:
    """Show how much of some work is done, with the time that remains.

    Args:
        console: where it goes.
        title: of the work.
        total: how much there is.
        unit: of `total`: "bytes", or things that are counted.
    """

    def __init__(self, console: Console, title: str, total: float, unit: str = "") -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done = 0.0
        self.started = self.last = time.monotonic()
        amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.task = self.bar.add_task(title, total=total) if self.bar else None

    def __enter__(self) -> StageProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, amount: float = 1, title: str | None = None) -> None:
        """Count more work as done; `title` names what is being worked on from now on."""
        self.done += amount
        self.title = title or self.title
        if self.bar:
            self.bar.update(self.task, advance=amount, description=self.title)
            return
        now = time.monotonic()
        if self.done and now - self.last >= _EVERY_S:
            self.last = now
            left = (now - self.started) * (self.total - self.done) / self.done
            scale, unit = (1e6, " MB") if self.unit == "bytes" else (1, "")
            self.say(f"  {self.title}: {self.done / scale:,.0f} of {self.total / scale:,.0f}{unit}, {left:.0f} s left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
