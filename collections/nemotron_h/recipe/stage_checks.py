"""Check the parts of a recipe that belong to one stage: each check names the key, the recipe, and what would fit."""

from __future__ import annotations

import dataclasses

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.sizes import BYTES
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.recipe.counts import count_of
from nemotron_h.schema.recipe import (
    METRICS,
    ORDERS,
    PIPELINES,
    PREFERENCE_LOSSES,
    SPEEDS,
    STARTS,
    TOO_LONG,
    BudgetSchema,
    GridSchema,
    RecipeConfig,
)


def check_stage(recipe: RecipeConfig, origin: str) -> None:
    """Check the parts of the recipe's stage, and refuse keys of other stages."""
    data = recipe.data
    check_preference(recipe, origin)
    check_distill(recipe, origin)
    if recipe.adapter.kind != "none" and recipe.stage not in ("sft", "preference"):
        raise UserError(
            f"{origin}: adapter.kind = {recipe.adapter.kind!r} is for stages sft and preference; {recipe.stage} trains "
            "all weights",
            hint="leave adapter out",
        )
    if recipe.stage in ("sft", "preference"):
        check_one_of("data.too_long", data.too_long or "", TOO_LONG, f"{origin}: ")
        if not data.document_reset:
            raise UserError(f"{origin}: data.document_reset = false", hint="packed conversations are always reset")
        if recipe.resume.blend_change is not None:
            raise UserError(
                f"{origin}: resume.blend_change is for pretraining",
                hint="start a run with other conversations from this one's weights: init.checkpoint",
            )
    elif data.too_long is not None:
        raise UserError(f"{origin}: data.too_long is unused: {recipe.stage} reads text", hint="leave it out")
    if recipe.stage in PIPELINES and recipe.init.checkpoint is not None:
        raise UserError(f"{origin}: init.checkpoint is unused: minipuzzle.parent is what is compressed")


#: stage with a part of its name -> where to begin with that part
OWN_PART = {
    "preference": "defaults: [/base/preference] has most of it",
    "minipuzzle": "defaults: [/compression: minipuzzle_tiny] has one of the files of configs/compression",
}


def has_own_part(recipe: RecipeConfig, stage: str, origin: str) -> bool:
    """Tell whether the recipe is of a stage with a part of its name. This stage must have the part, others must not."""
    given = getattr(recipe, stage) is not None
    if recipe.stage != stage:
        if given:
            raise UserError(f"{origin}: {stage} is unused: stage is {recipe.stage}", hint="leave it out")
        return False
    if not given:
        raise UserError(f"{origin}: {stage} is missing", hint=OWN_PART[stage])
    return True


