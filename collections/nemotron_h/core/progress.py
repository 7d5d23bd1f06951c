"""Progress with an ETA: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

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

#: seconds between plain lines
_EVERY_S = 10.0


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
