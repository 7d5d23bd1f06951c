"""The things that the stages of a compression share, beside each other's outputs.

<log.dir>/<name>/importance/    importance.json, importance.safetensors
                 candidates/    candidates.json: every architecture of the grid within the budget
                 score/         scores.jsonl (a line as each is scored), ranking.json
                 short-distil/  NAME-pruned (checkpoint), NAME (run), for each of the best; results.json
                 select/        winner.json
                 distil/        <name> (run): its checkpoint is the child; results.json
                 export/        hf/, model.yaml, report.html, result.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression import distillations
from nemotron_h.compression.candidates import Candidate, Candidates
from nemotron_h.compression.child import Child, child_definition
from nemotron_h.compression.importance import Importance, Scores
from nemotron_h.compression.pipeline.parent import Parent
from nemotron_h.compression.pipeline.text import CHOICE, HALVES, REPORTED, Text, named
from nemotron_h.compression.selection import child_of
from nemotron_h.compression.slicing import slice_model, write_child
from nemotron_h.compression.stages import content_digest
from nemotron_h.compression.task_scores import task_scores
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.schema.recipe import RecipeConfig

#: trains a run to its end and returns its folder: `distillations.train`, or what a test puts in its place
Train = Callable[[Run, str, Console], Path]


class Context:
    """A compression's recipe, text and parent, and the children that candidates stand for.

    Args:
        recipe: of stage minipuzzle.
        console: where progress goes.
        train: trains a run to its end; None takes `distillations.train`.
        origin: stands for the recipe in errors: its file.
        place: where the distillations run.
    Errors:
        UserError: the parent is missing, damaged or of another model than the recipe's; its tokenizer is not the
            data's; the data is not prepared, or has fewer samples than are asked for; no candidate fits the budget
            (where the grid gives a depth, the stage that makes them says so).
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        console: Console,
        train: Train | None = None,
        origin: str | None = None,
        place: Place = HERE,
    ) -> None:
        self.recipe, self.part, self.console, self.place = recipe, recipe.minipuzzle, console, place
        self.train, self._trains = train or partial(distillations.train, place=place), train is None
        self.origin = origin or f"recipe {recipe.name}"
        self.folder = Path(recipe.log.dir) / recipe.name
        self.text = Text(recipe, self.origin)
        self.parent = Parent(recipe, self.text, self.origin, console)
        self.definition = self.parent.definition
        self.text.check()
        if not self.part.grid.depth:  # which layers fill a depth is known when their importance is
            self.candidates(None)

    def candidates(self, layer_scores: np.ndarray | None) -> Candidates:
        """Return the candidates of the recipe's grid and budget."""
        with named(f"{self.origin}: minipuzzle"):
            return Candidates(self.definition, self.part.grid, self.part.budget, layer_scores)

    def path(self, stage: str, file: str) -> Path:
        """Return the path of a stage's output."""
        return self.folder / stage / file

    def read(self, stage: str, file: str) -> Any:
        """Return a JSON output of a finished stage."""
        return json.loads(self.path(stage, file).read_text())

    # children

    @cached_property
    def importance(self) -> Importance:
        """Return the result of the first stage."""
        return Importance.load(self.folder / "importance", self.definition)

    @cached_property
    def scores(self) -> Scores:
        """Return the order in which layers and channels stay; a control has another."""
        return self.importance.scores().ordered(self.part.order, self.recipe.init_seed)

    def child(self, candidate: Candidate) -> Child:
        """Return what of the parent a candidate keeps."""
        return child_of(self.definition, self.scores, candidate)

    def name_of(self, candidate: Candidate) -> str:
        """Return the name of a candidate's model definition."""
        return f"{self.definition.name}-{candidate.name}"

    def definition_of(self, candidate: Candidate) -> ModelDefinition:
        """Return a candidate's definition."""
        return child_definition(self.definition, self.child(candidate), self.name_of(candidate))

    def realised(self, candidate: Candidate) -> GenerationModel:
        """Return a candidate over the parent's weights."""
        return slice_model(self.parent.model, self.child(candidate), self.name_of(candidate))

    def pruned(self, folder: Path, candidate: Candidate) -> Path:
        """Return the candidate's checkpoint before any training, in a stage's folder; it is written once."""
        path = folder / f"{candidate.name}-pruned"
        if not (path / "integrity.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
            write_child(self.parent.checkpoint, self.child(candidate), path, self.name_of(candidate))
        return path

    # distillations

    def distillation_inputs(self) -> dict[str, Any]:
        """Return a stage's inputs: teacher, text and settings of its distillations."""
        return {**self.parent.inputs(), **self.text.inputs("train"), **distillations.settings(self.recipe)}

    def distillation(self, name: str, candidate: Candidate, start: Path, tokens: str, folder: Path) -> Run:
        """Return a candidate's distillation from the parent; arguments as of `distillations.run_of`."""
        student = self.definition_of(candidate)
        return distillations.run_of(self.recipe, name, student, start, self.parent.checkpoint, tokens, folder)

    def train_together(self, runs: Sequence[Run]) -> None:
        """Train distillations beside each other, without the parent in this process; `trained` then returns each."""
        self.parent.release()
        if self._trains:
            distillations.train_together(runs, self.console, self.place)

    def trained(self, run: Run, title: str) -> Path:
        """Train a distillation, without the parent in this process, and return its folder."""
        self.parent.release()
        return self.train(run, title, self.console)

    def measure(self, checkpoint: Path) -> dict[str, Any]:
        """Measure a trained model on the text of the report, under `choice` on that of the choices, and on the recipe's
        evaluation.
        """
        for half in HALVES:  # then the parent makes way
            self.parent.predictions(half)
        self.parent.release()
        checkpoint = find_checkpoint(checkpoint)
        model = load_model(checkpoint, dtype=self.parent.dtype, device=self.parent.device)
        result: dict[str, Any] = {"checkpoint": str(checkpoint), "weights": content_digest(checkpoint)}
        result |= asdict(self.parent.score(model, REPORTED))
        result[CHOICE] = asdict(self.parent.score(model, CHOICE))
        if self.part.evaluate:
            result["evaluated"] = task_scores(self.part.evaluate, checkpoint, self.origin)
        return result
