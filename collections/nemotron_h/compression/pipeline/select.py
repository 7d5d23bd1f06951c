"""Stage `select`: the best of the short distillations, by accuracy, or by the recipe's evaluation.

    nemotron-h minipuzzle RECIPE --stage select

Reads short-distil/results.json. Writes winner.json.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.pipeline.short_distil import RESULTS
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.core.files import write_json
from nemotron_h.launch.stages import Stage

WINNER = "winner.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    return Stage("select", "the best of them", ("short-distil",), (WINNER,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the short distillations."""
    return {"minipuzzle.evaluate": c.part.evaluate}


def run(c: Context, folder: Path) -> str:
    """Choose the winner."""
    results = c.read("short-distil", RESULTS)
    by = "evaluation" if c.part.evaluate else "accuracy"

    def value(name: str) -> float:
        short = results[name]["short"]
        return short["evaluated"]["mean"] if c.part.evaluate else short[CHOICE]["accuracy"]

    order = sorted(results, key=lambda name: (-value(name), results[name]["short"][CHOICE]["loss"]))
    write_json(folder / WINNER, {"name": order[0], "by": by, "order": order, **results[order[0]]})
    return f"{order[0]} by {by}: {value(order[0]):.4f}"