def check_minipuzzle(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check the part `minipuzzle`, which that stage has and no other."""
    part = recipe.minipuzzle
    if not has_own_part(recipe, "minipuzzle", origin):
        return
    where = f"{origin}: "
    check_one_of("minipuzzle.layer_metric", part.layer_metric, METRICS, where)
    check_one_of("minipuzzle.order", part.order, ORDERS, where)
    check_one_of("minipuzzle.start", part.start, STARTS, where)
    check_one_of("minipuzzle.budget.speedup_by", part.budget.speedup_by, SPEEDS, where)
    if part.short > part.keep:
        raise UserError(
            f"{where}minipuzzle.short = {part.short} is more than the {part.keep} candidates that minipuzzle.keep keeps"
        )
    if part.evaluate is not None and "{checkpoint}" not in part.evaluate:
        raise UserError(f"{where}minipuzzle.evaluate does not name {{checkpoint}}", hint="my_eval.py {checkpoint}")
    _check_budget(part.budget, origin)
    _check_grid(part.grid, definition, origin)
    _check_distillations(recipe, origin)


def _check_budget(budget: BudgetSchema, origin: str) -> None:
    if budget.memory_gib is None and budget.parameters is None:
        raise UserError(
            f"{origin}: minipuzzle.budget has no limit", hint="give memory_gib (and context), parameters, or both"
        )
    for key in ("weights", "kv_cache", "states"):
        check_one_of(f"minipuzzle.budget.{key}", getattr(budget, key), BYTES, f"{origin}: ")
    if budget.memory_gib is not None and budget.context is None:
        raise UserError(
            f"{origin}: minipuzzle.budget.context is missing: keys and values take memory by token",
            hint="give the tokens of a sequence, such as 1048576",
        )
    for key in ("parameters", "least_parameters"):
        if (value := getattr(budget, key)) is not None:
            count_of(value, f"minipuzzle.budget.{key}", origin)


def _check_grid(grid: GridSchema, definition: ModelDefinition, origin: str) -> None:
    values = dataclasses.asdict(grid)
    if not any(values.values()):
        raise UserError(f"{origin}: minipuzzle.grid varies nothing", hint=f"give values of {', '.join(values)}")
    counts = definition.layer_counts()
    for key, given in values.items():
        counted = key in counts
        most = counts[key] if counted else getattr(definition, "num_layers" if key == "depth" else key)
        for value in given:
            if not (0 if counted else 1) <= value <= most:
                raise UserError(
                    f"{origin}: minipuzzle.grid.{key} has {value}; {definition.name} has {most}",
                    hint=f"give values from {0 if counted else 1} to {most}",
                )


def _check_distillations(recipe: RecipeConfig, origin: str) -> None:
    part, step = recipe.minipuzzle, recipe.data.seq_length * recipe.data.global_batch_size
    short = count_of(part.short_tokens, "minipuzzle.short_tokens", origin)
    warmup = count_of(recipe.optim.warmup_tokens, "optim.warmup_tokens", origin)
    if short <= max(warmup, step):
        raise UserError(
            f"{origin}: minipuzzle.short_tokens ({short:,}) is not longer than the warm-up ({warmup:,} tokens) and a "
            f"step ({step:,})",
            hint="distil for longer, or warm up for less",
        )
    try:
        phase_spans(load_blend(recipe.data.blend).phases, Horizon(short, step))
    except UserError as error:
        raise UserError(f"{origin}: minipuzzle.short_tokens: {error.message}", hint=error.hint) from error
    if count_of(part.score_tokens, "minipuzzle.score_tokens", origin) < recipe.data.seq_length:
        raise UserError(
            f"{origin}: minipuzzle.score_tokens ({part.score_tokens}) is less than one sequence",
            hint=f"at least data.seq_length, {recipe.data.seq_length:,}",
        )


def check_preference(recipe: RecipeConfig, origin: str) -> None:
    """Check the part `preference`, which that stage has and no other: a known loss with what it reads."""
    chosen = recipe.preference
    if not has_own_part(recipe, "preference", origin):
        return
    check_one_of("preference.loss", chosen.loss, PREFERENCE_LOSSES, f"{origin}: ")
    if chosen.loss == "dpo":
        for key, default in (("gt_reward_scale", 1.0), ("reward_gap", None)):
            if getattr(chosen, key) != default:
                raise UserError(
                    f"{origin}: preference.{key} is unused: dpo reads no rewards",
                    hint="leave it out, or take preference.loss: rpo_bwd_kl",
                )


def check_distill(recipe: RecipeConfig, origin: str) -> None:
    """Check the part `distill`: a teacher (in a compression that is the parent) and a loss; of no other stage."""
    chosen = recipe.distill
    if recipe.stage == "minipuzzle" and chosen is not None and chosen.teacher:
        raise UserError(f"{origin}: distill.teacher is unused: the parent teaches", hint="leave it out")
    if recipe.stage not in ("distill", "minipuzzle"):
        if chosen is not None:
            raise UserError(f"{origin}: distill is unused: stage is {recipe.stage}", hint="leave it out")
        return
    if recipe.stage == "distill" and (chosen is None or not (chosen.teacher or chosen.teacher_logits)):
        raise UserError(f"{origin}: distill.teacher is missing", hint="name a run's folder or a checkpoint")
    if chosen is None:
        return
    if recipe.stage == "minipuzzle" and chosen.teacher_logits:
        raise UserError(
            f"{origin}: distill.teacher_logits is unused: the distillations of a compression have several lengths, and "
            "a cache is of one",
            hint="leave it out",
        )
    if recipe.stage == "minipuzzle" and chosen.hidden_layers:
        raise UserError(
            f"{origin}: distill.hidden_layers is unused: the students of a compression have different layers",
            hint="leave it out: with distill.hidden_weight the states before the output layer are compared",
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
