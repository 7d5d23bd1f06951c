"""Memory that the stages of a compression take in this process, before any of it is taken. Imports no torch.

The parent is held whole in one process, in bfloat16 on a GPU and in float32 on the CPU, and beside it a candidate whose
matrices are cut. The distillations are runs of their own: `nemotron-h plan` says what they take.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_h.checks import count_of
from nemotron_h.errors import UserError
from nemotron_h.model.definition import ModelDefinition
from nemotron_h.runtime import memory
from nemotron_h.runtime.memory import GIB
from nemotron_h.schema import RecipeConfig

VALUE_BYTES = {"cuda": 2, "cpu": 4}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def stage_bytes(recipe: RecipeConfig, definition: ModelDefinition, device: str) -> dict[str, int]:
    """Return the bytes of weights that each stage holds at most; stages that hold none are left out.

    Args:
        definition: of the parent.
        device: `cuda` or `cpu`.
    """
    parent = definition.parameters
    most = recipe.minipuzzle.budget.parameters
    candidate = parent if most is None else min(parent, count_of(most, "minipuzzle.budget.parameters", recipe.name))
    later = dict.fromkeys(("score", "short-distil", "distil", "export"), (parent + candidate) * VALUE_BYTES[device])
    return {"importance": parent * VALUE_BYTES[device], **later}


def sentence(recipe: RecipeConfig, definition: ModelDefinition) -> str:
    """Return what `recipe check` says of it."""
    largest = {device: max(stage_bytes(recipe, definition, device).values()) / GIB for device in VALUE_BYTES}
    return (
        f"importance, score and export hold parent and candidate in one process: up to {largest['cuda']:,.1f} GiB on a "
        f"GPU, {largest['cpu']:,.1f} GiB without one"
    )


def check(recipe: RecipeConfig, definition: ModelDefinition, stages: Sequence[str], device: str, origin: str) -> None:
    """Refuse stages whose weights this machine cannot hold.

    Args:
        stages: that are to run.
        device: where they hold the models: `cuda` or `cpu`.
    Errors:
        UserError: names the first stage that does not fit, what it takes and what is there.
    """
    there = memory.available(device)
    for stage, need in stage_bytes(recipe, definition, device).items():
        if stage in stages and need > there:
            where = "this machine" if device == "cpu" else "its GPU"
            raise UserError(
                f"{origin}: stage {stage} holds {definition.name} and a candidate in one process: up to "
                f"{need / GIB:,.1f} GiB in {DTYPES[device]}, {where} has {there / GIB:,.1f} GiB free",
                hint="run it on a larger machine or GPU (executor= moves the distillations alone); or by hand with "
                "nemotron-h importance and prune, which hold less (docs/compression.md)",
            )
