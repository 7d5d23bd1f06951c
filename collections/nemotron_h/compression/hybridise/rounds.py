"""Rounds of a hybrid and the training runs of each, known before any of them begins. Imports no torch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.architecture.blocks.transplant import MIXER, attention_layers, transplants
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.frozen import parts
from nemotron_h.architecture.hybrid import counts, evenly
from nemotron_h.compression import distillations
from nemotron_h.compression.transplant.layers import child_definition
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.recipe.checks import check, definition_of
from nemotron_h.recipe.stages.hybridise import following
from nemotron_h.schema.recipe import RecipeConfig

#: checkpoint of a stage of mixers, and what a training comes to
TRANSPLANTED, RESULTS = "transplanted", "results.json"


@dataclass(frozen=True)
class Round:
    """Round of a hybrid.

    Attributes:
        number: from 1.
        share: of the parent's attention layers that stays.
        stay: how many layers that are.
    """

    number: int
    share: float
    stay: int

    @property
    def mixers(self) -> str:
        """Return the name of the stage that makes its mixers."""
        return f"mixers-{self.number}"

    @property
    def distil(self) -> str:
        """Return the name of the stage that distils it."""
        return f"distil-{self.number}"


def rounds_of(recipe: RecipeConfig, parent: ModelDefinition) -> list[Round]:
    """Return the rounds of a recipe."""
    shares = recipe.hybridise.attention
    stay = counts(parent, shares, "hybridise.attention")
    return [Round(number, *each) for number, each in enumerate(zip(shares, stay, strict=True), 1)]


def name_of(parent: ModelDefinition, each: Round) -> str:
    """Return the name of the model that a round makes of the first parent."""
    return f"{parent.name}-hybrid-{each.number}"


def hybrid_of(model: ModelDefinition, go: Sequence[int], groups: int | None, name: str) -> ModelDefinition:
    """Return the definition of a model after these attention layers went."""
    return child_definition(model, transplants(model.blocks, go, groups, "hybridise.groups"), name)


def foretold(recipe: RecipeConfig, parent: ModelDefinition) -> list[ModelDefinition]:
    """Return the model of each round where the layers that stay are spread evenly; of another choice it has as many."""
    models = [parent]
    for each in rounds_of(recipe, parent):
        layers = attention_layers(models[-1].blocks)
        go = sorted(set(layers) - set(evenly(layers, each.stay)))
        models.append(hybrid_of(models[-1], go, recipe.hybridise.groups, name_of(parent, each)))
    return models[1:]


def distillations_of(
    recipe: RecipeConfig, each: Round, student: ModelDefinition, start: Path, teacher: Path, folder: Path
) -> list[Run]:
    """Return the runs of a round one after the other: in which mixers alone train, where the recipe has it, and in
    which all does.

    Args:
        student: the round's model.
        start: checkpoint of it.
        folder: of the stage.
    Errors:
        UserError: the student does not fit the layout or the precision, or a run is shorter than its warm-up.
    """
    part, name, runs = recipe.hybridise, f"{recipe.name}_{each.number}", []
    if part.frozen_tokens:
        frozen = frozen_beside_mixers(recipe, student)
        lengths = (start, teacher, part.frozen_tokens, folder)
        runs.append(distillations.run_of(frozen, f"{name}_frozen", student, *lengths))
        start = runs[0].folder
    return [*runs, distillations.run_of(recipe, name, student, start, teacher, recipe.tokens, folder)]


def frozen_beside_mixers(recipe: RecipeConfig, student: ModelDefinition) -> RecipeConfig:
    """Return the recipe of a distillation in which all but the mixers stay as they are."""
    optim, peak = recipe.optim, recipe.hybridise.frozen_lr or recipe.optim.peak_lr
    rates = {"peak_lr": peak, "final_lr": optim.final_lr * peak / optim.peak_lr}
    frozen = [part for part in parts(student) if part != MIXER.name]
    return dataclasses.replace(recipe, optim=dataclasses.replace(optim, **rates, frozen=frozen))


def following_run(recipe: RecipeConfig, model: ModelDefinition, start: Path, folder: Path, place: Place = HERE) -> Run:
    """Return a run that follows the rounds, or another such run.

    Args:
        recipe: its own, of `following`.
        model: that it begins from.
        start: checkpoint of it.
        folder: of the stage.
        place: where it runs.
    Errors:
        UserError: the model does not fit its layout or precision.
    """
    own = copy.deepcopy(place.moved(recipe))
    own.model, own.init.checkpoint, own.log.dir = distillations.model_part(model), str(start), str(folder)
    check(own, f"recipe {recipe.name}, after {start}")
    return Run(own.name, own)


def planned(recipe: RecipeConfig, place: Place = HERE) -> list[Run]:
    """Return all runs as they would be started, with layers that stay spread evenly.

    Errors:
        UserError: as of `distillations_of` and `following_run`.
    """
    parent, root, runs = definition_of(recipe, recipe.name), Path(recipe.log.dir) / recipe.name, []
    model = parent
    for each, model in zip(rounds_of(recipe, parent), foretold(recipe, parent), strict=True):
        start, folder = root / each.mixers / TRANSPLANTED, root / each.distil
        runs += distillations_of(recipe, each, model, start, Path(recipe.hybridise.parent), folder)
    for number, name in following_stages(recipe):
        own = following(name, f"recipe {recipe.name}")
        runs.append(following_run(own, model, runs[-1].folder, root / number, place))
    return runs


def following_stages(recipe: RecipeConfig) -> Iterator[tuple[str, str]]:
    """Yield the name of each stage that follows the rounds, and its recipe's."""
    for number, name in enumerate(recipe.hybridise.then, 1):
        yield f"then-{number}", name
