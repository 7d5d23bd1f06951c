"""Progress with an ETA: a live bar on a terminal, a plain line now and then elsewhere; and that of a run, in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_PLAIN_EVERY_S = 20.0
_STAGE_EVERY_S = 10.0
#: in a run's folder: a JSON line for each `Step` that it reports, of every process that trained there
STEPS = "progress.jsonl"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


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
    """

    step: int
    steps: int
    loss: float
    validation_loss: float
    measured: list[str]
    tokens_per_second: float
    lr: float
    seconds_left: float

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
            with contextlib.suppress(ValueError, TypeError):  # half a line, of a run that was killed or a full disk
                steps.append(Step(**json.loads(line)))
        return steps


class ProgressLine:
    """Shows how many of `total` bytes of input are done, with an ETA.

    Args:
        console: where it goes.
        total: bytes of input.
    """

    def __init__(self, console: Console, total: float) -> None:
        self._console, self._total, self._done = console, total, 0.0
        self._start = self._last = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task("preparing", total=total) if self._bar else None

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float, name: str) -> None:
        """Count `amount` more bytes of source `name` as done."""
        self._done += amount
        if self._bar:
            self._bar.update(self._task, advance=amount, description=name)
            return
        now = time.monotonic()
        if now - self._last >= _PLAIN_EVERY_S:
            self._last = now
            left = (now - self._start) * (self._total - self._done) / self._done
            self.say(f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {left:.0f} s left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class StageProgress:
    """Counts the work of a stage.

    Args:
        console: where it goes.
        title: what is counted.
        total: how much there is.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console, self.title, self.total, self.done = console, title, total, 0
        self.started = self.last = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.task = self.bar.add_task(title, total=total) if self.bar else None

    def __enter__(self) -> StageProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, amount: int = 1) -> None:
        """Count so much more as done."""
        self.done += amount
        if self.bar:
            self.bar.update(self.task, advance=amount)
            return
        now = time.monotonic()
        if now - self.last >= _STAGE_EVERY_S:
            self.last = now
            left = (now - self.started) * (self.total - self.done) / self.done
            line = f"  {self.title}: {self.done:,} of {self.total:,}, {left:.0f} s left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
