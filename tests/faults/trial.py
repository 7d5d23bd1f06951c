"""A case, tried: the fault, the same command again, the verdict. Undisturbed runs to compare with are made once."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import damage
import outside
import verdict
from cases import DAMAGE, KINDS, Fault, case_of, fault
from small_run import FORKS, Small, prepared
from stages import STAGES, Stage
from verdict import End

from nemotron_h.checkpoint import folders

INJECTOR = Path(__file__).with_name("injector.py")
NONE = Fault("none")
#: ours: a command of a few seconds that is not over by then hangs
LIMIT_S = 300
#: a folder that another process still writes is tried again after so long
WAIT_S = 2


@dataclass
class Result:
    """The outcome of a case: one of `verdict`'s, why, and how long it took."""

    case: str
    moment: str
    outcome: str
    problems: dict[str, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        """Return stage and kind."""
        stage, kind, _ = self.case.split("/")
        return stage, kind

    def failed(self) -> bool:
        """Tell whether it is a failure."""
        return self.outcome in verdict.FAILURES

    def line(self) -> str:
        """Return what happened, for a reader."""
        stage, kind = self.pair
        said = "; ".join(f"{outcome}: {problem}" for outcome, problem in self.problems.items())
        return f"{self.case}: {KINDS[kind]}, {stage}, {self.moment}, exit codes {self.codes}: {said or self.outcome}"

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
        stage = STAGES[stage.twin]
        name = "straight" if stage.name == "pretrain" else f"straight_{stage.name}"
        if name not in self.files:
            if stage.name not in ("pretrain", "prepare"):
                self.straight(STAGES["pretrain"])  # what tuning starts from, teacher and parent
            if stage.data:
                stage.data(self.small)
            mark, run = self.small.folder / f"{name}.mark", stage.place or name
            end = self.command(stage, run, replace(NONE, folder=str(stage.folder(self.small, run)), mark=str(mark)))
            assert end.code == 0, end.out[-2000:] + end.err[-4000:]
            (self.small.folder / run).rename(self.small.folder / name)
            self.files[name] = [int(Path(f"{mark}.{rank}").read_text()) for rank in range(stage.ranks)]
        return name

    def command(self, stage: Stage, name: str, fault: Fault, *settings: str) -> End:
        """Run the command of a stage with a fault."""
        begun = time.monotonic()
        command = [*stage.command(self.small, name), *settings]
        if stage.outside:
            code = outside.run(command, fault, self.small.folder, name, LIMIT_S)
        else:
            where = {"folder": self.small.folder, "name": name, "ranks": stage.ranks, "seconds": LIMIT_S}
            code = FORKS.run(str(INJECTOR), json.dumps(fault.json()), *command, **where)
        seconds = time.monotonic() - begun
        out, err = ((self.small.folder / f"{name}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return End(code, out, err, seconds, seconds >= LIMIT_S)

    def trial(self, case: str) -> Result:
        """Try a case."""
        begun = time.monotonic()
        stage, kind, number = case_of(case)
        straight = self.straight(stage)
        chosen = fault(case, self.files[straight])
        named = case.replace("/", "_")
        name = stage.place or named
        result = Result(case, chosen.moment(), verdict.PASS)
        folder, mark = self.small.folder / name, self.small.folder / f"{name}.mark"
        chosen = replace(chosen, folder=str(stage.folder(self.small, name)), mark=str(mark))
        if stage.name == "preference" and number % 2:  # the reference's log-probs are computed anew then
            shutil.rmtree(self.small.folder / "data/pairs/.reference", ignore_errors=True)
        with contextlib.ExitStack() as stack:
            if kind == "full":
                folder.mkdir()
                problem = stack.enter_context(_small_disk(folder, stage.disk))
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
            if result.failed() and (kind == "full" or stage.place):  # the small disk goes, the place is used again
                shutil.copytree(folder, self.small.folder / f"{named}.left")
        if not result.failed() or stage.place:
            shutil.rmtree(folder, ignore_errors=True)
        mark.unlink(missing_ok=True)
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
        before, whole = verdict.recorded(self.small, stage, name), self._newest(stage, name)
        self._again(result, stage, name)
        if result.problems.get("STUCK") or result.problems.get("HUNG"):
            return
        if stage.trains:
            left = first.code in (0, 75)
            result.problems["LOST WORK"] = verdict.of_resume(self.small, stage, name, before, whole, left)
        result.problems["DIVERGED"] = verdict.of_result(self.small, stage, name, straight)

    def _damaged(self, result: Result, stage: Stage, name: str, chosen: Fault, straight: str) -> None:
        """Damage a file of a run or of its data; where the command refuses it, do what the error says."""
        rng = random.Random(chosen.amount)
        damage.begin_from(self.small, stage, straight, name, chosen.kind, rng)
        self._record_steps(stage, name, straight)
        root, files = damage.files(self.small, stage, name, chosen.kind)
        with damage.restored(root if root.is_relative_to(self.small.folder / "data") else None):
            file = rng.choice(files)
            result.moment = f"{file.relative_to(root.parent)}: {damage.damage(file, chosen.kind, rng)}"
            first = self.command(stage, name, NONE)
            (self.small.folder / f"{name}.first.err").write_text(first.err)
            result.codes.append(first.code)
            way: list[str] = []
            if first.code or (stage.trains and chosen.kind in ("torn", "flipped")):
                way, problem = verdict.fix(first, chosen, stage.folder(self.small, name))
                poor = problem or verdict.of_end(first, replace(chosen, folder=str(root)), stage)
                result.problems["DIVERGED" if first.code == 0 else "POOR MESSAGE"] = poor
                if problem:
                    return
                self._follow(stage, name, straight, way)
                self._again(result, stage, name, *[each for each in way if "=" in each][:1])
            elif "Traceback" in first.err:
                result.problems["POOR MESSAGE"] = f"a traceback: {first.err[-200:]}"
            if not result.problems.get("STUCK") and not result.problems.get("HUNG"):
                settings = len(way) == 1
                result.problems["DIVERGED"] = verdict.of_result(self.small, stage, name, straight, settings)

    def _follow(self, stage: Stage, name: str, straight: str, way: list[str]) -> None:
        """Do what an error says: a setting is for the next command, a command is run."""
        if len(way) > 1 and way[0] == "nemotron-h":
            FORKS.run("nemotron_h", *way[1:], folder=self.small.folder, name=f"{name}.fix")
        elif len(way) > 1:
            subprocess.run(way, check=True)
        self._record_steps(stage, name, straight, int(way[0][-6:]) if len(way) == 1 else None)

    def _record_steps(self, stage: Stage, name: str, straight: str, step: int | None = None) -> None:
        """Record the steps up to a run's newest checkpoint as the undisturbed run did."""
        if not stage.trains or stage.outside:
            return
        found = folders.finished(stage.folder(self.small, name))
        last = step if step is not None else folders.step_of(found[0]) if found else 0
        lines = (self.small.folder / straight / "steps.jsonl").read_text().splitlines(keepends=True)
        steps = [line for line in lines if json.loads(line)["step"] <= last]
        (self.small.folder / name / "steps.jsonl").write_text("".join(steps))

    def _again(self, result: Result, stage: Stage, name: str, *settings: str) -> None:
        for _ in range(5):
            again = self.command(stage, name, NONE, *settings)
            if "by another process" not in again.err:  # a run that ends with its pipeline writes a checkpoint first
                break
            time.sleep(WAIT_S)
        result.codes.append(again.code)
        if again.hung:
            result.problems["HUNG"] = f"the next run was not over after {LIMIT_S} s"
        elif again.code != 0 or "Traceback" in again.err:
            result.problems["STUCK"] = f"the next run ended with {again.code}: {again.err[-400:]}"

    def _newest(self, stage: Stage, name: str) -> Path | None:
        whole = [p for p in folders.finished(stage.folder(self.small, name)) if not folders.damage(p)]
        return whole[0] if whole else None


@contextlib.contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[str]:
    """Mount a file system of a size at a folder; yields why that cannot be, or an empty text."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
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
