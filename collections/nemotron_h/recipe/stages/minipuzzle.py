"""Checks of a recipe of stage minipuzzle: a compression and its distillations."""

from __future__ import annotations

import dataclasses

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.pruned_widths import check_width
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.core.units import BYTES, count_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.recipe.stages.compression import check_compression, check_importance
from nemotron_h.schema.minipuzzle import ORDERS, SPEEDS, STARTS, BudgetSchema, GridSchema
from nemotron_h.schema.recipe import RecipeConfig


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check a compression: its options, budget and grid, and the distillations of its candidates."""
    check_compression(recipe, origin, "minipuzzle_tiny")
    check_importance(recipe, origin)
    part = recipe.minipuzzle
    where = f"{origin}: "
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
        name = f"{origin}: minipuzzle.grid.{key}"
        for value in given:
            if key != "depth" and key not in counts:
                check_width(definition, key, value, name)
                continue
            least, most = (0, counts[key]) if key in counts else (1, definition.num_layers)
            if not least <= value <= most:
                hint = f"give values from {least} to {most}"
                raise UserError(f"{name} has {value}; {definition.name} has {most}", hint=hint)


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
