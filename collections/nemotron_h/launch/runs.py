"""Start a training run as `nemo llm` does, in a process of its own or as a job. A finished one is not repeated, one
that was killed continues. What ends this process ends that process after a checkpoint; a job goes on, and is waited for
again. Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nemotron_h.checkpoint import folders
from nemotron_h.core.children import end_with_parent
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress, Step, Steps
from nemotron_h.core.units import count_of
from nemotron_h.data.phases import Horizon
from nemotron_h.launch.jobs import RECORD, Job, Watch
from nemotron_h.launch.place import HERE, Place
from nemotron_h.recipe.compose import to_yaml
from nemotron_h.report.incidents import close_killed
from nemotron_h.schema.recipe import STAGES, RecipeConfig, factory_of_file

#: exit code of a run that left early, with a checkpoint (`training.callbacks.preemption`)
LEFT_EARLY = 75
#: a run gets so long to write a checkpoint when this command is told to end
GRACE_S = 600
#: between looks at what a run reports
POLL_S = 0.5


@dataclass(frozen=True)
class Run:
    """Training run that a command starts.

    Attributes:
        name: also of its folder.
        recipe: complete; writes to `<log.dir>/<name>`.
        file: that it is started from; None is `<log.dir>/<name>.yaml`.
    """

    name: str
    recipe: RecipeConfig
    file: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder that it writes to."""
        return Path(self.recipe.log.dir) / self.name

    @property
    def recipe_file(self) -> Path:
        """Return the recipe file that it is started from."""
        return self.file or Path(self.recipe.log.dir) / f"{self.name}.yaml"


def is_finished(run: Run, steps: int) -> bool:
    """Tell whether the checkpoint of the last step is there, whole."""
    found = folders.finished(run.folder)
    return bool(found) and folders.step_of(found[0]) >= steps


def text_of(run: Run) -> str:
    """Return the text of the recipe's file."""
    return to_yaml(dataclasses.asdict(run.recipe))


def command_of(run: Run) -> list[str]:
    """Return the run's command line.

    Errors:
        UserError: there is no `nemo` command.
    """
    beside = Path(sys.executable).with_name("nemo")
    nemo = str(beside) if beside.is_file() else shutil.which("nemo")
    if nemo is None:
        raise UserError(f"there is no `nemo` command beside {sys.executable}", hint="install nemo_run")
    entry = STAGES[run.recipe.stage]
    return [nemo, "llm", entry, "--factory", factory_of_file(run.recipe_file), "--yes"]


def train(run: Run, title: str, steps: int, console: Console, place: Place = HERE) -> None:
    """Train a run to its end and show how far it is, with an ETA.

    Args:
        title: what stands before the progress.
        steps: of the whole run.
        place: where it runs. A process here prints to `<recipe file>.log`, a job where its line says.
    Errors:
        UserError: the run failed, naming what it said, or left early.
    """
    with leave_on_signals(), _Line(console, title, steps) as line:
        begun = begin(run, place, console)
        try:
            while not begun.over():
                line.show(begun.steps.new())
                time.sleep(POLL_S)
            line.show(begun.steps.new())
        finally:
            end_all([begun], console)
    check_ended(run, steps, begun)


def steps_of(run: Run) -> int:
    """Return the steps of a run."""
    data = run.recipe.data
    tokens = count_of(run.recipe.tokens, "tokens", f"recipe {run.name}")
    return Horizon(tokens, data.seq_length * data.global_batch_size).steps


def complete(run: Run, title: str, console: Console, place: Place = HERE) -> Path:
    """Train what is missing of a run, as `train`, and return its folder."""
    steps = steps_of(run)
    if not is_finished(run, steps):
        train(run, title, steps, console, place)
    return run.folder


def submit(runs: Sequence[Run], place: Place, console: Console) -> None:
    """Submit what is in no queue yet, so that jobs wait beside each other; `train` then waits for each.

    Errors:
        UserError: a run cannot be submitted.
    """
    for run in runs:
        _Job(run, place, console)


