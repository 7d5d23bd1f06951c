"""Stage `candidates`: the architectures of the grid within the budget (paper 3.3).

    nemotron-h minipuzzle RECIPE --stage candidates

Reads the importance, which decides what layers each keeps. Writes candidates.json; `speeds.json` holds what was
measured of an interrupted attempt, where the budget asks for a measured speed.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.candidates import candidate_of
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.speed import generation_speed
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.units import GIB
from nemotron_h.launch.stages import Stage

CANDIDATES = "candidates.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "architectures within the budget", ("importance",)
    return Stage("candidates", title, needs, (CANDIDATES,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the importance."""
    values = {**dataclasses.asdict(c.part.grid), **dataclasses.asdict(c.part.budget)}
    values |= {"order": c.part.order, "init_seed": c.recipe.init_seed}
    return {**c.parent.inputs(), **{f"minipuzzle.{key}": value for key, value in values.items()}}


def run(c: Context, folder: Path) -> str:
    """List the candidates with what they keep and cost."""
    candidates = c.candidates(c.scores.layers)
    rows = []
    for candidate in candidates:
        definition, cost = c.definition_of(candidate), candidates.cost(candidate)
        rows.append(
            {
                "name": candidate.name,
                **candidate.sizes,
                "pattern": definition.pattern,
                "layers": list(c.child(candidate).layers),
                "parameters": cost.parameters,
                "memory_gib": cost.memory.total / GIB,
                "read_gib": cost.read / GIB,
            }
        )
    if c.part.budget.speedup is not None and c.part.budget.speedup_by == "measured":
        rows = _fast_enough(c, rows, folder / "speeds.json")
    write_json(folder / CANDIDATES, rows)
    return f"{len(rows):,} of {len(candidates):,} combinations are within the budget"


def _fast_enough(c: Context, rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return those that generate as fast as the budget asks; `path` gets the speeds as they are measured."""
    speeds = json.loads(path.read_text()) if path.exists() else {}
    budget = c.part.budget
    models = [("", lambda: c.parent.model), *((r["name"], partial(c.realised, candidate_of(r))) for r in rows)]
    with StageProgress(c.console, "speeds", len(rows)) as bar:
        for name, model in models:
            if name not in speeds:
                speeds[name] = generation_speed(model(), budget.sequences)
                write_json(path, speeds)
            bar.advance(int(bool(name)))
    for row in rows:
        row["speedup"] = speeds[row["name"]] / speeds[""]
    fast = [row for row in rows if row["speedup"] >= budget.speedup]
    if not fast:
        fastest = max(rows, key=lambda row: row["speedup"])
        raise UserError(
            f"{c.origin}: minipuzzle.budget.speedup = {budget.speedup:g}: no candidate generates as fast here; the "
            f"fastest is {fastest['name']}, {fastest['speedup']:.3f} times the parent",
            hint=f"lower it to {fastest['speedup']:.3f} or less, or widen the grid",
        )
    return fast
