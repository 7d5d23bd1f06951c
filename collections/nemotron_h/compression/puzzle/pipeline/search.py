"""Stage `search`: the children with the smallest sum of scores within the limits (2411.19146, 4.3 and B).

    nemotron-h puzzle RECIPE --stage search

Reads scores.json and costs.json. Writes solutions.json: the children, the best first, and the controls that they are
compared with: a greedy search, and random children within the limits.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.variants import NO_OP, PARENT
from nemotron_h.compression.pipeline.text import named
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.pipeline.costs import COSTS, LATENCY, MEMORY, PARAMETERS
from nemotron_h.compression.puzzle.pipeline.score import read_scores
from nemotron_h.compression.puzzle.search import Choice, Limit, Solution, greedy, random_picks, solutions
from nemotron_h.compression.stages import Stage
from nemotron_h.core.files import write_json
from nemotron_h.core.units import GIB, count_of

SOLUTIONS = "solutions.json"
#: ours: random children, enough for a rank correlation (the greedy one and the solutions beside them)
RANDOM = 20


def stage(c: Context) -> Stage:
    """Return the stage."""
    title = "the best children within the limits"
    return Stage("search", title, ("score", "costs"), (SOLUTIONS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside scores and costs."""
    limits = ("parameters", "memory_gib", "latency_seconds", "tokens_per_second", "speedup")
    keys = {f"puzzle.costs.{key}": getattr(c.part.costs, key) for key in limits}
    return {**keys, **c.keys("measure", "homogeneous", "solutions", "alpha"), "init_seed": c.recipe.init_seed}


def run(c: Context, folder: Path) -> str:
    """Solve it, and write what was found."""
    slots, limits, equal = problem(c)
    with named(f"{c.origin}: puzzle.costs"):
        best = solutions(slots, limits, c.part.solutions, c.part.alpha, equal=equal)
    controls = [greedy(slots, limits), *random_picks(slots, limits, RANDOM, c.recipe.init_seed)]
    parent = {limit.resource: limit.fixed + sum(_own(slot).costs[limit.resource] for slot in slots) for limit in limits}

    def row(solution: Solution) -> dict[str, Any]:
        picks = [slot[pick].name for slot, pick in zip(slots, solution.picks, strict=True)]
        return {"picks": picks, "score": solution.score, "costs": dict(solution.costs), "gap": solution.gap}

    write_json(
        folder / SOLUTIONS,
        {
            "measure": c.part.measure,
            "limits": [asdict(limit) for limit in limits],
            "parent": parent,
            "solutions": [row(solution) for solution in best],
            "greedy": row(controls[0]),
            "random": [row(solution) for solution in controls[1:]],
        },
    )
    first = best[0]
    unchanged = sum(slot[pick].name == PARENT for slot, pick in zip(slots, first.picks, strict=True))
    gone = sum(slot[pick].name == NO_OP for slot, pick in zip(slots, first.picks, strict=True))
    return (
        f"{len(best)} children; the best has {c.part.measure} {first.score:.4f} (greedy {controls[0].score:.4f}, the best "
        f"of {len(controls) - 1} random ones {min(each.score for each in controls[1:]):.4f}): {unchanged} layers stay as "
        f"they are, {gone} go"
    )


def _own(slot: list[Choice]) -> Choice:
    return next(choice for choice in slot if choice.name == PARENT)


def problem(c: Context) -> tuple[list[list[Choice]], list[Limit], list[list[int]]]:
    """Return the choices of each layer, the limits, and the layers that are to be alike."""
    parent, scores = read_scores(c)
    costs = c.read("costs", COSTS)
    slots = []
    for of_layer, row in zip(costs["layers"], scores, strict=True):
        slots.append(
            [Choice(name, row[name].measured(c.part.measure, parent), costs_of) for name, costs_of in of_layer.items()]
        )
    fixed = costs["ends"]
    own = {key: fixed[key] + sum(of_layer[PARENT][key] for of_layer in costs["layers"]) for key in fixed}
    limits = [Limit(key, most, fixed[key]) for key, most in limit_values(c, own).items()]
    equal = [
        [layer for layer, block in enumerate(c.definition.blocks) if block.name == kind] for kind in c.part.homogeneous
    ]
    return slots, limits, equal


def limit_values(c: Context, own: dict[str, float]) -> dict[str, float]:
    """Return resource -> the most of it, of the recipe's limits.

    Args:
        own: what the parent takes of each.
    """
    costs, most = c.part.costs, {}
    if costs.parameters is not None:
        most[PARAMETERS] = float(count_of(costs.parameters, "puzzle.costs.parameters", c.origin))
    if costs.memory_gib is not None:
        most[MEMORY] = costs.memory_gib * GIB
    times = [
        costs.latency_seconds,
        costs.tokens_per_second and costs.batch * (costs.prompt + costs.output) / costs.tokens_per_second,
        costs.speedup and own[LATENCY] / costs.speedup,
    ]
    if any(times):
        most[LATENCY] = min(time for time in times if time)
    return most
