"""A case, tried: the fault, the same command again, the verdict. Undisturbed runs to compare with are made once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import verdict
from cases import DAMAGE, KINDS, Fault, fault, pair
from small_run import FORKS, Small, prepared, without_last
from stages import STAGES, Stage
from verdict import End

from nemotron_h.checkpoint import folders

INJECTOR = Path(__file__).with_name("injector.py")
NONE = Fault("none")
#: ours: a command of a few seconds that is not over by then hangs
LIMIT_S = 150
#: of the file system that fills: three checkpoints and what is beside them
DISK = "12m"


@dataclass
class Result:
    """The outcome of a case: one of `verdict`'s, why, and how long it took."""

    seed: int
    fault: str
    stage: str
    moment: str
    outcome: str
    problems: dict[str, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def failed(self) -> bool:
        """Tell whether it is a failure."""
        return self.outcome in verdict.FAILURES

    def json(self) -> str:
        """Return it as a line."""
        return json.dumps(asdict(self))


class Ground:
    """A folder with prepared texts, in which cases are tried."""

    def __init__(self, folder: Path) -> None:
        self.small: Small = prepared(folder)
        self.files: dict[str, list[int]] = {}

    def straight(self, stage: Stage) -> str:
        """Return the name of a stage's undisturbed run, which is made at the first call."""
        name = "straight" if stage.name == "pretrain" else f"straight_{stage.name.replace(', ', '_').replace(' ', '_')}"
        if name not in self.files:
            if stage.name not in ("pretrain", "prepare"):
                self.straight(STAGES["pretrain"])  # what tuning starts from, and the teacher
            if stage.data:
                stage.data(self.small)
            mark = self.small.folder / f"{name}.mark"
            end = self.command(stage, name, replace(NONE, folder=str(stage.folder(self.small, name)), mark=str(mark)))
            assert end.code == 0, end.out[-2000:] + end.err[-4000:]
            self.files[name] = [int(Path(f"{mark}.{rank}").read_text()) for rank in range(stage.ranks)]
        return name

    def command(self, stage: Stage, name: str, fault: Fault, *settings: str) -> End:
        """Run the command of a stage with a fault."""
        begun = time.monotonic()
        arguments = [json.dumps(fault.json()), *stage.command(self.small, name), *settings]
        where = {"folder": self.small.folder, "name": name, "ranks": stage.ranks, "seconds": LIMIT_S}
        code = FORKS.run(str(INJECTOR), *arguments, **where)
        seconds = time.monotonic() - begun
        out, err = ((self.small.folder / f"{name}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return End(code, out, err, seconds, seconds >= LIMIT_S)

    def trial(self, seed: int) -> Result:
        """Try the case of a seed."""
        begun = time.monotonic()
        kind, stage = pair(seed)
        straight = self.straight(stage)
        chosen = fault(seed, self.files[straight])
        name = f"case_{seed}"
        result = Result(seed, KINDS[kind], stage.name, chosen.moment(), verdict.PASS)
        folder = self.small.folder / name
        chosen = replace(
            chosen, folder=str(stage.folder(self.small, name)), mark=str(self.small.folder / f"{name}.mark")
        )
        if stage.name == "preference" and seed % 2:  # the reference's log-probs are computed anew then
            shutil.rmtree(self.small.folder / "data/pairs/.reference", ignore_errors=True)
        with contextlib.ExitStack() as stack:
            if kind == "full":
                folder.mkdir()
                problem = stack.enter_context(_small_disk(folder))
                if problem:
                    result.outcome, result.problems = verdict.SKIPPED, {verdict.SKIPPED: problem}
                    return result
                chosen = replace(chosen, disk=str(folder))
            tried = self._damaged if kind in DAMAGE else self._disturbed
            tried(result, stage, name, chosen, straight)
            failures = [each for each in verdict.FAILURES if result.problems.get(each)]
            result.problems = {each: said for each, said in result.problems.items() if said}
            result.outcome = failures[0] if failures else result.outcome
            result.seconds = round(time.monotonic() - begun, 1)
        if not result.failed():
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _disturbed(self, result: Result, stage: Stage, name: str, chosen: Fault, straight: str) -> None:
        """Disturb a run, then give the same command again."""
        first = self.command(stage, name, chosen)
        (self.small.folder / f"{name}.first.err").write_text(first.err)
        (self.small.folder / f"{name}.first.out").write_text(first.out)
        result.codes.append(first.code)
        if not Path(chosen.mark).exists():
            result.outcome, result.problems = verdict.MISSED, {verdict.MISSED: "the run was over before"}
        if first.hung:
            result.problems["HUNG"] = f"the disturbed run was not over after {LIMIT_S} s"
            return
        result.problems["POOR MESSAGE"] = verdict.of_end(first, chosen, stage)
        if chosen.disk:
            (Path(chosen.disk) / "filler").unlink(missing_ok=True)
        before, whole = verdict.recorded(self.small, name), self._newest(stage, name)
        self._again(result, stage, name)
        if result.problems.get("STUCK") or result.problems.get("HUNG"):
            return
        if stage.recipe is not None:
            left = first.code in (0, 75)
            result.problems["LOST WORK"] = verdict.of_resume(self.small, stage, name, before, whole, left)
        result.problems["DIVERGED"] = verdict.of_result(self.small, stage, name, straight)

    def _damaged(self, result: Result, stage: Stage, name: str, chosen: Fault, straight: str) -> None:
        """Damage the newest checkpoint of a run, read the error, do what it says."""
        rng = random.Random(chosen.amount)
        if rng.random() < 0.5:
            shutil.copytree(stage.folder(self.small, straight), stage.folder(self.small, name))
        else:
            without_last(self.small, straight, name)
        newest = folders.finished(stage.folder(self.small, name))[0]
        file = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size))
        result.moment = f"{file.relative_to(newest)} of {newest.name}: {_damage(file, chosen.kind, rng)}"
        refused = self.command(stage, name, NONE)
        result.codes.append(refused.code)
        way, problem = verdict.fix(refused, chosen, stage.folder(self.small, name))
        result.problems["DIVERGED" if refused.code == 0 else "POOR MESSAGE"] = problem or verdict.of_end(
            refused, chosen, stage
        )
        if problem:
            return
        if "=" not in way:
            subprocess.run(shlex.split(way), check=True)
        chosen_step = int(way[-6:]) if "=" in way else 0
        lines = (self.small.folder / straight / "steps.jsonl").read_text().splitlines(keepends=True)
        steps = [line for line in lines if json.loads(line)["step"] <= chosen_step]
        (self.small.folder / name / "steps.jsonl").write_text("".join(steps))
        self._again(result, stage, name, *([way] if "=" in way else []))
        if not result.problems.get("STUCK"):
            result.problems["DIVERGED"] = verdict.of_result(self.small, stage, name, straight, settings="=" in way)

    def _again(self, result: Result, stage: Stage, name: str, *settings: str) -> None:
        again = self.command(stage, name, NONE, *settings)
        result.codes.append(again.code)
        if again.hung:
            result.problems["HUNG"] = f"the next run was not over after {LIMIT_S} s"
        elif again.code != 0 or "Traceback" in again.err:
            result.problems["STUCK"] = f"the next run ended with {again.code}: {again.err[-400:]}"

    def _newest(self, stage: Stage, name: str) -> Path | None:
        whole = [p for p in folders.finished(stage.folder(self.small, name)) if not folders.damage(p)]
        return whole[0] if whole else None


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[str]:
    """Mount a file system of `DISK` bytes at a folder; yields why that cannot be, or an empty text."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        yield f"no small disk: {error}"
        return
    if done.returncode:
        yield f"no small disk: {done.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _damage(file: Path, kind: str, rng: random.Random) -> str:
    """Damage a file; return how."""
    size = file.stat().st_size
    if kind == "torn":
        left = rng.randrange(size)
        os.truncate(file, left)
        return f"{left} of {size} bytes left"
    at, bit = rng.randrange(size), rng.randrange(8)
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} flipped"
