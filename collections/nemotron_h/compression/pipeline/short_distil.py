"""Stage `short-distil`: the best candidates, cut out and distilled for a short time each (paper 3.3).

    nemotron-h minipuzzle RECIPE --stage short-distil

Reads importance and score/ranking.json. Writes NAME-pruned (a checkpoint) and NAME (a run) for each candidate, and
results.json; `measured.json` holds the candidates that an interrupted attempt is through with.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.candidates import Candidate, candidate_of
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.pipeline.score import RANKING
from nemotron_h.compression.pipeline.text import CHOICE, REPORTED
from nemotron_h.core.files import write_json
from nemotron_h.launch.runs import Run
from nemotron_h.launch.stages import Stage

RESULTS = "results.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = f"the best {c.part.short} for {c.part.short_tokens} tokens each", ("importance", "score")
    return Stage("short-distil", title, needs, (RESULTS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside importance and ranking."""
    return {
        **c.distillation_inputs(),
        **c.parent.score_inputs(CHOICE, REPORTED),
        **c.keys("short_tokens", "evaluate"),
    }


def run(c: Context, folder: Path) -> str:
    """Distil the chosen candidates, as many at a time as the machine takes; on a cluster all are queued at once."""
    ranking = c.read("score", RANKING)
    rows = {row["name"]: row for row in ranking["candidates"]}
    chosen = [candidate_of(rows[name]) for name in ranking["chosen"]]
    path = folder / "measured.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def distillation(each: Candidate) -> Run:
        start = folder / f"{each.name}-pruned"
        return c.distillation(each.name, c.definition_of(each), start, c.part.short_tokens, folder)

    runs = {each.name: distillation(each) for each in chosen}
    missing = [candidate for candidate in chosen if candidate.name not in measured]
    for candidate in missing:
        c.pruned(folder, candidate)
    c.train_together([runs[candidate.name] for candidate in missing])
    for number, candidate in enumerate(chosen, 1):
        if candidate.name in measured:
            continue
        pruned = c.pruned(folder, candidate)
        short = c.trained(runs[candidate.name], f"  {candidate.name}, {number} of {len(chosen)}")
        measured[candidate.name] = {"pruned": c.measure(pruned), "short": c.measure(short)}
        write_json(path, measured)
    results = {each.name: {**measured[each.name], "candidate": each.sizes} for each in chosen}
    write_json(folder / RESULTS, results)
    return "; ".join(
        f"{name}: loss {r['pruned']['loss']:.3f} -> {r['short']['loss']:.3f}" for name, r in results.items()
    )
