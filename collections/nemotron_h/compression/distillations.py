"""Make the training runs of a compression: each is an ordinary recipe of stage `distill`, run by `nemo llm`.

Imports no torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.launch import runs as launch
from nemotron_h.launch.capacity import capacity
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run, steps_of
from nemotron_h.launch.several import train_several
from nemotron_h.recipe.checks import check, definition_of
from nemotron_h.schema.multipliers import MultipliersSchema
from nemotron_h.schema.recipe import PIPELINES, DistillSchema, ExpectSchema, ModelSchema, RecipeConfig

#: what a distillation's result depends on, beside teacher, student and data: parts of the recipe
MATTERS = (
    *("precision", "init_seed", "data", "optim", "parallel", "precision_options", "recompute", "distill", "overrides"),
)


def model_part(definition: ModelDefinition) -> ModelSchema:
    """Return the definition as a recipe's part."""
    values = dataclasses.asdict(definition.counted())
    parts = {"expect": ExpectSchema(**values["expect"]), "multipliers": MultipliersSchema(**values["multipliers"])}
    overrides = {str(layer): widths for layer, widths in definition.overrides.items()}
    return ModelSchema(**{**values, **parts, "overrides": overrides})


def run_of(
    recipe: RecipeConfig, name: str, student: ModelDefinition, start: Path, teacher: Path, tokens: str, folder: Path
) -> Run:
    """Return a distillation as a run.

    Args:
        recipe: of the compression, whose data, optimizer, precision and layout are taken.
        name: of the run.
        student: its model.
        start: checkpoint of the student's initial weights.
        teacher: checkpoint.
        tokens: length.
        folder: the run writes to `<folder>/<name>`.
    Errors:
        UserError: the student does not fit the layout or the precision.
    """
    own = copy.deepcopy(recipe)
    own.stage, own.name, own.tokens = "distill", name, str(tokens)
    for pipeline in PIPELINES:
        setattr(own, pipeline, None)
    own.model = model_part(student)
    own.init.checkpoint = str(start)
    own.distill = dataclasses.replace(own.distill or DistillSchema(), teacher=str(teacher))
    own.log.dir = str(folder)
    own.sources = {key: text for key, text in own.sources.items() if key.partition(".")[0] not in PIPELINES}
    check(own, f"recipe {recipe.name}, distillation {name}")
    return Run(name, own)


def train_together(runs: Sequence[Run], console: Console, place: Place = HERE) -> None:
    """Train what is missing of several runs, as many at a time as this machine takes, where it takes several;
    `launch.runs.complete` finds them finished. A cluster's are queued, and it waits for each.
    """
    missing = [run for run in runs if not launch.is_finished(run, steps_of(run))]
    if place.submits:
        launch.submit(missing, place, console)
    elif len(missing) > 1:
        at_once = capacity([run.recipe for run in missing], None, place)
        if at_once.runs > 1:
            console.print(f"  {len(missing)} runs, {at_once.runs} at a time ({at_once.why})", highlight=False)
            train_several([(run, steps_of(run)) for run in missing], at_once.runs, console, env=at_once.env)


def planned(recipe: RecipeConfig) -> list[Run]:
    """Return a short distillation and the long one as they would be started, the parent standing for the student."""
    parent, part, root = definition_of(recipe, recipe.name), recipe.minipuzzle, Path(recipe.log.dir) / recipe.name
    teacher = Path(part.parent)
    short, long = root / "short-distil", root / "distil"
    return [
        run_of(recipe, "CANDIDATE", parent, short / "CANDIDATE-pruned", teacher, part.short_tokens, short),
        run_of(recipe, recipe.name, parent, short / "CANDIDATE-pruned", teacher, recipe.tokens, long),
    ]
