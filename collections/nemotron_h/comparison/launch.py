"""Start the runs of a comparison, one after the other, through `nemo llm pretrain`. A finished one is not repeated, one
that was killed continues from its checkpoint. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nemotron_h.comparison.runs import Comparison, Run
from nemotron_h.errors import UserError
from nemotron_h.provenance import leaves
from nemotron_h.recipe.text import to_yaml
from nemotron_h.schema import RecipeConfig
from nemotron_h.strict import typed
from nemotron_h.training import checkpoints

#: exit code of a run that left early, with a checkpoint (`training.callbacks.preemption`)
LEFT_EARLY = 75
#: a run gets so long to write a checkpoint when this command is told to end
GRACE_S = 600
_STEP = re.compile(r"step\s+(\d+)/(\d+)\s+loss\s+(\S+)")


def train(comparison: Comparison, console: Console) -> None:
    """Train what is not finished yet.

    Errors:
        UserError: the folder holds runs of another comparison, or a run fails.
    """
    for run in comparison.runs:
        check_same(run)
    for number, run in enumerate(comparison.runs, 1):
        title = f"run {number} of {len(comparison.runs)}: {run.name}"
        if is_finished(run, comparison.steps):
            console.print(f"{title}: finished already, in {run.folder}", highlight=False, soft_wrap=True)
            continue
        run.recipe_file.parent.mkdir(parents=True, exist_ok=True)
        run.recipe_file.write_text(text_of(run))
        _train_one(run, title, comparison.steps, console)


def is_finished(run: Run, steps: int) -> bool:
    """Whether the checkpoint of the last step is there, whole."""
    found = checkpoints.finished(run.folder)
    return bool(found) and checkpoints.step_of(found[0]) >= steps


def text_of(run: Run) -> str:
    """The recipe's file."""
    return to_yaml(dataclasses.asdict(run.recipe))


def check_same(run: Run) -> None:
    """Refuse a folder whose run was another.

    Errors:
        UserError: names the keys that differ.
    """
    if not run.recipe_file.is_file():
        return
    # typed: a key that a later release added has its default
    written = typed(RecipeConfig, yaml.safe_load(run.recipe_file.read_text()), str(run.recipe_file))
    there, now = (dict(leaves(dataclasses.asdict(recipe))) for recipe in (written, run.recipe))
    changed = [
        f"{key}: {there.get(key)} there, {now.get(key)} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key) and key != "log.dir"  # the same folder by another path
    ]
    if changed:
        raise UserError(
            f"{run.recipe_file} is of another comparison: {'; '.join(changed[:4])}",
            hint="choose another --out, or remove that folder",
        )


def command_of(run: Run) -> list[str]:
    """The run's command line."""
    beside = Path(sys.executable).with_name("nemo")
    nemo = str(beside) if beside.is_file() else shutil.which("nemo")
    if nemo is None:
        raise UserError(f"there is no `nemo` command beside {sys.executable}", hint="install nemo_run")
    command = [nemo, "llm", "pretrain", "--factory", f"nemotron_h_recipe(path={run.recipe_file})", "--yes"]
    return [*command, "executor=local"] if run.recipe.parallel.devices > 1 else command


def _train_one(run: Run, title: str, steps: int, console: Console) -> None:
    log = run.recipe_file.with_suffix(".log")
    process = subprocess.Popen(
        command_of(run),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # ctrl-c is for this command, which ends the run in its own way
    )
    with _ended_with_us(process, console), log.open("a") as file, _Line(console, title, steps) as line:
        for text in process.stdout:
            file.write(text)
            file.flush()
            found = _STEP.search(text)
            if found:
                line.step(int(found.group(1)), text.strip())
    if process.returncode == LEFT_EARLY:
        raise UserError(f"{run.name} left early, with a checkpoint", hint="run the same command again to continue")
    if process.returncode != 0 or not is_finished(run, steps):
        raise UserError(f"{run.name} ended with exit code {process.returncode}: {_reason(log)}", hint=f"see {log}")


def _reason(log: Path) -> str:
    """The error's line in a log, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |\w*(Error|Exception)\b)", line)]
    return (errors or lines or ["it printed nothing"])[-1]


@contextmanager
def _ended_with_us(process: subprocess.Popen, console: Console) -> Iterator[None]:
    """What ends this command ends the run, which writes a checkpoint first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            console.print("stopping: the run writes a checkpoint first")
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
            self.console.print(f"{self.title}: starting", highlight=False)
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
