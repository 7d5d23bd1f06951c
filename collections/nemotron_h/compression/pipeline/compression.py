"""The things that every compression has: a recipe, its text and parent, and distillations from the parent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression import distillations
from nemotron_h.compression.importance import Importance
from nemotron_h.compression.pipeline.parent import Parent
from nemotron_h.compression.pipeline.text import CHOICE, HALVES, REPORTED, Text
from nemotron_h.inference.model import load_model
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run, complete
from nemotron_h.launch.stages import Pipeline, Stage, content_digest, settings
from nemotron_h.schema.recipe import RecipeConfig

#: trains a run to its end and returns its folder: `launch.runs.complete`, or what a test puts in its place
Train = Callable[[Run, str, Console], Path]


class Compression:
    """A compression's recipe, text and parent.

    Args:
        recipe: of a stage of `PIPELINES`.
        console: where progress goes.
        train: trains a run to its end; None takes `launch.runs.complete`.
        origin: stands for the recipe in errors: its file.
        place: where the distillations run.
    Errors:
        UserError: the parent is missing, damaged or of another model than the recipe's; its tokenizer is not the
            data's; the data is not prepared, or has fewer samples than are asked for.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        console: Console,
        train: Train | None = None,
        origin: str | None = None,
        place: Place = HERE,
    ) -> None:
        self.recipe, self.part, self.console, self.place = recipe, getattr(recipe, recipe.stage), console, place
        self.train, self._trains = train or partial(complete, place=place), train is None
        self.origin = origin or f"recipe {recipe.name}"
        self.folder = Path(recipe.log.dir) / recipe.name
        self.text = Text(recipe, self.origin)
        self.parent = Parent(recipe, self.text, self.origin, console)
        self.definition = self.parent.definition
        self.text.check()

    def stages(self) -> list[Stage]:
        """Return the stages, in order."""
        raise NotImplementedError

    @cached_property
    def pipeline(self) -> Pipeline:
        """Return the stages, ready to run."""
        return Pipeline(
            self.folder,
            self.stages(),
            lambda line: self.console.print(line, highlight=False, markup=False, soft_wrap=True),
        )

    def path(self, stage: str, file: str) -> Path:
        """Return the path of a stage's output."""
        return self.folder / stage / file

    def read(self, stage: str, file: str) -> Any:
        """Return a JSON output of a finished stage."""
        return json.loads(self.path(stage, file).read_text())

    def keys(self, *names: str) -> dict[str, Any]:
        """Return keys of the compression's part of the recipe, for a stage's inputs."""
        return {f"{self.recipe.stage}.{name}": getattr(self.part, name) for name in names}

    @cached_property
    def importance(self) -> Importance:
        """Return the result of the first stage."""
        return Importance.load(self.folder / "importance", self.definition)

    def distillation_inputs(self) -> dict[str, Any]:
        """Return a stage's inputs: teacher, text and settings of its distillations."""
        return {**self.parent.inputs(), **self.text.inputs("train"), **settings(self.recipe, distillations.MATTERS)}

    def distillation(self, name: str, student: ModelDefinition, start: Path, tokens: str, folder: Path) -> Run:
        """Return a distillation from the parent; arguments as of `distillations.run_of`."""
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
        """Measure a trained model on the text of the report, and under `choice` on that of the choices."""
        for half in HALVES:  # then the parent makes way
            self.parent.predictions(half)
        self.parent.release()
        checkpoint = find_checkpoint(checkpoint)
        model = load_model(checkpoint, dtype=self.parent.dtype, device=self.parent.device)
        result: dict[str, Any] = {"checkpoint": str(checkpoint), "weights": content_digest(checkpoint)}
        result |= asdict(self.parent.score(model, REPORTED))
        result[CHOICE] = asdict(self.parent.score(model, CHOICE))
        return result
