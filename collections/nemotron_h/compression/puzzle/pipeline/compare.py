"""Stage `compare`: every child as a whole beside its parent, and which of them is made.

    nemotron-h puzzle RECIPE --stage compare

Reads solutions.json and the library. Writes compared.json; `known.json` holds what was compared of an interrupted
attempt.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.local import Change, child_changes
from nemotron_h.compression.puzzle.pipeline.search import SOLUTIONS
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.launch.stages import Stage

COMPARED = "compared.json"
#: ours: children that share a pass of the parent
AT_ONCE = 8


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "the children as wholes, and the best of them", ("importance", "library", "search")
    return Stage("compare", title, needs, (COMPARED,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside solutions and library."""
    return c.parent.score_inputs(CHOICE)


def run(c: Context, folder: Path) -> str:
    """Compare all children with the parent; of the solutions the one that is closest to it is chosen."""
    found, path = c.read("search", SOLUTIONS), folder / "known.json"
    groups = {"solutions": found["solutions"], "greedy": [found["greedy"]], "random": found["random"]}
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    every = {json.dumps(row["picks"]): row["picks"] for rows in groups.values() for row in rows}
    missing = [key for key in every if key not in known]
    text, batch = c.text.held_out[CHOICE], c.recipe.data.micro_batch_size
    with StageProgress(c.console, "children", len(missing)) as bar:
        for start in range(0, len(missing), AT_ONCE):
            children = {key: c.realised(every[key]) for key in missing[start : start + AT_ONCE]}
            changes = child_changes(c.parent.model, children, text, batch)
            known |= {key: asdict(change) for key, change in changes.items()}
            write_json(path, known)
            bar.advance(len(children))
    compared = {group: [known[json.dumps(row["picks"])] for row in rows] for group, rows in groups.items()}
    own = c.parent.own_score(CHOICE)
    parent, measure = Change(0.0, own.loss, own.accuracy), found["measure"]
    lost = {group: [Change(**each).measured(measure, parent) for each in rows] for group, rows in compared.items()}
    best = min(range(len(lost["solutions"])), key=lost["solutions"].__getitem__)
    chosen = {"solution": best, **found["solutions"][best]}
    write_json(folder / COMPARED, {"parent": asdict(parent), "lost": lost, "chosen": chosen, **compared})
    return (
        f"solution {best + 1} of {len(lost['solutions'])}: {measure} {lost['solutions'][best]:.4f}, foretold "
        f"{chosen['score']:.4f}; greedy {lost['greedy'][0]:.4f}, random ones at best {min(lost['random']):.4f}"
    )
