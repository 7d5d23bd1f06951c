"""`make card CARD=docs/cards/NAME.yaml`: run a verification card again and say what differs from what it states.

A card is a claim with all that it takes to run it: a recipe, settings, a machine, and what was measured there. Losses
and weights are judged on every machine, times and memory only on the card's own. `--write` puts what is measured now
into the card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from weights import differing

from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.core import strict, strict_yaml
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.core.progress import STEPS, read_steps
from nemotron_h.core.units import GIB
from nemotron_h.platform.hardware import describe
from nemotron_h.platform.ranks import report_mistakes
from nemotron_h.recipe.compose import compose, factory_of, locate, stage_of, to_yaml
from nemotron_h.schema.recipe import STAGES, command_of

SAVED = 75  # exit code of a run that was told to leave and has written its checkpoint
#: keys of a card that are judged on its machine alone, and how the table names them
SPEED = {"seconds_per_step": "seconds per step", "mfu": "MFU", "memory_gib": "peak memory, GiB"}


@dataclass
class Measured:
    """Say when, where and with what the values of a card were measured; written by `--write`."""

    date: str = ""
    commit: str = ""
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Card:
    """State a claim, how to run it again, and what was measured.

    Attributes:
        claim: a sentence.
        hardware: the machine's name, as this script prints it.
        recipe: a recipe's name or file.
        changes: settings of the command line.
        environment: variables that the runs get.
        blends: data that is prepared before.
        losses: training losses by step.
        loss_tolerance: relative; 0 wants equal numbers.
        seconds_per_step: median without the first steps; with `mfu` where the GPU's peak is known.
        memory_gib: peak of the GPU's allocator, of the process where there is no GPU.
        speed_tolerance, memory_tolerance: relative.
        resume_after: step after which a second run gets SIGTERM; resumed, its losses and weights must be equal.
        conversion: whether the weights must come back equal from `export hf` and `import hf`.
    """

    claim: str
    hardware: str
    recipe: str
    changes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    blends: list[str] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    loss_tolerance: float = strict.number(0.01, least=0)
    seconds_per_step: float | None = None
    mfu: float | None = None
    speed_tolerance: float = strict.number(0.1, above=0)
    memory_gib: float | None = None
    memory_tolerance: float = strict.number(0.05, above=0)
    resume_after: int | None = None
    conversion: bool = False
    measured: Measured = field(default_factory=Measured)

    def command(self) -> list[str]:
        """Return the command that trains the recipe."""
        if self.recipe.endswith(".yaml"):
            command = command_of(compose(self.recipe).stage, self.recipe)
        else:
            name = locate(self.recipe)[1]
            command = f"nemo llm {STAGES[stage_of(name)]} --factory {factory_of(name)} --yes"
        return [*shlex.split(command), *self.changes]


@dataclass(frozen=True)
class Line:
    """Compare a value of the card with the one measured now.

    Attributes:
        allowed: largest relative difference; None where it is not judged.
    """

    name: str
    stated: float
    now: float
    allowed: float | None

    @property
    def difference(self) -> float:
        """Return the relative difference."""
        return 0.0 if self.now == self.stated else abs(self.now - self.stated) / max(abs(self.stated), 1e-30)

    @property
    def agrees(self) -> bool:
        """Return True for a difference that is allowed, or is not judged."""
        return self.allowed is None or self.difference <= self.allowed


def hardware() -> str:
    """Return the name of this machine: its GPUs, or its processor and cores."""
    machine = describe()
    if machine["gpus"]:
        return f"{len(machine['gpus'])} x {machine['gpus'][0]}"
    return f"{machine['cores']} cores of {machine['cpu'] or platform.machine()}"


def program(name: str) -> str:
    """Return the path of a command of this environment.

    Errors:
        UserError: it is not installed.
    """
    path = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if path is None:
        raise UserError(f"there is no command {name}", hint="run make install")
    return path


class Runs:
    """The runs that a card takes, in a folder of their own.

    Args:
        folder: for runs and logs.
    """

    def __init__(self, card: Card, folder: Path) -> None:
        self.card, self.folder = card, folder
        self.peak_gib = 0.0  # of the processes that trained

    def train(self, name: str, stop_after: int | None = None) -> Path:
        """Train the recipe in a folder of this name and return it.

        Args:
            stop_after: step after which the run gets SIGTERM.
        Errors:
            UserError: the run failed, or ended before that step.
        """
        folder = self.folder / name
        process = self._start([*self.card.command(), "log.every_steps=1", f"log.explicit_log_dir={folder}"], folder)
        wanted = 0
        if stop_after is not None and self._reaches(process, folder, stop_after):
            process.send_signal(signal.SIGTERM)
            wanted = SAVED
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_gib = max(self.peak_gib, usage.ru_maxrss * 1024 / GIB)
        self._check(process, wanted, folder)
        return folder

    def command(self, name: str, *arguments: object) -> None:
        """Run a command of `nemotron-h`; errors as of `train`."""
        log = self.folder / name
        process = self._start(["nemotron-h", *map(str, arguments)], log)
        process.wait()
        self._check(process, 0, log)

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        print(f"$ {shlex.join(command)}", flush=True)
        with log.with_suffix(".log").open("ab") as opened:
            return subprocess.Popen(
                [program(command[0]), *command[1:]],
                stdout=opened,
                stderr=opened,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.card.environment},
            )

    @staticmethod
    def _reaches(process: subprocess.Popen[bytes], folder: Path, step: int) -> bool:
        while process.poll() is None:
            if step in losses_of(folder):
                return True
            time.sleep(0.05)
        return False

    @staticmethod
    def _check(process: subprocess.Popen[bytes], wanted: int, log: Path) -> None:
        if process.returncode != wanted:
            path = log.with_suffix(".log")
            said = "\n".join(path.read_text(errors="replace").splitlines()[-12:])
            raise UserError(f"it ended with {process.returncode}, not {wanted}; the end of {path}:\n{said}")


def losses_of(run: Path) -> dict[int, float]:
    """Return the training losses of a run by step; of a step that was trained twice, the last."""
    return {step.step: step.loss for step in read_steps(run / STEPS)[0]}


def compared(card: Card, runs: Runs) -> Iterator[Line]:
    """Run what the card takes and yield its lines."""
    root = Path(compose(card.recipe, card.changes).data.root or "data")
    for blend in card.blends:
        if not (root / blend / "manifest.json").is_file():  # the run compares it with the blend
            runs.command("prepare", "data", "prepare", "--blend", blend)
    run = runs.train("run")
    losses, record = losses_of(run), json.loads((run / "run.json").read_text())
    for step, loss in card.losses.items():
        yield Line(f"loss of step {step}", loss, losses.get(int(step), math.nan), card.loss_tolerance)
    speed = record["throughput"] or {}
    speed["memory_gib"] = speed.get("max_memory_gib", runs.peak_gib)
    here = hardware() == card.hardware
    for key, name in SPEED.items():
        if (stated := getattr(card, key)) is not None:
            tolerance = card.memory_tolerance if key == "memory_gib" else card.speed_tolerance
            yield Line(name, stated, speed.get(key, math.nan), tolerance if here else None)
    if card.resume_after is not None:
        runs.train("resumed", stop_after=card.resume_after)
        again = runs.train("resumed")
        others = sum(loss != losses.get(step) for step, loss in losses_of(again).items())
        yield Line("steps of the resumed run with another loss", 0, others, 0)
        weights = differing(find_checkpoint(run), find_checkpoint(again))
        yield Line("tensors of its last checkpoint that differ", 0, len(weights), 0)
    if card.conversion:
        runs.command("export", "export", "hf", run, runs.folder / "hf")
        runs.command("import", "import", "hf", runs.folder / "hf", runs.folder / "back")
        weights = differing(find_checkpoint(run), runs.folder / "back")
        yield Line("tensors that differ after export and import", 0, len(weights), 0)


def rounded(value: float) -> float:
    """Return a value in the six digits that a card states."""
    return float(f"{value:.6g}")


def rewrite(card: Card, file: Path, runs: Runs, lines: list[Line]) -> None:
    """Write the card anew with the values measured now."""
    run = runs.folder / "run"
    losses, record = losses_of(run), json.loads((run / "run.json").read_text())
    now = {line.name: line.now for line in lines}
    measured = Measured(
        time.strftime("%Y-%m-%d"),
        (record["git"] or {}).get("commit", ""),
        shlex.join(card.command()),
        record["versions"],
    )
    card = dataclasses.replace(
        card,
        hardware=hardware(),
        losses={step: rounded(losses[int(step)]) for step in card.losses},
        **{key: rounded(now[name]) for key, name in SPEED.items() if name in now},
        measured=measured,
    )
    with whole_file(file) as temporary:
        temporary.write_text(to_yaml(dataclasses.asdict(card)))


def main() -> int:
    """Run the card, print a table, and return 1 where a value is beyond its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("card", type=Path, help="a file of docs/cards")
    parser.add_argument("--write", action="store_true", help="put what is measured now into the card")
    parser.add_argument("--folder", type=Path, help="where runs and logs stay (default: a folder that is removed)")
    arguments = parser.parse_args()
    card = strict.typed(Card, strict_yaml.read_config(arguments.card), str(arguments.card))
    compose(card.recipe, card.changes)  # an error of the recipe, before any work
    print(f"{card.claim}\nmeasured on {card.hardware}, {card.measured.date}; this is {hardware()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="card-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty", hint="name a new folder: --folder ANOTHER")
        runs = Runs(card, folder.resolve())
        lines = list(compared(card, runs))
        if arguments.write:
            rewrite(card, arguments.card, runs, lines)
    table = Table("", "card", "now", "difference", "allowed", "", box=None, padding=(0, 2, 0, 0))
    for line in lines:
        allowed = "not judged: another machine" if line.allowed is None else f"{line.allowed:.2%}"
        verdict = "" if line.agrees else "[bold red]DIFFERS[/]"
        table.add_row(line.name, f"{line.stated:.6g}", f"{line.now:.6g}", f"{line.difference:.3%}", allowed, verdict)
    Console(soft_wrap=True).print(table, highlight=False)
    return 0 if all(line.agrees for line in lines) or arguments.write else 1


if __name__ == "__main__":
    report_mistakes()
    sys.exit(main())
