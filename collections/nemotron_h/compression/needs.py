"""Memory that the stages of a compression take in this process, before any of it is taken. Imports no torch.

The parent is held whole in one process, in bfloat16 on a GPU and in float32 on the CPU, and for scoring what a
candidate does not share with it. The distillations are runs of their own: `nemotron-h plan` says what they take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.compression.candidates import WIDTHS
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import GIB
from nemotron_h.platform import memory
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.minipuzzle import GridSchema
from nemotron_h.schema.recipe import RecipeConfig

VALUE_BYTES = {"cuda": 2, "cpu": 4}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def stage_bytes(recipe: RecipeConfig, definition: ModelDefinition, device: str) -> dict[str, int]:
    """Return the bytes of weights that each stage holds at most; stages that hold none are left out.

    Args:
        definition: of the parent.
        device: `cuda` or `cpu`.
    """
    part, parent = recipe.minipuzzle, definition.parameters
    both = parent + min(parent, _cut_parameters(definition, part.grid))
    parameters = dict.fromkeys(("importance", "score", "short-distil", "distil", "export"), parent) | {"score": both}
    if part.budget.speedup is not None and part.budget.speedup_by == "measured":
        parameters["candidates"] = both
    return {stage: number * VALUE_BYTES[device] for stage, number in parameters.items()}


def _cut_parameters(definition: ModelDefinition, grid: GridSchema) -> int:
    """Return the parameters of layers that some candidate narrows: those are copied, all others are the parent's."""
    widths = {key: min(values) for key in WIDTHS if (values := getattr(grid, key))}
    narrow = dataclasses.replace(definition, **widths)
    pairs = zip(definition.blocks, narrow.blocks, strict=True)
    cut = sum(block.parameters for block, other in pairs if other.parameters != block.parameters)
    outside = definition.other_parameters
    return cut + (outside if narrow.other_parameters != outside else 0)


def sentence(recipe: RecipeConfig) -> str:
    """Return what `recipe check` says of it."""
    definition = definition_of(recipe, recipe.name)
    gpu, cpu = ({s: n / GIB for s, n in stage_bytes(recipe, definition, device).items()} for device in ("cuda", "cpu"))
    return (
        f"held by one process: the parent, {gpu['importance']:,.1f} GiB on a GPU, {cpu['importance']:,.1f} GiB without "
        f"one; in score with a candidate up to {gpu['score']:,.1f} GiB, {cpu['score']:,.1f} GiB"
    )


def check(recipe: RecipeConfig, definition: ModelDefinition, stages: Sequence[str], device: str, origin: str) -> None:
    """Refuse stages of MiniPuzzle whose weights this machine cannot hold; as `check_stages`."""
    check_stages(stage_bytes(recipe, definition, device), definition, stages, device, origin)


def check_stages(
    needed: Mapping[str, int], definition: ModelDefinition, stages: Sequence[str], device: str, origin: str
) -> None:
    """Refuse stages whose weights this machine cannot hold.

    Args:
        needed: bytes by stage.
        definition: of the parent.
        stages: that are to run.
        device: where they hold the models: `cuda` or `cpu`.
    Errors:
        UserError: names the first stage that does not fit, what it takes and what is there.
    """
    there, parent = memory.available(device), definition.parameters * VALUE_BYTES[device]
    for stage, need in needed.items():
        if stage in stages and need > there:
            where = "this machine" if device == "cpu" else "its GPU"
            beside = " and what replaces parts of it" if need > parent else ""
            raise UserError(
                f"{origin}: stage {stage} holds {definition.name}{beside}: up to {need / GIB:,.1f} GiB of weights in "
                f"{DTYPES[device]}, {where} has {there / GIB:,.1f} GiB free",
                hint="run it on a larger machine or GPU (executor= moves the distillations alone), with "
                "CUDA_VISIBLE_DEVICES= in host memory; or by hand with nemotron-h importance and prune, which hold "
                "less (docs/compression.md)",
            )
