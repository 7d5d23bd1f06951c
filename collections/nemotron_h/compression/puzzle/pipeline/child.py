"""Stage `child`: the best of the children as a checkpoint, and what all are beside what was foretold of them.

    nemotron-h puzzle RECIPE --stage child

Reads solutions.json and the library. Writes NAME (checkpoint) and child.json; `compared.json` holds what was compared
of an interrupted attempt.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.pipeline.text import CHOICE, REPORTED
from nemotron_h.compression.puzzle.child import write_child
from nemotron_h.compression.puzzle.context import Context, Picks
from nemotron_h.compression.puzzle.local import Change, child_changes
from nemotron_h.compression.puzzle.pipeline.costs import LATENCY, measured_latency
from nemotron_h.compression.puzzle.pipeline.search import SOLUTIONS
from nemotron_h.compression.stages import Stage
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress

CHILD, PRUNED = "child.json", "pruned"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "the best child, and what it is beside what was foretold", ("importance", "library", "search")
    return Stage("child", title, needs, (CHILD, PRUNED), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside solutions and library."""
    return c.parent.score_inputs(CHOICE, REPORTED)


def name_of(c: Context) -> str:
    """Return the name of the child's definition."""
    return f"{c.definition.name}-puzzle"


def run(c: Context, folder: Path) -> str:
    """Compare all children with the parent, and write the best one."""
    found = c.read("search", SOLUTIONS)
    groups = {"solutions": found["solutions"], "greedy": [found["greedy"]], "random": found["random"]}
    compared = _compared(c, groups, folder / "compared.json")
    # of the children that the search is sure of, the one that is closest to its parent as a whole
    measure = found["measure"]
    parent = Change(**compared["parent"])
    own = [Change(**each).measured(measure, parent) for each in compared["solutions"]]
    best = min(range(len(own)), key=own.__getitem__)
    picks = found["solutions"][best]["picks"]
    shutil.rmtree(folder / PRUNED, ignore_errors=True)  # an attempt that was interrupted
    definition = write_child(c, picks, folder / PRUNED, name_of(c), {"solution": best})
    result = {
        "picks": picks,
        "solution": best,
        "parameters": {"parent": c.definition.parameters, "child": definition.parameters},
        "foretold": found["solutions"][best],
        "compared": compared,
        "latency": _latency(c, picks, found["solutions"][best]["costs"]),
        REPORTED: asdict(child_changes(c.parent.model, c.realised(picks), c.text.held_out[REPORTED], _batch(c))),
    }
    write_json(folder / CHILD, result)
    return (
        f"solution {best + 1} of {len(own)}: {definition.parameters:,} parameters, {measure} {own[best]:.4f}; greedy "
        f"{Change(**compared['greedy'][0]).measured(measure, parent):.4f}, random ones at best "
        f"{min(Change(**each).measured(measure, parent) for each in compared['random']):.4f}"
    )


def _batch(c: Context) -> int:
    return c.recipe.data.micro_batch_size


def _compared(c: Context, groups: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what each child is beside its parent, on the text that the variants were scored on."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    text, batch = c.text.held_out[CHOICE], _batch(c)

    def compare(picks: Picks) -> dict[str, Any]:
        key = json.dumps(picks)
        if key not in known:
            known[key] = asdict(child_changes(c.parent.model, c.realised(picks), text, batch))
            write_json(path, known)
        return known[key]

    with StageProgress(c.console, "children", sum(map(len, groups.values()))) as bar:
        compared: dict[str, Any] = {}
        for group, rows in groups.items():
            compared[group] = []
            for row in rows:
                compared[group].append(compare(row["picks"]))
                bar.advance()
    loss = c.parent.own_score(CHOICE)
    return {"parent": asdict(Change(0.0, loss.loss, loss.accuracy)), **compared}


def _latency(c: Context, picks: Picks, foretold: dict[str, float]) -> dict[str, float] | None:
    """Return seconds of a batch in the scenario: foretold and measured, of the child and of its parent; None where the
    recipe asks for no times.
    """
    if c.part.costs.times == "none":
        return None
    parent, child = measured_latency(c, [c.parent.model, c.realised(picks)])
    return {"foretold": foretold[LATENCY], "child": child, "parent": parent}
