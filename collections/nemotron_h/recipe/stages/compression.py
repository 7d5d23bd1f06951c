"""Checks of what every compression has: a part of the recipe, a parent, scores, and distillations from the parent."""

from __future__ import annotations

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.core.units import count_of
from nemotron_h.recipe.stages.distill import check_objective
from nemotron_h.schema.minipuzzle import METRICS
from nemotron_h.schema.recipe import DistillSchema, RecipeConfig


def check_compression(recipe: RecipeConfig, origin: str, example: str) -> None:
    """Check what all stages of `PIPELINES` share.

    Args:
        example: a file of configs/compression with the part that such a recipe needs.
    """
    stage = recipe.stage
    part = getattr(recipe, stage)
    if part is None:
        hint = f"defaults: [/compression: {example}] has one of the files of configs/compression"
        raise UserError(f"{origin}: {stage} is missing", hint=hint)
    if recipe.init.checkpoint is not None:
        raise UserError(f"{origin}: init.checkpoint is unused: {stage}.parent is what is compressed")
    _check_distill(recipe.distill, origin)
    check_objective(recipe, origin)
    if count_of(part.score_tokens, f"{stage}.score_tokens", origin) < recipe.data.seq_length:
        raise UserError(
            f"{origin}: {stage}.score_tokens ({part.score_tokens}) is less than one sequence",
            hint=f"at least data.seq_length, {recipe.data.seq_length:,}",
        )


def check_importance(recipe: RecipeConfig, origin: str) -> None:
    """Check how the importance of layers is measured."""
    part = getattr(recipe, recipe.stage)
    check_one_of(f"{recipe.stage}.layer_metric", part.layer_metric, METRICS, f"{origin}: ")


def _check_distill(distill: DistillSchema | None, origin: str) -> None:
    """Refuse what one distillation can have, and not those of a compression."""
    if distill is None:
        return
    if distill.teacher:
        raise UserError(f"{origin}: distill.teacher is unused: the parent teaches", hint="leave it out")
    if distill.teacher_logits:
        raise UserError(
            f"{origin}: distill.teacher_logits is unused: the distillations of a compression have several lengths, and "
            "a cache is of one",
            hint="leave it out",
        )
    if distill.hidden_layers:
        raise UserError(
            f"{origin}: distill.hidden_layers is unused: the students of a compression have different layers",
            hint="leave it out: with distill.hidden_weight the states before the output layer are compared",
        )
