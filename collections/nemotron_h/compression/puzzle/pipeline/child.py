"""Stage `child`: the chosen child as a checkpoint, and its time beside what was foretold.

    nemotron-h puzzle RECIPE --stage child

Reads compared.json, refined.json and the library. Writes pruned/ (checkpoint) and child.json.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.pipeline.text import REPORTED
from nemotron_h.compression.puzzle.child import write_child
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.local import child_changes
from nemotron_h.compression.puzzle.pipeline.compare import COMPARED
from nemotron_h.compression.puzzle.pipeline.costs import LATENCY, measured_latency
from nemotron_h.compression.puzzle.pipeline.refine import read_refined
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.launch.stages import Stage

CHILD, PRUNED = "child.json", "pruned"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "the chosen child as a checkpoint", ("importance", "library", "compare", "refine")
    return Stage("child", title, needs, (CHILD, PRUNED), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside choice and library."""
    return c.parent.score_inputs(REPORTED)


def name_of(c: Context) -> str:
    """Return the name of the child's definition."""
    return f"{c.definition.name}-puzzle"


def run(c: Context, folder: Path) -> str:
    """Write the child and measure it."""
    chosen, refined = c.read("compare", COMPARED)["chosen"], read_refined(c)
    picks, settings = chosen["picks"], {"solution": chosen["solution"]}
    shutil.rmtree(folder / PRUNED, ignore_errors=True)  # an attempt that was interrupted
    with StageProgress(c.console, "child", 1) as bar:
        definition = write_child(c, picks, refined, folder / PRUNED, name_of(c), settings)
        bar.advance()
    child, text = c.realised(picks, refined), c.text.held_out[REPORTED]
    changes = child_changes(c.parent.model, {"child": child}, text, c.recipe.data.micro_batch_size)
    result = {
        "picks": picks,
        "parameters": {"parent": c.definition.parameters, "child": definition.parameters},
        "latency": None,
        REPORTED: asdict(changes["child"]),
    }
    said = (
        f"{definition.parameters:,} parameters, {definition.parameters / c.definition.parameters:.1%} of the parent's"
    )
    if c.part.costs.times == "measured":
        of_parent, of_child = measured_latency(c, [c.parent.model, child])
        result["latency"] = {"foretold": chosen["costs"][LATENCY], "child": of_child, "parent": of_parent}
        said += f"; a batch takes {of_child:.3g} s, foretold {chosen['costs'][LATENCY]:.3g}, the parent {of_parent:.3g}"
    write_json(folder / CHILD, result)
    return said
