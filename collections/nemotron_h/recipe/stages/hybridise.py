"""Checks of a recipe of stage hybridise: rounds of a hybrid, their distillations, and the recipes that follow."""

from __future__ import annotations

from nemotron_h.architecture.blocks.transplant import transplants
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.hybrid import candidates, check_matrices, counts
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.core.units import count_of
from nemotron_h.recipe.compose import compose
from nemotron_h.recipe.stages.compression import check_compression
from nemotron_h.schema.hybridise import CHOICES, STARTS, MixersSchema
from nemotron_h.schema.recipe import RecipeConfig

#: stages of recipes that may follow
FOLLOWING = ("sft", "preference")


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check rounds, groups, training of the mixers, lengths, and what follows."""
    check_compression(recipe, origin, "hybridise_tiny")
    part, where = recipe.hybridise, f"{origin}: "
    counts(definition, part.attention, f"{origin}: hybridise.attention")
    check_one_of("hybridise.choice", part.choice, CHOICES, where)
    check_one_of("hybridise.start", part.start, STARTS, where)
    key = f"{origin}: hybridise.groups"
    transplants(definition.blocks, candidates(definition, origin), part.groups, key)
    _check_mixers(part.local, recipe.data.seq_length, origin)
    if part.frozen_tokens is not None:
        count_of(part.frozen_tokens, "hybridise.frozen_tokens", origin)
    elif part.frozen_lr is not None:
        raise UserError(
            f"{origin}: hybridise.frozen_lr is unused: hybridise.frozen_tokens is null", hint="leave it out"
        )
    for name in part.then:
        following(name, origin)


def _check_mixers(local: MixersSchema, seq_length: int, origin: str) -> None:
    """Check that what is stated of the mixers' own training has a use, and that matrices fit memory."""
    stated = [key for key in ("matrices", "mixers") if getattr(local, key) is not None]
    for key in stated:
        count_of(getattr(local, key), f"hybridise.local.{key}", origin)
    if not stated and local.lr != MixersSchema().lr:
        raise UserError(
            f"{origin}: hybridise.local.lr = {local.lr} is unused: no mixer trains by itself",
            hint="leave it out, or give tokens: hybridise.local.mixers",
        )
    if local.matrices is not None:
        check_matrices(seq_length, f"{origin}: hybridise.local.matrices: data.seq_length")


def following(name: str, origin: str) -> RecipeConfig:
    """Return a recipe that follows the rounds.

    Args:
        name: of the recipe, or its path.
    Errors:
        UserError: there is none, it is of another stage, or trains an adapter.
    """
    key = f"{origin}: hybridise.then"
    try:
        recipe = compose(name)
    except UserError as error:
        raise UserError(f"{key}: {error.message}", error.hint) from error
    if recipe.stage not in FOLLOWING:
        raise UserError(
            f"{key} has {name}, a recipe of stage {recipe.stage}", hint=f"stages that follow: {', '.join(FOLLOWING)}"
        )
    if recipe.adapter.kind != "none":
        raise UserError(
            f"{key} has {name}, which trains an adapter: what follows begins from whole weights",
            hint="run it on the result (init.checkpoint), and nemotron-h merge-adapter",
        )
    return recipe
