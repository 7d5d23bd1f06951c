"""Run a sweep: what is not finished, some points at a time, and write what it came to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console

from nemotron_h.core import locks
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import duration, short_count
from nemotron_h.launch.capacity import capacity
from nemotron_h.launch.place import Place
from nemotron_h.launch.runs import Run
from nemotron_h.launch.several import train_several
from nemotron_h.sweep import figures, fits, results
from nemotron_h.sweep.file import SweepFile, complain
from nemotron_h.sweep.points import Point, folder_of, others, planned_row, points_of
from nemotron_h.sweep.rows import row_of


@dataclass
class Sweep:
    """A sweep whose points are composed and checked.

    Args:
        file: of the sweep.
        place: where its runs go.
    Attributes:
        failed: point -> its error, of this process.
    """

    file: SweepFile
    place: Place
    console: Console
    points: list[Point] = field(init=False)
    failed: dict[str, UserError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compose and check all that can be before a run starts.

        Errors:
            UserError: all that is wrong, with the file and its keys.
        """
        self.points = points_of(self.file, self.place)
        rows = [planned_row(point) for point in self.points]
        problems = figures.problems(self.file.schema.figures, self.points)
        problems += [problem for fit in self.file.schema.fits if (problem := fits.problem(fit, rows))]
        complain(self.file.path, problems)

    def train(self) -> None:
        """Train the points that are not finished; one that fails lets the others go on.

        Errors:
            UserError: another process runs this sweep.
        """
        folder = folder_of(self.points)
        with locks.locked(folder, "swept", "dir"):
            done = sum(self._tidy(point) for point in self.points)
            left = [point for point in self.points if not point.is_finished()]
            at_once = capacity([p.run.recipe for p in left], self.file.schema.at_once, self.place) if left else None
            self._say(
                f"{self.file.name}: {len(self.points)} points, {done} finished already"
                + (f"; {at_once.runs} at a time ({at_once.why})" if at_once else "")
            )
            for name in others(self.points):
                self._say(f"  {name} in {folder} is no point of {self.file.path} any more; it stays")
            if at_once:
                runs = [(point.run, point.steps) for point in left]
                train_several(runs, at_once.runs, self.console, place=self.place, ended=self._ended, env=at_once.env)

    def write(self) -> results.Results:
        """Write the results and say them."""
        written = results.write(self.file, self.points)
        self.console.print(results.table(self.file, self.points, written.rows))
        for title, text in written.fits:
            self._say(f"{title}: {text}")
        for name, error in self.failed.items():
            self._say(f"not finished: {name}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
        self._say(f"written: {', '.join(map(str, written.files))}")
        return written

    def planned(self) -> Sequence[str]:
        """Return a line for each point: steps, sizes, and whether it is finished."""
        return [
            f"{point.name}: {point.steps:,} steps, {short_count(point.tokens)} tokens, "
            f"{short_count(point.parameters)} parameters, {point.flops:.3g} FLOPs"
            + (", finished" if point.is_finished() else "")
            for point in self.points
        ]

    def _ended(self, run: Run, error: UserError | None) -> str:
        if error is not None:
            self.failed[run.name] = error
            return f"{run.name} did not finish: {error.message}"
        point = next(point for point in self.points if point.name == run.name)
        self._tidy(point)
        results.write_rows(self.points)
        row = row_of(point)
        return f"{run.name} finished: loss {row.get('loss', float('nan')):.4f}, {duration(row.get('seconds', 0))}"

    def _tidy(self, point: Point) -> bool:
        """Tell whether a point is finished, and remove its checkpoints then if the file says so."""
        finished = point.is_finished()
        if finished and not self.file.schema.keep_checkpoints:
            shutil.rmtree(point.run.folder / "checkpoints", ignore_errors=True)
        return finished

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
