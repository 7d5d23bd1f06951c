"""Progress with an ETA: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

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
