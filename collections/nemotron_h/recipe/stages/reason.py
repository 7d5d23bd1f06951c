"""Checks of a recipe of stage reason: how solutions are sampled, and the preference training of each round."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.thoughts import SWITCH
from nemotron_h.recipe.stages import preference
from nemotron_h.schema.reason import ROUNDS
from nemotron_h.schema.recipe import RecipeConfig


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check that there is a start, and that each round's blend and starting weights are left to the rounds."""
    part = recipe.reason
    if part is None:
        raise UserError(f"{origin}: reason is missing", hint="name reason.start, reason.problems and reason.rounds")
    if recipe.init.checkpoint is not None:
        raise UserError(f"{origin}: init.checkpoint is unused: reason.start is what the first round trains")
    if recipe.data.blend != ROUNDS:
        raise UserError(
            f"{origin}: data.blend = {recipe.data.blend} is unused: each round writes its pairs",
            hint=f"set it to {ROUNDS}, which stands for them",
        )
    if part.thinking is not None:
        check_one_of("reason.thinking", part.thinking, SWITCH, f"{origin}: ")
    preference.check(recipe, definition, origin)
