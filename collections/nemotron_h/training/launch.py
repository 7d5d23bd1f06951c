"""Start a training run as `nemo llm` does, in a process of its own: a finished one is not repeated, one that was killed
continues from its checkpoint, and what ends this process ends the run after a checkpoint. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemotron_h.children import end_with_parent
from nemotron_h.errors import UserError
from nemotron_h.recipe.text import to_yaml
from nemotron_h.schema import STAGES, RecipeConfig, factory_of_file
from nemotron_h.training import checkpoints

#: exit code of a run that left early, with a checkpoint (`training.callbacks.preemption`)
LEFT_EARLY = 75
#: a run gets so long to write a checkpoint when this command is told to end
GRACE_S = 600
_STEP = re.compile(r"step\s+(\d+)/(\d+)\s+loss\s+(\S+)")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: also of its folder.
        recipe: complete; writes to `<log.dir>/<name>`.
    """

    name: str
    recipe: RecipeConfig

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.recipe.log.dir) / self.name

    @property
    def recipe_file(self) -> Path:
        """The recipe that it is started from."""
        return Path(self.recipe.log.dir) / f"{self.name}.yaml"


def is_finished(run: Run, steps: int) -> bool:
    """Whether the checkpoint of the last step is there, whole."""
    found = checkpoints.finished(run.folder)
    return bool(found) and checkpoints.step_of(found[0]) >= steps


def text_of(run: Run) -> str:
    """The recipe's file."""
    return to_yaml(dataclasses.asdict(run.recipe))


def command_of(run: Run) -> list[str]:
    """The run's command line."""
    beside = Path(sys.executable).with_name("nemo")
    nemo = str(beside) if beside.is_file() else shutil.which("nemo")
    if nemo is None:
        raise UserError(f"there is no `nemo` command beside {sys.executable}", hint="install nemo_run")
    entry = STAGES[run.recipe.stage]
    return [nemo, "llm", entry, "--factory", factory_of_file(run.recipe_file), "--yes"]


def train(run: Run, title: str, steps: int, console: Console) -> None:
    """Train a run to its end and show how far it is, with an ETA. Its output goes to `<recipe file>.log`.

    Args:
        title: what stands before the progress.
        steps: of the whole run.
    Errors:
        UserError: the run failed, naming what it said, or left early.
    """
    write_recipe(run)
    log = run.recipe_file.with_suffix(".log")
    process = subprocess.Popen(
        command_of(run),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # ctrl-c is for this command, which ends the run in its own way
        preexec_fn=end_with_parent,
    )
    with _ended_with_us(process, console), log.open("a") as file, _Line(console, title, steps) as line:
        begin = file.tell()
        for text in process.stdout:
            file.write(text)
            file.flush()
            found = _STEP.search(text)
            if found:
                line.step(int(found.group(1)), text.strip())
    _check_ended(run, steps, process.returncode, begin)


def train_several(runs: Sequence[tuple[Run, int]], at_once: int, console: Console, end: float = float("inf")) -> bool:
    """Train what is not finished, some runs at a time, each line of output in `<recipe file>.log`.

    Args:
        runs: each with its steps.
        end: of `time.monotonic()`; runs that are not over then write a checkpoint and end.
    Returns:
        Whether all are finished.
    Errors:
        UserError: a run failed, naming what it said; the others write a checkpoint and end.
    """
    waiting = [(run, steps) for run, steps in runs if not is_finished(run, steps)]
    total, running, started = len(waiting), [], time.monotonic()
    with _leave_on_signals():
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < at_once:
                    run, steps = waiting.pop(0)
                    write_recipe(run)
                    with run.recipe_file.with_suffix(".log").open("a") as log:
                        begin = log.tell()
                        process = subprocess.Popen(
                            command_of(run),
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=end_with_parent,
                        )
                    running.append((run, steps, begin, process))
                for each in list(running):
                    run, steps, begin, process = each
                    if process.poll() is None:
                        continue
                    running.remove(each)
                    _check_ended(run, steps, process.returncode, begin)
                    done = total - len(waiting) - len(running)
                    left = (time.monotonic() - started) / done * (total - done)
                    console.print(
                        f"{run.name} finished, {done} of {total}; about {left:.0f} s left",
                        highlight=False,
                        markup=False,
                    )
                time.sleep(1)
        finally:
            _end([process for *_, process in running], console)
    return not waiting and not running


def write_recipe(run: Run) -> None:
    """The file that a run is started from."""
    run.recipe_file.parent.mkdir(parents=True, exist_ok=True)
    run.recipe_file.write_text(text_of(run))


def _check_ended(run: Run, steps: int, code: int, begin: int) -> None:
    """Refuse a run that is not whole; `begin` is where its log starts, behind those of earlier tries."""
    log = run.recipe_file.with_suffix(".log")
    if code == LEFT_EARLY:
        raise UserError(f"{run.name} left early, with a checkpoint", hint="run the same command again to continue")
    if code != 0 or not is_finished(run, steps):
        raise UserError(f"{run.name} ended with exit code {code}: {_reason(log, begin)}", hint=f"see {log}")


def _reason(log: Path, begin: int) -> str:
    """The error's line in a log from a byte on, or its last line."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |\w*(Error|Exception)\b)", line)]
    return (errors or lines or ["it printed nothing"])[-1]


@contextmanager
def _leave_on_signals() -> Iterator[None]:
    """What tells this command to end raises, so that runs can write a checkpoint first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(processes: Sequence[subprocess.Popen], console: Console) -> None:
    """End runs that go on; each writes a checkpoint first."""
    alive = [process for process in processes if process.poll() is None]
    if alive:
        console.print(f"stopping: {'the run writes' if len(alive) == 1 else 'the runs write'} a checkpoint first")
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _ended_with_us(process: subprocess.Popen, console: Console) -> Iterator[None]:
    """What ends this command ends the run."""
    with _leave_on_signals():
        try:
            yield
            process.wait()
        finally:
            _end([process], console)


class _Line:
    """A live bar with an ETA on a terminal, some of the run's own lines (which have one too) elsewhere."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.console, self.title, self.steps = console, title, steps
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task(title, total=steps, loss="starting") if self.bar else None
        self.shown = False

    def __enter__(self) -> _Line:
        if self.bar:
            self.bar.start()
        else:
            self.console.print(f"{self.title}: starting", highlight=False, markup=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, step: int, text: str) -> None:
        """The run printed the line of a step."""
        if self.bar:
            if not self.shown:  # starting took minutes, perhaps: not the pace of a step
                self.bar.reset(self.task, completed=step, loss="")
            self.bar.update(self.task, completed=step, loss=text.split("tokens/s")[0].split("  ", 1)[-1])
        elif not self.shown or step % max(1, self.steps // 10) == 0 or step == self.steps:
            self.console.print(f"{self.title}: {text}", highlight=False, markup=False, soft_wrap=True)
        self.shown = True
