"""Checks of a recipe of stage preference: conversations, and a loss with what it reads."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.recipe.stages import sft
from nemotron_h.schema.recipe import DPO_LOSSES, PREFERENCE_LOSSES, RecipeConfig


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check the pairs' conversations, the adapter and the loss."""
    sft.check(recipe, definition, origin)
    chosen = recipe.preference
    if chosen is None:
        raise UserError(f"{origin}: preference is missing", hint="defaults: [/base/preference] has most of it")
    check_one_of("preference.loss", chosen.loss, PREFERENCE_LOSSES, f"{origin}: ")
    if chosen.loss in DPO_LOSSES:
        for key, default in (("gt_reward_scale", 1.0), ("reward_gap", None)):
            if getattr(chosen, key) != default:
                raise UserError(
                    f"{origin}: preference.{key} is unused: {chosen.loss} reads no rewards",
                    hint="leave it out, or take preference.loss: rpo_bwd_kl",
                )
