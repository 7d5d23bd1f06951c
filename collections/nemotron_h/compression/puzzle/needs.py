"""Memory that the stages of Puzzle take in this machine's processes, before any of it is taken. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import variants_of
from nemotron_h.compression import needs
from nemotron_h.core.units import GIB
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig

#: float32 weight, its gradient and both moments of AdamW
TRAINED_BYTES = 16


def stage_bytes(recipe: RecipeConfig, definition: ModelDefinition, device: str) -> dict[str, int]:
    """Return the bytes of weights that each stage holds at most, on one device: of host memory all processes share it.

    Args:
        definition: of the parent.
        device: `cuda` or `cpu`.
    """
    value = needs.VALUE_BYTES[device]
    parent = definition.parameters * value
    of_layers = [
        sum(variant.block.parameters for variant in of_layer.values() if variant.trained)
        for of_layer in variants_of(definition, recipe.puzzle.library)
    ]
    workers = recipe.parallel.devices if device == "cpu" else 1
    both = 2 * parent  # of a child in memory, at most as much again is no layer of the parent's
    return {
        "importance": parent,
        "library": workers * (parent + TRAINED_BYTES * max(of_layers)),
        "score": workers * (parent + 4 * max(of_layers)),
        **dict.fromkeys(("compare", "child"), both),
        "refine": workers * (parent + TRAINED_BYTES * 2 * max(of_layers)),
        "heal": parent,
    }


def check(recipe: RecipeConfig, definition: ModelDefinition, stages: Sequence[str], device: str, origin: str) -> None:
    """Refuse stages whose weights this machine cannot hold; see `needs.check`."""
    needs.check_stages(stage_bytes(recipe, definition, device), definition, stages, device, origin)


def sentence(recipe: RecipeConfig) -> str:
    """Return what `recipe check` says of it."""
    definition = definition_of(recipe, recipe.name)
    gpu, cpu = ({s: n / GIB for s, n in stage_bytes(recipe, definition, device).items()} for device in ("cuda", "cpu"))
    return (
        f"held at once, in library: the parent and a layer's variants in training, {gpu['library']:,.1f} GiB on each "
        f"GPU, or {cpu['library']:,.1f} GiB without one, by {recipe.parallel.devices} processes"
    )
