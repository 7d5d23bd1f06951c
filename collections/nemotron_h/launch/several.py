"""Start several runs, some at a time, and say how far they are together. Imports no torch.

Each is a run of `launch.runs`: a finished one is not repeated, one that was killed continues, and what ends this
process has the processes write a checkpoint first.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from nemotron_h.core import locks
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress, Step
from nemotron_h.core.strict import leaves, typed
from nemotron_h.core.strict_yaml import read_config
from nemotron_h.core.units import duration
from nemotron_h.launch import runs as single
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.schema.recipe import RecipeConfig

#: seconds between lines that say where the runs are
EVERY_S = 60.0


def check_same(run: Run, hint: str) -> None:
    """Refuse a folder whose run was another.

    Errors:
        UserError: names the keys that differ.
    """
    if not run.recipe_file.is_file():
        return
    # typed: a key that a later release added has its default
    written = typed(RecipeConfig, read_config(run.recipe_file), str(run.recipe_file))
    there, now = (dict(leaves(dataclasses.asdict(recipe))) for recipe in (written, run.recipe))
    changed = [
        f"{key}: {there.get(key)} there, {now.get(key)} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
        and key != "log.dir"  # the same folder by another path
        and not key.startswith(("sources.", "model.sources."))
    ]
    if changed:
        raise UserError(f"{run.recipe_file} is of another run: {'; '.join(changed[:4])}", hint=hint)


def train_several(
    runs: Sequence[tuple[Run, int]],
    at_once: int,
    console: Console,
    end: float = float("inf"),
    place: Place = HERE,
    ended: Callable[[Run, UserError | None], str] | None = None,
    env: Callable[[int], Mapping[str, str]] = lambda slot: {},
) -> bool:
    """Train runs, some at a time, and say when one of them is through.

    Args:
        runs: each with its steps; without `ended`, those whose last checkpoint is there are left out.
        end: of `time.monotonic()`; runs that are not over then write a checkpoint and end.
        place: as of `runs.train`.
        ended: told a run and its error, if any; returns what to say of it, and the others go on. Without it an error
            ends all.
        env: environment variables of the run in a slot, one of `at_once`.
    Returns:
        Whether all are over.
    Errors:
        UserError: a run failed and there is no `ended`; the others write a checkpoint and end.
    """
    waiting = []
    for run, steps in runs:
        if ended is None and single.is_finished(run, steps):
            console.print(
                f"{run.name}: finished already, in {run.folder}", highlight=False, soft_wrap=True, markup=False
            )
        else:
            waiting.append((run, steps))
    free, running = list(range(at_once))[::-1], []
    progress = _Progress(console, sum(steps for _, steps in waiting), len(waiting), place.submits)
    with single.leave_on_signals(), progress.bar:
        try:
            while (waiting or running) and time.monotonic() < end:
                while free and (ready := progress.ready(waiting)) is not None:
                    waiting.remove(ready)
                    slot = free.pop()
                    running.append((*ready, slot, single.begin(ready[0], place, console, env(slot))))
                for each in list(running):
                    run, steps, slot, begun = each
                    progress.look(run, begun)
                    if not begun.over():
                        continue
                    running.remove(each)
                    free.append(slot)
                    progress.look(run, begun)
                    error = _error(run, steps, begun)
                    if error is not None and ended is None:
                        raise error
                    progress.ended(run, steps, ended(run, error) if ended else f"{run.name} finished")
                progress.say_where()
                time.sleep(single.POLL_S)
        finally:
            single.end_all([begun for *_, begun in running], console)
    return not waiting and not running


def _error(run: Run, steps: int, begun: single.Begun) -> UserError | None:
    try:
        single.check_ended(run, steps, begun)
    except UserError as error:
        return error
    return None


class _Progress:
    """The steps of all runs together: a live bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, steps: int, runs: int, jobs: bool) -> None:
        self.bar = StageProgress(console, "runs", steps)
        self.steps, self.runs, self.over, self.jobs = steps, runs, 0, jobs
        self.at: dict[str, int] = {}
        self.now: dict[str, Step] = {}
        self.first: dict[str, int] = {}
        self.told: set[str] = set()
        self.started = self.last = time.monotonic()

    def ready(self, waiting: Sequence[tuple[Run, int]]) -> tuple[Run, int] | None:
        """Return the first run that no other process trains: one of a killed command writes its checkpoint still. A job
        of an earlier command is taken up.
        """
        for run, steps in waiting:
            holder = None if self.jobs else locks.holder(run.folder)
            if holder is None:
                return run, steps
            if run.name not in self.told:
                self.told.add(run.name)
                self.bar.say(f"{run.name} is still being trained by another process, {holder}: waiting")
        return None

    def look(self, run: Run, begun: single.Begun) -> None:
        """Read the steps that a run has reported since."""
        for step in begun.steps.new():
            self._at(run, step.step)
            self.now[run.name] = step

    def ended(self, run: Run, steps: int, words: str) -> None:
        """Say what became of a run."""
        self._at(run, steps)
        self.now.pop(run.name, None)
        self.over += 1
        self.last = time.monotonic()
        self.bar.say(f"{words}; {self.over} of {self.runs}{self._eta()}")

    def say_where(self) -> None:
        """Say now and then how far the runs are, where there is no bar."""
        if self.bar.bar or time.monotonic() - self.last < EVERY_S:
            return
        self.last = time.monotonic()
        now = "".join(f"; {name}: step {step.step}, {step.losses()}" for name, step in self.now.items())
        self.bar.say(f"  {sum(self.at.values()):,} of {self.steps:,} steps{self._eta()}{now}")

    def _at(self, run: Run, step: int) -> None:
        before = self.at.get(run.name)
        self.first.setdefault(run.name, step - 1)
        self.at[run.name] = step
        if self.bar.bar:
            self.bar.advance(step - (before or 0))

    def _eta(self) -> str:
        """Return the time that remains at the pace of this process: steps of earlier ones took it none."""
        done, now = sum(self.at.values()), time.monotonic() - self.started
        trained = done - sum(self.first.values())
        return f", ETA {duration(now / trained * (self.steps - done))}" if trained > 0 else ""


def threads(runs: int) -> dict[str, str]:
    """Return the environment that shares this machine's cores among ranks, unless the user's own says how."""
    if "OMP_NUM_THREADS" in os.environ or runs < 2:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // runs))}
