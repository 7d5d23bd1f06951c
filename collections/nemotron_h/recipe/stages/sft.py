"""Checks of a recipe of stage sft: packed conversations, and an adapter."""

from __future__ import annotations

from nemotron_h.architecture.adapters import check_adapter
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.schema.recipe import TOO_LONG, RecipeConfig


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check the adapter and how conversations become windows."""
    check_adapter(recipe.adapter, definition, f"{origin}: adapter", pipeline=recipe.parallel.pipeline)
    check_one_of("data.too_long", recipe.data.too_long or "", TOO_LONG, f"{origin}: ")
    if not recipe.data.document_reset:
        raise UserError(f"{origin}: data.document_reset = false", hint="packed conversations are always reset")
    if recipe.resume.blend_change is not None:
        raise UserError(
            f"{origin}: resume.blend_change is for pretraining",
            hint="start a run with other conversations from this one's weights: init.checkpoint",
        )
