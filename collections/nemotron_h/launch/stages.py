"""Run stages with declared inputs and outputs in order: resumed where they were interrupted, skipped when nothing that
they depend on has changed. Imports no torch.

A stage writes into `<folder>/<name>`. `begun.json` holds the inputs that it was begun with, by label; `stage.json` is
written last, with the sha256 of every declared output, and without it the stage is not done. The outputs' hashes are
inputs of the stages that follow, so a changed input runs again what depends on it and nothing else: where a stage comes
to the same outputs, what follows stays done. An interrupted stage finds its folder again, as long as its inputs are
those it was begun with; otherwise the folder is renamed to `<name>.before` (training is too costly to delete unasked).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256, read_json_object, write_json
from nemotron_h.core.locks import locked
from nemotron_h.core.strict import nearest
from nemotron_h.launch.jobs import check_none_queued
from nemotron_h.schema.recipe import RecipeConfig

RECORD = "stage.json"
BEGUN = "begun.json"
ASIDE = ".before"
#: keys of parts of a recipe that change no number
_PLACES = {"data": ("root", "workers")}

#: label -> plain JSON value: a stage's result depends on these
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """Step of a pipeline.

    Attributes:
        name: also of its folder.
        title: what it does, in a few words.
        needs: the stages whose outputs it reads; each comes before it.
        outputs: files of its folder that others read, or folders (their integrity file stands for all in them).
        inputs: what else its result depends on; asked each time, so it must be quick.
        run: does the work in the folder that it is given, which holds what an interrupted run of it left behind, and
            returns a line that says what came out. It reads the other stages through `Pipeline.folder`.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: Callable[[], Inputs]
    run: Callable[[Path], str]


@dataclass(frozen=True)
class State:
    """State of a stage.

    Attributes:
        word: `done`, `changed` (done with other inputs), `interrupted`, `waiting` (for another stage) or `to do`.
        why: the inputs that changed, or the stage that is waited for.
        result: the line that a finished stage left.
        seconds: that it took, over all its attempts; 0 where it is not finished.
    """

    word: str
    why: str = ""
    result: str = ""
    seconds: float = 0.0


@dataclass
class Pipeline:
    """Stages in their order, and the folder that they share.

    Attributes:
        folder: one folder per stage is made in it.
        stages: in order.
        say: told one line at a time.
    """

    folder: Path
    stages: Sequence[Stage]
    say: Callable[[str], None] = print

    def stage(self, name: str) -> Stage:
        """Return the stage of this name.

        Errors:
            UserError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise UserError(f"there is no stage {name!r}", hint=f"{nearest(name, names)}Known: {', '.join(names)}.")

    def path(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / name

    def states(self) -> dict[str, State]:
        """Return where every stage stands, by name, in order."""
        states: dict[str, State] = {}
        for stage in self.stages:
            waits = next((name for name in stage.needs if states[name].word != "done"), None)
            if waits is not None:
                states[stage.name] = State("waiting", f"for {waits}")
                continue
            record = _read(self.path(stage.name) / RECORD)
            inputs = self._inputs(stage)
            begun = _read(self.path(stage.name) / BEGUN)
            if record is not None and record["inputs"] == inputs:
                problem = self._damage(stage, record)
                states[stage.name] = (
                    State("changed", problem) if problem else State("done", "", record["result"], record["seconds"])
                )
            elif begun is not None and begun["inputs"] == inputs:
                states[stage.name] = State("interrupted")
            elif record is not None:
                states[stage.name] = State("changed", "; ".join(differences(record["inputs"], inputs)))
            else:
                states[stage.name] = State("to do")
        return states

    def run(self, only: str | None = None) -> None:
        """Run what is not done, in order.

        Args:
            only: run this stage alone; those that it reads must be done.
        Errors:
            UserError: there is no such stage, or a stage that it needs is not done; another process runs these
                stages; and what a stage raises.
        """
        hint = "wait until it has ended, or take another name or log.dir"
        with locked(self.folder, "written", "the pipeline's folder (log.dir and name)", hint):
            try:
                self._run_stages(only)
            except (KeyboardInterrupt, SystemExit):  # ctrl-c, SIGTERM
                self.say("stopped: the same command continues; finished stages are kept")
                raise

    def _run_stages(self, only: str | None) -> None:
        chosen = [self.stage(only)] if only else list(self.stages)
        for stage in chosen:
            state = self.states()[stage.name]
            place = f"[{list(self.stages).index(stage) + 1}/{len(self.stages)}] {stage.name}"
            if state.word == "done":
                self.say(f"{place}: done before; {state.result}")
                continue
            if state.word == "waiting":
                raise UserError(
                    f"stage {stage.name} waits {state.why}", hint="run that stage first, or all: leave --stage out"
                )
            reason = f"; changed: {state.why}" if state.word == "changed" else ""
            self.say(f"{place}: {stage.title}{' (continued)' if state.word == 'interrupted' else reason}")
            self._run(stage, place, anew=state.word == "changed")

    def _run(self, stage: Stage, place: str, anew: bool) -> None:
        folder, inputs = self.path(stage.name), self._inputs(stage)
        begun = _read(folder / BEGUN)
        if anew or begun is None or begun["inputs"] != inputs:
            self._set_aside(folder)
            folder.mkdir(parents=True)
            begun = {"inputs": inputs, "seconds": 0.0}
            write_json(folder / BEGUN, begun)
        started = time.monotonic()
        try:
            result = stage.run(folder)
        except UserError as error:
            raise self._with_way_out(error) from error
        finally:
            begun["seconds"] += time.monotonic() - started
            write_json(folder / BEGUN, begun)
        missing = [name for name in stage.outputs if not (folder / name).exists()]
        if missing:
            raise RuntimeError(f"stage {stage.name} did not write {', '.join(missing)}")
        record = {
            "inputs": inputs,
            "outputs": {name: digest(folder / name) for name in stage.outputs},
            "result": result,
            "seconds": round(begun["seconds"], 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(folder / RECORD, record)
        self.say(f"{place}: {result} ({_minutes(record['seconds'])})")

    def _with_way_out(self, error: UserError) -> UserError:
        """Return an error of a damaged checkpoint of a stage with what makes that anew; another one as it is."""
        damaged = re.search(r"checkpoint (\S+) is damaged", error.message)
        for folder in (self.path(stage.name) for stage in self.stages):
            if damaged and Path(damaged[1]).resolve().is_relative_to(folder.resolve()):
                return UserError(error.message, hint=f"remove {folder} and run again")
        return error

    def _set_aside(self, folder: Path) -> None:
        """Make way for other inputs; the work of the time before is kept once."""
        if not folder.exists():
            return
        check_none_queued(folder)
        aside = folder.with_name(folder.name + ASIDE)
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        self.say(f"what was there before is now {aside}")

    def _inputs(self, stage: Stage) -> dict[str, Any]:
        """Return all that the stage depends on, through JSON, so that it compares with what was written."""
        needs = {f"{name}/{file}": sha for name in stage.needs for file, sha in outputs(self.path(name)).items()}
        return json.loads(json.dumps({**stage.inputs(), **needs}))

    def _damage(self, stage: Stage, record: Mapping[str, Any]) -> str:
        """Return the first output that is not what was written, "" where all are."""
        for name, expected in record["outputs"].items():
            path = self.path(stage.name) / name
            if not path.exists():
                return f"{name} is missing"
            if digest(path) != expected:
                return f"{name} was edited"
        return ""


def outputs(stage: Path) -> Inputs:
    """Return the hashes of a stage's outputs, by file, of its folder; nothing where it is not finished."""
    record = _read(stage / RECORD)
    return record["outputs"] if record else {}


