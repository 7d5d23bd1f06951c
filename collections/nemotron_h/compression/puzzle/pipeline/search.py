"""Stage `search`: the children with the smallest sum of scores within the limits (2411.19146, 4.3 and B).

    nemotron-h puzzle RECIPE --stage search

Reads scores.json and costs.json. Writes solutions.json: the children, the best first, and the controls that they are
compared with: a greedy search, and random children within the limits.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.variants import NO_OP, PARENT
from nemotron_h.compression.pipeline.text import named
from nemotron_h.compression.puzzle.baselines import greedy, random_picks
from nemotron_h.compression.puzzle.choices import Choice, Limit, Slots, Solution
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.pipeline.costs import COSTS, LATENCY, size_limits
from nemotron_h.compression.puzzle.pipeline.score import read_scores
from nemotron_h.compression.puzzle.search import solutions, solve
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.launch.stages import Stage

SOLUTIONS = "solutions.json"
#: ours: random children, enough for a rank correlation (the greedy one and the solutions beside them)
RANDOM = 20
#: ours: points of the front beside its first, which is at this part of the limit
FRONT, FRONT_LEAST = 8, 0.85


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
    alike = {"equal": equal, "exempt": (NO_OP,)}
    with named(f"{c.origin}: puzzle.costs"):
        best = solutions(slots, limits, c.part.solutions, c.part.alpha, **alike)
    controls = [greedy(slots, limits), *random_picks(slots, limits, RANDOM, c.recipe.init_seed)]
    ends = c.read("costs", COSTS)["ends"]

    def row(solution: Solution) -> dict[str, Any]:
        chosen = [slot[pick] for slot, pick in zip(slots, solution.picks, strict=True)]
        costs = {key: value + sum(choice.costs[key] for choice in chosen) for key, value in ends.items()}
        return {"picks": [choice.name for choice in chosen], "score": solution.score, "costs": costs}

    write_json(
        folder / SOLUTIONS,
        {
            "measure": c.part.measure,
            "limits": [asdict(limit) for limit in limits],
            "parent": _parent_costs(c),
            "solutions": [row(solution) for solution in best],
            "greedy": row(controls[0]),
            "random": [row(solution) for solution in controls[1:]],
            "front": _front(c, slots, limits, alike),
        },
    )
    names = [slot[pick].name for slot, pick in zip(slots, best[0].picks, strict=True)]
    return (
        f"{len(best)} children; {c.part.measure} of the best {best[0].score:.4f} (greedy {controls[0].score:.4f}, best "
        f"of {RANDOM} random ones {min(each.score for each in controls[1:]):.4f}): {names.count(PARENT)} layers stay "
        f"as they are, {names.count(NO_OP)} go"
    )


def _front(c: Context, slots: Slots, limits: list[Limit], alike: dict[str, Any]) -> list[dict[str, float]]:
    """Return the smallest sums of scores over the first of the limits, from its own up to the parent's cost."""
    first, *others = limits
    own, points = _parent_costs(c)[first.resource], []
    for share in range(FRONT + 1):
        most = first.most * FRONT_LEAST + (own - first.most * FRONT_LEAST) * share / FRONT
        try:
            solution = solve(slots, [replace(first, most=most), *others], **alike)
        except UserError:
            continue  # nothing is as small
        points.append({"limit": most, "score": solution.score})
    return points


def _parent_costs(c: Context) -> dict[str, float]:
    costs = c.read("costs", COSTS)
    return {key: end + sum(row[PARENT][key] for row in costs["layers"]) for key, end in costs["ends"].items()}


def problem(c: Context) -> tuple[Slots, list[Limit], list[list[int]]]:
    """Return the choices of each layer, the limits, and the layers that are to be alike."""
    parent, scores = read_scores(c)
    costs = c.read("costs", COSTS)
    slots = []
    for of_layer, row in zip(costs["layers"], scores, strict=True):
        slots.append(
            [Choice(name, row[name].measured(c.part.measure, parent), costs_of) for name, costs_of in of_layer.items()]
        )
    limits = [Limit(key, most, costs["ends"][key]) for key, most in limit_values(c, _parent_costs(c)).items()]
    equal = [
        [layer for layer, block in enumerate(c.definition.blocks) if block.name == kind] for kind in c.part.homogeneous
    ]
    return slots, limits, equal


def limit_values(c: Context, own: dict[str, float]) -> dict[str, float]:
    """Return resource -> the most of it, of the recipe's limits.

    Args:
        own: what the parent takes of each.
    """
    costs, most = c.part.costs, size_limits(c)
    times = [
        costs.latency_seconds,
        costs.tokens_per_second and costs.batch * (costs.prompt + costs.output) / costs.tokens_per_second,
        costs.speedup and own[LATENCY] / costs.speedup,
    ]
    if any(times):
        most[LATENCY] = min(time for time in times if time)
    return most
