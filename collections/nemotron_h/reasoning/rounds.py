"""Rounds of preference training on a model's own solutions, as stages that resume.

<log.dir>/<name>/measure-0/    results.json: the start on the test problems; samples/
                 sample-N/     samples/ of the training problems, by the model of the round before
                 pairs-N/      pairs.jsonl and its blend; summary.json
                 train-N/      the run of the round, an ordinary preference training; results.json: its checkpoint
                 measure-N/    as measure-0
                 report/       report.html, rounds.csv, rounds.svg

A round that finds no pair ends the rounds: what follows says so and does nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256, write_json
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.evaluation.coverage.results import Tally
from nemotron_h.evaluation.coverage.solutions import form_of, judged, sampled
from nemotron_h.evaluation.problems.files import read_problems, training_problems
from nemotron_h.evaluation.problems.generate import TEST
from nemotron_h.evaluation.problems.problem import Problem
from nemotron_h.evaluation.problems.solutions import PAIRS, RIGHT, VALIDATION, write_solutions
from nemotron_h.inference.sampling import Sampling
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run, complete
from nemotron_h.launch.stages import Pipeline, Stage, content_digest, settings
from nemotron_h.reasoning import report
from nemotron_h.recipe.checks import check, definition_of
from nemotron_h.schema.reason import ROUNDS
from nemotron_h.schema.recipe import PIPELINES, RecipeConfig

RESULTS, SUMMARY = "results.json", "summary.json"
#: stages whose models answer in a chat template
_TUNED = ("sft", "preference")
#: parts of the recipe that the training of a round depends on
_MATTERS = (
    *("tokens", "precision", "init_seed", "data", "optim", "parallel", "precision_options", "recompute", "preference"),
    "overrides",
)

#: trains a run to its end and returns its folder: `launch.runs.complete`, or what a test puts in its place
Train = Callable[[Run, str, Console], Path]


def run_of(recipe: RecipeConfig, name: str, start: Path, blend: str, folder: Path) -> Run:
    """Return the training of a round.

    Args:
        recipe: of the rounds, whose loss, data, optimizer, precision and layout are taken.
        name: of the run.
        start: checkpoint that it begins with.
        blend: of its pairs.
        folder: the run writes to `<folder>/<name>`, and its data lie in `<folder>/data`.
    Errors:
        UserError: the recipe does not fit the pairs.
    """
    own = copy.deepcopy(recipe)
    own.stage, own.name, own.reason = "preference", name, None
    own.init.checkpoint = str(start)
    own.data.blend, own.data.root, own.log.dir = blend, str(folder / "data"), str(folder)
    own.sources = {key: text for key, text in own.sources.items() if key.partition(".")[0] not in PIPELINES}
    check(own, f"recipe {recipe.name}, {name}")
    return Run(name, own)


def planned(recipe: RecipeConfig) -> list[Run]:
    """Return the training of the first round as it would be started."""
    folder = Path(recipe.log.dir) / recipe.name / "train-1"
    return [run_of(recipe, f"{recipe.name}-1", Path(recipe.reason.start), ROUNDS, folder)]


class Rounds:
    """The rounds of a recipe.

    Args:
        recipe: of stage `reason`.
        console: where progress goes.
        train: trains a run to its end; None takes `launch.runs.complete`.
        origin: stands for the recipe in errors: its file.
        place: where the trainings run. Samples are drawn by this process.
    Errors:
        UserError: the start is missing, damaged or another model than the recipe's; there are no problems.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        console: Console,
        train: Train | None = None,
        origin: str | None = None,
        place: Place = HERE,
    ) -> None:
        self.recipe, self.part, self.console = recipe, recipe.reason, console
        self.train = train or partial(complete, place=place)
        self.origin = origin or f"recipe {recipe.name}"
        self.folder = Path(recipe.log.dir) / recipe.name
        self.start = self._start()
        path = Path(self.part.problems).expanduser()
        if not path.is_dir():
            raise UserError(
                f"{self.origin}: reason.problems: there is no folder {path}",
                hint="write one: nemotron-h data problems --out DIR",
            )
        self.problems = {"train": training_problems(path), "test": read_problems(path / f"{TEST}.jsonl")[0]}
        self.chat = (read_record(self.start).get("recipe") or {}).get("stage") in _TUNED
        if self.part.thinking is not None and not self.chat:
            raise UserError(
                f"{self.origin}: reason.thinking = {self.part.thinking} is for conversations, and {self.start} was not "
                "tuned on them",
                hint="leave it out, or name a fine-tuned start",
            )

    def _start(self) -> Path:
        key = f"{self.origin}: reason.start"
        try:
            checkpoint = find_checkpoint(Path(self.part.start).expanduser())
        except UserError as error:
            hint = error.hint or "train it first, or name another: reason.start=runs/NAME"
            raise UserError(f"{key}: {error.message}", hint=hint) from error
        held = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
        if changed := held.differences(
            definition_of(self.recipe, self.origin), "there", "in the recipe", but=("name",)
        ):
            raise UserError(
                f"{key}: {checkpoint} is another model: {'; '.join(changed)}", hint="name its recipe's model"
            )
        return checkpoint

    @cached_property
    def pipeline(self) -> Pipeline:
        """Return the stages, ready to run."""
        stages = [self._measure(0)]
        for number in range(1, self.part.rounds + 1):
            stages += [self._sample(number), self._pairs(number), self._train(number), self._measure(number)]
        needs = tuple(stage.name for stage in stages if not stage.name.startswith("sample"))
        draw = partial(report.write, recipe=self.recipe, read=self.read)
        stages.append(Stage("report", "table and figure by round", needs, report.FILES, dict, draw))
        say = partial(self.console.print, highlight=False, markup=False, soft_wrap=True)
        return Pipeline(self.folder, stages, say)

    def read(self, stage: str, file: str = RESULTS) -> Any:
        """Return a JSON output of a finished stage."""
        return json.loads((self.folder / stage / file).read_text())

    # what stages depend on

    def _sampling_inputs(self, kind: str, number: int) -> dict[str, Any]:
        """Return inputs of samples: problems, settings, and the start's weights where no round was before."""
        problems = json.dumps([vars(problem) for problem in self.problems[kind]])
        keys = ("samples", "temperature", "top_p", "max_tokens", "thinking", "thought_budget")
        weights = {} if number else {"reason.start": content_digest(self.start)}
        return {
            **{f"reason.{key}": getattr(self.part, key) for key in keys},
            **weights,
            f"{kind} problems": hashlib.sha256(problems.encode()).hexdigest(),
            "data.seed": self.recipe.data.seed,
        }

    def _model(self, number: int) -> tuple[Path, str]:
        """Return the checkpoint after a round, of the start after round 0; and why there is none of its own, if so."""
        if number == 0:
            return self.start, ""
        trained = self.read(f"train-{number}")
        return Path(trained["checkpoint"]), trained["ended"]

    # stages

    def _sample(self, number: int) -> Stage:
        before = (f"train-{number - 1}",) if number > 1 else ()
        inputs = partial(self._sampling_inputs, "train", number - 1)
        title = f"{self.part.samples} solutions of each training problem"
        return Stage(f"sample-{number}", title, before, (SUMMARY,), inputs, partial(self._draw_round, number))

    def _draw_round(self, number: int, folder: Path) -> str:
        checkpoint, ended = self._model(number - 1)
        write_json(folder / SUMMARY, {"ended": ended, "checkpoint": str(checkpoint)})
        if ended:
            return ended
        samples = self._drawn(checkpoint, "train", self.recipe.data.seed + number, folder)[1]
        files = {file.name: file_sha256(file) for file in sorted(samples.file.parent.iterdir())}
        write_json(folder / SUMMARY, {"ended": "", "checkpoint": str(checkpoint), "samples": files})
        return f"{sum(map(len, samples.by_problem)):,} samples"

    def _drawn(self, checkpoint: Path, kind: str, seed: int, folder: Path) -> Any:
        part = self.part
        options = {"dtype": None, "device": None, "batch": None, "max_tokens": part.max_tokens, "chat": self.chat}
        options |= {"thinking": part.thinking, "thought_budget": part.thought_budget}
        options["sampling"] = Sampling(part.temperature, 0, part.top_p, seed)
        return sampled(checkpoint, self.problems[kind], part.samples, options, folder, self.console)

    def _pairs(self, number: int) -> Stage:
        needs = (f"sample-{number}",)

        def inputs() -> dict[str, Any]:
            validated = bool(self.recipe.log.validation_batches)
            return {"reason.pairs": self.part.pairs, "data.seed": self.recipe.data.seed, "validation": validated}

        return Stage(
            f"pairs-{number}", "pairs of right and wrong ones", needs, (SUMMARY,), inputs, partial(self._choose, number)
        )

    def _choose(self, number: int, folder: Path) -> str:
        before = self.read(f"sample-{number}", SUMMARY)
        if before["ended"]:
            write_json(folder / SUMMARY, before)
            return before["ended"]
        checkpoint, there = Path(before["checkpoint"]), self.folder / f"sample-{number}"
        model, samples = self._drawn(checkpoint, "train", self.recipe.data.seed + number, there)  # they are all there
        told = write_solutions(
            folder,
            judged(self.problems["train"], samples, self.part.samples),
            form_of(model, self.chat, self.part.thinking),
            RIGHT,
            self.part.pairs,
            self.recipe.data.seed,
            VALIDATION if self.recipe.log.validation_batches else 0.0,
        )
        drawn = sum(row[2] for row in told.rows)
        share = sum(row[2] * row[3] for row in told.rows) / drawn
        sides = f"{told.all_right:,} problems have no wrong solution, {told.all_wrong:,} no right one"
        ended = "" if told.pairs else f"ended in round {number}: no pairs are left ({sides})"
        counts = {"pairs": told.pairs, "all_right": told.all_right, "all_wrong": told.all_wrong, "right": share}
        files = {file.name: file_sha256(file) for file in told.files}
        write_json(folder / SUMMARY, {"ended": ended, "checkpoint": str(checkpoint), **counts, "files": files})
        return ended or f"{told.pairs:,} pairs; {share:.1%} of the samples are right; {sides}"

    def _train(self, number: int) -> Stage:
        def inputs() -> dict[str, Any]:
            return settings(self.recipe, _MATTERS)

        title = f"preference training for {self.recipe.tokens} tokens"
        return Stage(
            f"train-{number}", title, (f"pairs-{number}",), (RESULTS,), inputs, partial(self._train_round, number)
        )

    def _train_round(self, number: int, folder: Path) -> str:
        pairs = self.read(f"pairs-{number}", SUMMARY)
        checkpoint, ended, name = Path(pairs["checkpoint"]), pairs["ended"], f"{self.recipe.name}-{number}"
        if not ended:
            blend = (self.folder / f"pairs-{number}" / f"{PAIRS}.yaml").resolve()
            run = run_of(self.recipe, name, checkpoint, str(blend), folder)
            prepare(load_blend(blend), run.recipe.data.root, console=self.console)
            checkpoint = find_checkpoint(self.train(run, f"  {name}", self.console))
        weights = content_digest(checkpoint)
        write_json(folder / RESULTS, {"ended": ended, "checkpoint": str(checkpoint), "weights": weights})
        return ended or str(checkpoint)

    def _measure(self, number: int) -> Stage:
        needs = (f"train-{number}",) if number else ()
        inputs = partial(self._sampling_inputs, "test", number)
        title = f"{self.part.samples} solutions of each test problem"
        return Stage(f"measure-{number}", title, needs, (RESULTS,), inputs, partial(self._measure_round, number))

    def _measure_round(self, number: int, folder: Path) -> str:
        checkpoint, ended = self._model(number)
        if ended:
            write_json(folder / RESULTS, {"ended": ended})
            return ended
        problems: list[Problem] = self.problems["test"]
        model, samples = self._drawn(checkpoint, "test", self.recipe.data.seed, folder)
        tally, most = Tally.of(model.name, samples, problems), self.part.samples
        one, all_of_them = (tally.values(np.full(len(problems), k), self.recipe.data.seed) for k in (1, most))
        values = {"pass_1": one["coverage"], "pass_k": all_of_them["coverage"], "majority": all_of_them["majority"]}
        result = {name: each.tolist() for name, each in values.items()}
        content = {"ended": "", "values": result, "tokens": tally.tokens / int(tally.drawn.sum())}
        write_json(folder / RESULTS, {**content, "ended_by": tally.ended_by, "checkpoint": str(checkpoint)})
        means = {name: float(each.mean()) for name, each in values.items()}
        return f"pass@1 {means['pass_1']:.3f}, pass@{most} {means['pass_k']:.3f}, majority {means['majority']:.3f}"