def settings(recipe: RecipeConfig, parts: Sequence[str]) -> dict[str, Any]:
    """Return the keys of parts of a recipe, for a stage's inputs: without those that tell where data lie."""
    inputs: dict[str, Any] = {}
    for part in parts:
        value = getattr(recipe, part)
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        if isinstance(value, dict):
            inputs |= {f"{part}.{key}": entry for key, entry in value.items() if key not in _PLACES.get(part, ())}
        else:
            inputs[part] = value
    return inputs


def digest(path: Path) -> str:
    """Return the sha256 of a file; `content_digest` of a checkpoint or a run's newest; of other folders, the sha256 of
    their files' hashes.
    """
    if path.is_file():
        return file_sha256(path)
    from nemotron_h.checkpoint import folders

    if (path / folders.INTEGRITY).is_file():
        return content_digest(path)
    if newest := folders.newest(path):
        return content_digest(newest)
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256(json.dumps([[name, file_sha256(path / name)] for name in names]).encode()).hexdigest()


def content_digest(checkpoint: Path) -> str:
    """Return the sha256 of the part of a checkpoint's integrity file that lists the tensors' files, for its weights.

    The other files of a checkpoint hold dates, paths, a number drawn for each write and the trainer's counters, which
    differ between two runs to the same weights.
    """
    from nemotron_h.checkpoint import folders

    try:
        listed = folders.read_integrity(checkpoint)
    except UserError as error:
        raise UserError(f"{checkpoint} is not a finished checkpoint: {error.message}") from error
    weights = {name: entry for name, entry in listed.items() if name.endswith(".distcp")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def differences(before: Inputs, now: Inputs) -> list[str]:
    """Return the inputs that differ, each with its values where they are short."""
    changes = []
    for label in sorted({*before, *now}):
        old, new = before.get(label), now.get(label)
        if old != new:
            short = all(len(str(value)) <= 40 for value in (old, new))
            changes.append(f"{label}: {old} before, {new} now" if short else label)
    return changes


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_json_object(path)
    except UserError as error:
        raise UserError(f"{error.message}: damaged", hint=f"remove {path.parent} and run again") from error


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