def dry_run(run: Run, place: Place) -> str:
    """Return what would be started: the command, or the script that would be submitted. Nothing is left behind.

    Errors:
        UserError: the run does not fit the cluster file.
    """
    if not place.submits:
        return shlex.join([*command_of(run), *place.launcher])
    with tempfile.TemporaryDirectory() as folder:
        shown = dataclasses.replace(run, file=Path(folder) / f"{run.name}.yaml")
        write_recipe(shown)
        command = [*command_of(shown), *place.arguments, "--dryrun"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise UserError(f"{run.name} cannot be submitted: {_reason(done.stdout + done.stderr)}")
    said = ("Configuring global options", f"Dry run for {STAGES[run.recipe.stage]}:")  # by nemo-run
    return "\n".join(line for line in done.stdout.splitlines() if line not in said)


def write_recipe(run: Run) -> None:
    """Write the file that a run is started from."""
    run.recipe_file.parent.mkdir(parents=True, exist_ok=True)
    run.recipe_file.write_text(text_of(run))


class _Output:
    """The output of a run, in a file that grows; a chain of jobs has one file after the other.

    Args:
        newest: the file that it prints to now, or None.
        begin: byte that this try begins at, in the file of now.
    """

    def __init__(self, newest: Callable[[], Path | None], begin: int = 0) -> None:
        self.newest, self.begin = newest, begin

    def text(self) -> str:
        """Return all that it printed in the newest file."""
        file = self.newest()
        return file.read_bytes()[self.begin :].decode(errors="replace") if file and file.is_file() else ""


class _Process:
    """A run in a process of its own here."""

    again = "run the same command again to continue"

    def __init__(self, run: Run, place: Place, env: Mapping[str, str]) -> None:
        write_recipe(run)
        self.steps = Steps(run.folder)
        path = run.recipe_file.with_suffix(".log")
        with path.open("a") as log:
            self.output = _Output(lambda: path, log.tell())
            self.process = subprocess.Popen(
                [*command_of(run), *place.launcher],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ctrl-c is for this command, which ends the run in its own way
                preexec_fn=end_with_parent,
                env={**os.environ, **env, **place.env},
            )

    def over(self) -> bool:
        """Tell whether it has ended."""
        return self.process.poll() is not None

    @property
    def code(self) -> int | None:
        """Return its exit code."""
        return self.process.returncode


class _Job:
    """A run as a job of Slurm: the one that an earlier call of this command submitted, if it is in the queue still."""

    again = "run the same command again: it submits more jobs, which continue"

    def __init__(self, run: Run, place: Place, console: Console) -> None:
        self.record = run.recipe_file.with_name(run.name + RECORD)
        self.job = Job.recorded(self.record)
        if self.job is None or not self.job.is_queued():
            self.job = _submit(run, place)
            self.job.record(self.record)
        self.output, self.steps = _Output(self.job.log), Steps(run.folder)
        self.watch = Watch(self.job, lambda line: console.print(f"{run.name}: {line}", highlight=False, markup=False))

    def over(self) -> bool:
        """Tell whether it has left the queue."""
        if not self.watch.over():
            return False
        self.record.unlink(missing_ok=True)
        return True

    @property
    def code(self) -> int | None:
        """Return the exit code of its last job; None where that was killed."""
        return self.job.exit_code()


#: a run that was begun
Begun = _Process | _Job


def begin(run: Run, place: Place, console: Console, env: Mapping[str, str] | None = None) -> Begun:
    """Begin a run, or find its job in the queue.

    Args:
        env: environment variables of a process here, beside those of the place.
    """
    return _Job(run, place, console) if place.submits else _Process(run, place, env or {})


def _submit(run: Run, place: Place) -> Job:
    """Submit a run with `nemo`, whose output goes to `<recipe file>.log`."""
    write_recipe(run)
    command = [*command_of(run), *place.arguments, "--detach"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log = run.recipe_file.with_suffix(".log")
    log.write_text(done.stdout + done.stderr)
    job = Job.of_line(done.stdout)
    if done.returncode or job is None:
        raise UserError(f"{run.name} was not submitted: {_reason(done.stdout + done.stderr)}", hint=f"see {log}")
    return job


def check_ended(run: Run, steps: int, begun: Begun) -> None:
    """Refuse a run that is not whole."""
    if is_finished(run, steps) and begun.code in (0, None):
        return
    code, file = begun.code, begun.output.newest()
    if code == LEFT_EARLY:
        raise UserError(f"{run.name} left early, with a checkpoint", hint=begun.again)
    log = f"see {file or begun.job.logs}"
    if code is None:
        ended, hint = "was killed or cancelled", log
    elif code < 0:
        ended, hint = f"was ended by {signal.Signals(-code).name}", f"{begun.again}; {log}"
    else:
        ended, hint = f"ended with exit code {code}", log
    with contextlib.suppress(OSError):  # the error that follows is what counts
        close_killed(run.folder, ended)
    raise UserError(f"{run.name} {ended}: {_reason(begun.output.text())}", hint=hint)


def _reason(text: str) -> str:
    """Return the line of the error in an output, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error: |\w*(Error|Exception)\b)", line)]
    return (errors or lines or ["it printed nothing"])[-1]


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP inside the block, so that runs can write a checkpoint first."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_all(begun: Sequence[Begun], console: Console) -> None:
    """End processes that go on, each with a checkpoint; jobs stay in the queue."""
    alive = [each.process for each in begun if isinstance(each, _Process) and not each.over()]
    for job in (each.job for each in begun if isinstance(each, _Job) and each.record.is_file()):
        console.print(f"job {job.id} goes on; the same command waits for it again, `scancel {job.id}` ends it")
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


class _Line:
    """The steps of a run: a live bar on a terminal, lines of some of them (which have an ETA too) elsewhere."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.bar, self.title, self.steps = StageProgress(console, f"{title}  starting", steps), title, steps
        self.last: Step | None = None

    def __enter__(self) -> _Line:
        self.bar.__enter__()
        if not self.bar.bar:
            self.bar.say(f"{self.title}: starting")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)
        if self.bar.bar and self.last:  # the bar is gone
            self.bar.say(f"{self.title}: {self.last.line()}")

    def show(self, steps: Sequence[Step]) -> None:
        """Show what the run reports."""
        for step in steps:
            if self.bar.bar:
                self.bar.advance(step.step - self.bar.done, f"{self.title}  {step.losses()}")
            elif self.last and step.step == self.last.step:
                pass  # its validation; on the next line too
            elif not self.last or step.step % max(1, self.steps // 10) == 0 or step.step == self.steps:
                self.bar.say(f"{self.title}: {step.line()}")
            self.last = step
