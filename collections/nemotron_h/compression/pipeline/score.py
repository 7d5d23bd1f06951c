"""Stage `score`: every candidate on held-out text, untrained, and the best of them (paper 3.3).

    nemotron-h minipuzzle RECIPE --stage score

Reads importance and candidates.json. Writes ranking.json; `scores.jsonl` holds a line as each candidate is scored, so
that an interrupted attempt, or one with other candidates, goes on from there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.candidates import Candidate, candidate_of
from nemotron_h.compression.pipeline.candidates import CANDIDATES
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.scoring import Score, order
from nemotron_h.compression.task_scores import task_scores
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.launch.stages import ASIDE, Stage, outputs

RANKING, SCORES = "ranking.json", "scores.jsonl"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "every candidate on held-out text, untrained", ("importance", "candidates")
    return Stage("score", title, needs, (RANKING,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside importance and candidates."""
    return {**c.parent.score_inputs(CHOICE), **c.keys("keep", "short", "evaluate")}


def run(c: Context, folder: Path) -> str:
    """Score the candidates and choose those that are distilled."""
    rows = c.read("candidates", CANDIDATES)
    candidates = [candidate_of(row) for row in rows]
    scored = _scored(c, folder)
    missing = [candidate for candidate in candidates if candidate.name not in scored]
    parent = c.parent.own_score(CHOICE)  # before the clock of the candidates starts
    with (
        (folder / SCORES).open("a") as file,
        StageProgress(c.console, "candidates", len(missing) * parent.tokens) as bar,
    ):
        for candidate in missing:
            scored[candidate.name] = asdict(c.parent.score(c.realised(candidate), CHOICE, bar.advance))
            file.write(json.dumps({"name": candidate.name, **scored[candidate.name]}) + "\n")
            file.flush()
    scores = [Score(**scored[candidate.name]) for candidate in candidates]
    ranked = order(scores)
    best = ranked[: c.part.keep]
    evaluated: dict[str, dict[str, float]] = {}
    if c.part.evaluate:
        evaluated = _evaluated(c, folder, [candidates[n] for n in best])
        best = sorted(best, key=lambda n: (-evaluated[candidates[n].name]["mean"], ranked.index(n)))
    table = [
        {**rows[n], **asdict(scores[n]), "place": place, "evaluated": evaluated.get(candidates[n].name)}
        for place, n in enumerate(ranked, 1)
    ]
    chosen = [candidates[n].name for n in best[: c.part.short]]
    write_json(folder / RANKING, {"parent": asdict(parent), "candidates": table, "chosen": chosen})
    first = scores[best[0]]
    return (
        f"{len(candidates)} scored on {parent.tokens:,} tokens; first {chosen[0]}: accuracy "
        f"{first.accuracy:.3f} (parent {parent.accuracy:.3f}), agreement {first.agreement:.3f}"
    )


def _scored(c: Context, folder: Path) -> dict[str, dict[str, Any]]:
    """Return scores that are known, by candidate, out of this attempt or of one with other candidates."""
    key = {
        **c.parent.score_inputs(CHOICE),
        **outputs(c.folder / "importance"),
        "order": [c.part.order, c.recipe.init_seed],
    }
    head = json.dumps({"of": key}, sort_keys=True)
    path = folder / SCORES
    before = folder.with_name(folder.name + ASIDE) / SCORES
    for source in (path, before):
        lines = source.read_text().splitlines() if source.exists() else []
        if lines and lines[0] == head:
            whole = [line for line in lines if line.endswith("}")]  # a killed process leaves half a line
            path.write_text("\n".join(whole) + "\n")
            rows = [json.loads(line) for line in whole[1:]]
            return {row.pop("name"): row for row in rows}
    path.write_text(head + "\n")
    return {}


def _evaluated(c: Context, folder: Path, chosen: list[Candidate]) -> dict[str, dict[str, float]]:
    """Return task scores of the pruned candidates, by name; they are kept as they come."""
    path = folder / "evaluated.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    with StageProgress(c.console, "evaluating", len(chosen)) as bar:
        for candidate in chosen:
            if candidate.name not in scores:
                checkpoint = c.pruned(folder, candidate)
                scores[candidate.name] = task_scores(c.part.evaluate, checkpoint, c.origin)
                shutil.rmtree(checkpoint)
                write_json(path, scores)
            bar.advance()
    return {candidate.name: scores[candidate.name] for candidate in chosen}
