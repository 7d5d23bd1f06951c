"""How far a stage is: a live bar with an ETA on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_EVERY_S = 10.0


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
        """So much more is done."""
        self.done += amount
        if self.bar:
            self.bar.update(self.task, advance=amount)
            return
        now = time.monotonic()
        if now - self.last >= _PLAIN_EVERY_S:
            self.last = now
            left = (now - self.started) * (self.total - self.done) / self.done
            line = f"  {self.title}: {self.done:,} of {self.total:,}, {left:.0f} s left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
