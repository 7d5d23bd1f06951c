"""Checks of a recipe of stage puzzle: a compression whose layers differ, and its healing."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import check_library
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.core.units import BYTES, count_of
from nemotron_h.recipe.stages.compression import check_compression, check_importance
from nemotron_h.schema.puzzle import MEASURES, MERGES, TIMES, CostSchema
from nemotron_h.schema.recipe import RecipeConfig

#: limits of the costs, those that need times last
LIMITS = ("parameters", "memory_gib", "latency_seconds", "tokens_per_second", "speedup")
OF_TIME = LIMITS[2:]


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check a compression: its options, library, limits and lengths."""
    check_compression(recipe, origin, "puzzle_tiny")
    check_importance(recipe, origin)
    part, where = recipe.puzzle, f"{origin}: "
    check_one_of("puzzle.merge", part.merge, MERGES, where)
    check_one_of("puzzle.measure", part.measure, MEASURES, where)
    check_library(definition, part.library, origin)
    for kind in part.homogeneous:
        check_one_of("puzzle.homogeneous", kind, [kind.name for kind in definition.kinds], where)
    _check_costs(part.costs, origin)
    count_of(part.local.tokens, "puzzle.local.tokens", origin)
    for name, tokens in part.local.tokens_of.items():
        count_of(tokens, f"puzzle.local.tokens_of.{name}", origin)
    if (part.long_seq_length is None) != (part.long_tokens is None):
        raise UserError(
            f"{where}puzzle.long_tokens is {part.long_tokens}, puzzle.long_seq_length is {part.long_seq_length}",
            hint="a second healing needs both; leave out both for none",
        )
    for key in ("refine_tokens", "long_tokens"):
        if (tokens := getattr(part, key)) is not None:
            count_of(tokens, f"puzzle.{key}", origin)


def _check_costs(costs: CostSchema, origin: str) -> None:
    stated = [name for name in LIMITS if getattr(costs, name) is not None]
    if not stated:
        raise UserError(f"{origin}: puzzle.costs has no limit", hint=f"give one of {', '.join(LIMITS)}")
    for key in ("weights", "kv_cache", "states"):
        check_one_of(f"puzzle.costs.{key}", getattr(costs, key), BYTES, f"{origin}: ")
    check_one_of("puzzle.costs.times", costs.times, TIMES, f"{origin}: ")
    needing = [name for name in stated if name in OF_TIME]
    if needing and costs.times == "none":
        raise UserError(
            f"{origin}: puzzle.costs.{needing[0]} needs times, puzzle.costs.times is none", hint="set it to measured"
        )
    if (costs.gpu is None) == (costs.times == "modelled"):
        raise UserError(
            f"{origin}: puzzle.costs.times is {costs.times}, puzzle.costs.gpu is {costs.gpu}",
            hint="modelled times are of a GPU, such as gpu: h200; others of none",
        )
    if costs.parameters is not None:
        count_of(costs.parameters, "puzzle.costs.parameters", origin)
