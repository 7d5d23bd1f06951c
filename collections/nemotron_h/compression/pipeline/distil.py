"""Stage `distil`: the winner, distilled for the recipe's tokens; its checkpoint is the child (paper 3.4).

    nemotron-h minipuzzle RECIPE --stage distil

Reads short-distil (where the run starts from) and select/winner.json. Writes the run <name> and results.json.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.candidates import candidate_of
from nemotron_h.compression.pipeline.context import Context
from nemotron_h.compression.pipeline.select import WINNER
from nemotron_h.compression.pipeline.text import REPORTED
from nemotron_h.compression.recovery import recovered, sentence
from nemotron_h.core.files import write_json
from nemotron_h.launch.stages import Stage

RESULTS = "results.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = f"the winner for {c.recipe.tokens} tokens", ("short-distil", "select")
    return Stage("distil", title, needs, (RESULTS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside short distillations and winner."""
    return {
        **c.distillation_inputs(),
        **c.parent.score_inputs(REPORTED),
        "tokens": c.recipe.tokens,
        **c.keys("start"),
    }


def run(c: Context, folder: Path) -> str:
    """Distil the winner and measure it."""
    winner = c.read("select", WINNER)
    start = Path(winner[c.part.start]["checkpoint"])
    student = c.definition_of(candidate_of(winner["candidate"]))
    distillation = c.distillation(c.recipe.name, student, start, c.recipe.tokens, folder)
    measured = c.measure(c.trained(distillation, f"  {c.recipe.name}"))
    score = c.parent.own_score(REPORTED)
    parent, pruned, child = score.loss, winner["pruned"]["loss"], measured["loss"]
    share = recovered(parent, pruned, child)
    write_json(folder / RESULTS, {"parent": asdict(score), "child": measured, "recovered": share})
    return f"loss {pruned:.3f} pruned -> {child:.3f}, parent {parent:.3f}: {sentence(parent, pruned, child)}"
