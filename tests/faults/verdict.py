"""Verdict on a case: how each of its commands ended and what it said, and the run beside the undisturbed one."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from cases import DAMAGE, Fault
from injector import BUG
from small_run import Small, run_records
from stages import Stage

from nemotron_h.checkpoint import folders
from nemotron_h.core.files import file_sha256
from nemotron_h.core.locks import LOCK
from nemotron_h.launch.stages import digest

PASS, SKIPPED, MISSED = "PASS", "SKIPPED", "NOT REACHED"
#: the worst first; a case has the worst that it shows
FAILURES = ("HUNG", "STUCK", "DIVERGED", "LOST WORK", "POOR MESSAGE")
#: kind -> the signal that may end a run which does not listen yet
SIGNALS = {
    "kill": signal.SIGKILL,
    "kill_group": signal.SIGKILL,
    "term": signal.SIGTERM,
    "interrupt": signal.SIGINT,
    "interrupt_group": signal.SIGINT,
}
_LEFT_EARLY = 75


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code, output, standard error and seconds; `hung` where it had to be killed."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool


def of_end(end: End, fault: Fault, stage: Stage) -> str:
    """Return what is wrong with what a command said at its end; empty where nothing is."""
    said = end.out + end.err
    if fault.kind == "bug" and end.code not in (0, _LEFT_EARLY):
        return "" if BUG in end.err else f"exit code {end.code} without the exception's own words"
    if "Traceback" in said:
        last = [line for line in said.splitlines() if re.match(r"\w[\w.]*(Error|Exception|Interrupt)\b", line)]
        return f"exit code {end.code} with a traceback: {last[-1] if last else said[-200:]}"
    if end.code == 0:
        return ""
    if end.code == _LEFT_EARLY:
        told = "checkpoint written at step" in end.out and "the same command continues" in end.out
        return "" if told else "exit code 75 without the step and how to go on"
    if fault.kind in SIGNALS and end.code == 128 + SIGNALS[fault.kind] and "the same command continues" in end.out:
        return ""  # as shells have it
    if fault.kind in ("kill", "stop_for_good") and stage.ranks > 1:
        named = re.search(rf"no answer from rank {fault.ranks[0]}\b.*The same command continues", said, re.DOTALL)
        return "" if named else "the rank that is gone is not named by the other"
    if fault.kind in SIGNALS and end.code == -SIGNALS[fault.kind]:  # before its handler was there
        told = stage.ranks == 1 or "The same command continues" in said
        return "" if told else "the other rank does not say how to go on"
    if end.code == 2 and re.search(r"^error: .*\n(.*\n)*?fix: ", end.err, re.MULTILINE):
        of_a_file = fault.kind in (*DAMAGE, "full", "file_limit")
        return "the error names no file of the run" if of_a_file and fault.folder not in end.err else ""
    return f"exit code {end.code} without error and fix: {said[-200:]}"


def of_resume(small: Small, stage: Stage, name: str, before: list[int], whole: Path | None, left: bool) -> str:
    """Return what work a resumed run lost beyond its newest whole checkpoint; empty where none.

    Args:
        before: the steps that were recorded before it.
        whole: the newest checkpoint before it.
        left: the run before it said that it had written a checkpoint.
    """
    reached, kept = max(before, default=0), folders.step_of(whole) if whole else 0
    # one of this very step may be half written, and that of before where training went on while it was
    due = max(0, (reached - 1) // stage.every - 1) * stage.every if reached else 0
    if left and kept != reached:
        return f"left at step {reached} with a checkpoint of step {kept}"
    if kept < due:
        return f"step {reached} was done, the newest whole checkpoint is of step {kept}"
    lines = recorded(small, stage, name)
    if len(lines) > len(before) and lines[len(before)] != kept + 1:
        return f"resumed at step {lines[len(before)] - 1}, the newest whole checkpoint is of step {kept}"
    return ""


def recorded(small: Small, stage: Stage, name: str) -> list[int]:
    """Return the numbers of the steps of a run in the order in which they were done."""
    file = _record(small, stage, name)
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines = re.findall(r'^\{"step": (\d+)[,}](?:.*"began": ([\d.]+))?', text, re.MULTILINE)
    if stage.outside:
        lines = [line for line, _ in itertools.groupby(lines)]  # a validation is a line of its step too
    return [int(step) for step, _ in lines]


def _record(small: Small, stage: Stage, name: str) -> Path:
    """Return the file that has a line for each step of a run: the campaign's own, or the run's."""
    return stage.folder(small, name) / "progress.jsonl" if stage.outside else small.folder / name / "steps.jsonl"


def _steps(small: Small, stage: Stage, name: str) -> dict[int, dict]:
    """Return step -> what was recorded of it."""
    if not stage.outside:
        return small.steps(name)
    lines = [json.loads(line) for line in _record(small, stage, name).read_text().splitlines()]
    steps = {
        line["step"]: {"loss": line["loss"], "lr": line["lr"], "norm": line["metrics"]["grad_norm"]} for line in lines
    }
    for line in lines:  # each shows its process's last validation: after a start none, until the next one
        if line["validation_step"] in steps:
            steps[line["validation_step"]]["validation_loss"] = line["validation_loss"]
    return steps


def of_result(small: Small, stage: Stage, name: str, straight: str, settings: bool = False) -> str:
    """Return how a run's result differs from the undisturbed one's; empty where it does not.

    Args:
        settings: the last command had some, which its record names.
    """
    if stage.recipe is None:
        one, two = (_tree(stage.folder(small, each)) for each in (name, straight))
        differ = sorted(file for file in one.keys() | two.keys() if one.get(file) != two.get(file))
        return f"files differ: {', '.join(differ[:5])}" if differ else ""
    if not stage.trains:
        return _of_pipeline(stage.folder(small, name), stage.folder(small, straight))
    one, two = _steps(small, stage, name), _steps(small, stage, straight)
    differ = sorted(step for step in one.keys() | two.keys() if one.get(step) != two.get(step))
    if differ:
        keys = [key for key in two[differ[0]] if one.get(differ[0], {}).get(key) != two[differ[0]][key]]
        return f"steps {', '.join(map(str, differ))} differ, the first in {', '.join(keys)}"
    last = f"checkpoints/step-{stage.steps:06d}"
    written = [folders.read_integrity(stage.folder(small, each) / last) for each in (name, straight)]
    weights = [{file: entry for file, entry in each.items() if file.endswith(".distcp")} for each in written]
    if weights[0] != weights[1]:
        try:
            small.same_tensors(name, straight, stage.steps)
        except AssertionError as error:
            return f"weights or optimizer differ: {str(error)[-300:]}"
    numbers = [len(folders.finished(stage.folder(small, each))) for each in (name, straight)]
    if numbers[0] != numbers[1]:
        return f"{numbers[0]} checkpoints are kept, not {numbers[1]}"
    records = [run_records(stage.folder(small, each)) for each in (name, straight)]
    for file in ("run.json", f"{last}/run.json"):
        one, two = (each[file] for each in records)
        others = ("git.", "recipe.overrides") if settings else ("git.",)  # somebody may be at work in the repository
        keys = {key for key in one.keys() | two.keys() if not key.startswith(others)}
        differ = sorted(key for key in keys if one.get(key) != two.get(key))
        if differ:
            return f"{file} differs in {', '.join(differ[:5])}"
    return ""


def _of_pipeline(one: Path, two: Path) -> str:
    """Return in what a pipeline's stages differ: what they came to, what they wrote, and the steps of their runs."""
    for record in sorted(two.glob("*/stage.json")):
        stage, expected = record.parent.name, json.loads(record.read_text())
        found = json.loads((one / stage / "stage.json").read_text())
        for key in ("result", "outputs"):
            if found[key] != expected[key]:
                return f"{key} of {stage} differs: {found[key]}, not {expected[key]}"[:300]
        for output in expected["outputs"]:
            if digest(one / stage / output) != expected["outputs"][output]:
                return f"{stage}/{output} is another than its record says"
    for steps in sorted(two.glob("*/steps.jsonl")):
        file = steps.relative_to(two)
        if {*(one / file).read_text().splitlines()} != {*steps.read_text().splitlines()}:
            return f"{file} differs"
    return ""


def _tree(folder: Path) -> dict[str, str]:
    """Return the files of prepared data by name, with their sha256; of its caches the names alone."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    caches = (LOCK, ".scans.json")
    return {name: "" if name in caches else file_sha256(path) for name, path in files.items()}


def fix(end: End, fault: Fault, folder: Path) -> tuple[list[str], str]:
    """Return the way out that the error of a damaged file names, a setting alone or a command's words, and what is
    wrong with the error.
    """
    assert fault.kind in DAMAGE
    if end.code != 2:
        return [], f"damage ended in exit code {end.code}: {(end.out + end.err)[-200:]}"
    for pattern, way in (
        (r"resume\.resume_from_path=\S+", "{0}"),
        (r"remove the run's folder", f"rm -r {folder}"),
        (r"set it aside: (mv \S+ \S+)", "{1}"),
        (r"Run: (nemotron-h data prepare .*)", "{1}"),
        (r"remove (/\S+) and run again", "rm -r {1}"),
    ):
        if match := re.search(pattern, end.err):
            return shlex.split(way.format(match[0], *match.groups())), ""
    return [], f"the error names no way out: {end.err[-300:]}"
