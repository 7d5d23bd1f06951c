"""Checks of a recipe of stage distill: a teacher and an objective."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.schema.recipe import RecipeConfig


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check that there is a teacher, or what one has said, and something to learn."""
    chosen = recipe.distill
    if chosen is None or not (chosen.teacher or chosen.teacher_logits):
        raise UserError(f"{origin}: distill.teacher is missing", hint="name a run's folder or a checkpoint")
    check_objective(recipe, origin)


def check_objective(recipe: RecipeConfig, origin: str) -> None:
    """Check the terms of the loss, of a distillation or of those of a compression."""
    chosen = recipe.distill
    if chosen is None:
        return
    if recipe.recompute.logits != "none":
        raise UserError(
            f"{origin}: recompute.logits = {recipe.recompute.logits!r} is unused: the loss of a distillation is taken "
            "in chunks in any case",
            hint="leave recompute.logits out",
        )
    if chosen.teacher_logits and chosen.hidden_weight:
        raise UserError(
            f"{origin}: distill.hidden_weight with distill.teacher_logits: the cache holds logits, no states",
            hint="leave one of them out",
        )
    _check_hidden_layers(recipe, origin)
    if not chosen.kl_weight + chosen.lm_weight > 0:
        raise UserError(f"{origin}: distill.kl_weight and distill.lm_weight are 0: nothing would be learnt")
    if chosen.top_k is not None:
        if chosen.top_k > recipe.model.vocab_size:
            raise UserError(
                f"{origin}: distill.top_k = {chosen.top_k} is above the vocabulary of {recipe.model.vocab_size:,}"
            )
        if chosen.reverse:
            raise UserError(
                f"{origin}: distill.top_k with distill.reverse: that KL is infinite where the teacher has no mass",
                hint="leave one of them out",
            )


def _check_hidden_layers(recipe: RecipeConfig, origin: str) -> None:
    """Check pairs of layers, of which the first is the student's."""
    chosen, layers = recipe.distill, len(recipe.model.pattern)
    if chosen.hidden_layers and not chosen.hidden_weight:
        raise UserError(f"{origin}: distill.hidden_layers is unused: distill.hidden_weight is 0", hint="leave it out")
    if chosen.hidden_layers and recipe.parallel.pipeline > 1:
        raise UserError(
            f"{origin}: distill.hidden_layers with parallel.pipeline = {recipe.parallel.pipeline}: a pair's layers are "
            "on different stages",
            hint="split the models over tensor-parallel ranks, or leave distill.hidden_layers out",
        )
    for pair in chosen.hidden_layers:
        if len(pair) != 2:
            raise UserError(
                f"{origin}: distill.hidden_layers has {pair}", hint="a pair is [layer of the student, of the teacher]"
            )
        if not 0 <= pair[0] < layers:
            raise UserError(
                f"{origin}: distill.hidden_layers has {pair}: {recipe.model.name} has layers 0 to {layers - 1}",
                hint="the first number of a pair is the student's layer",
            )
