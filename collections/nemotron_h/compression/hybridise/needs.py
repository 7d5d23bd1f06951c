"""Memory that the stages of a hybrid take in this machine's processes, before any of it is taken. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_h.architecture.blocks.transplant import attention_layers
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.hybrid import candidates
from nemotron_h.compression import needs
from nemotron_h.compression.hybridise.rounds import foretold, hybrid_of, rounds_of
from nemotron_h.compression.puzzle.needs import TRAINED_BYTES
from nemotron_h.core.units import GIB
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig

#: of a weight of the model that mixers train in
FLOAT32 = 4


def stage_bytes(recipe: RecipeConfig, definition: ModelDefinition, device: str) -> dict[str, int]:
    """Return the bytes of weights that each stage holds at most, on one device: of host memory all processes share it.

    Args:
        definition: of the parent.
        device: `cuda` or `cpu`.
    """
    layers, value = candidates(definition, recipe.name), needs.VALUE_BYTES[device]
    of_mixers = hybrid_of(definition, layers, recipe.hybridise.groups, "mixers").blocks
    mixer = TRAINED_BYTES * max(of_mixers[layer].parameters for layer in layers)
    models, stages = foretold(recipe, definition), {}
    for each, before, model in zip(rounds_of(recipe, definition), [definition, *models], models, strict=False):
        tried = len(attention_layers(before.blocks)) - (0 if recipe.hybridise.choice == "kl" else each.stay)
        workers = min(recipe.parallel.devices, tried) if device == "cpu" else 1
        stages[each.mixers] = workers * (FLOAT32 * before.parameters + mixer)
        stages[each.distil] = value * model.parameters
    return {**stages, "generation": value * (definition.parameters + max(model.parameters for model in models))}


def check(recipe: RecipeConfig, definition: ModelDefinition, stages: Sequence[str], device: str, origin: str) -> None:
    """Refuse stages whose weights this machine cannot hold; see `needs.check_stages`."""
    needs.check_stages(stage_bytes(recipe, definition, device), definition, stages, device, origin)


def sentence(recipe: RecipeConfig) -> str:
    """Return what `recipe check` says of it."""
    definition = definition_of(recipe, recipe.name)
    first = rounds_of(recipe, definition)[0].mixers
    gpu, cpu = (stage_bytes(recipe, definition, device)[first] / GIB for device in ("cuda", "cpu"))
    return (
        f"held at once, in {first}: the parent and a mixer in training, {gpu:,.1f} GiB on each GPU, or {cpu:,.1f} GiB "
        f"without one, by {recipe.parallel.devices} processes"
    )
