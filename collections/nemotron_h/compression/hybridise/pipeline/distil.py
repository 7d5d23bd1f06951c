"""Stage `distil-N`: a round's model, distilled from the parent: mixers alone, where the recipe has it, then all of it.

    nemotron-h hybridise RECIPE --stage distil-1

Reads mixers-N. Writes the runs <name>_N_frozen and <name>_N, and results.json.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.pipeline.mixers import MIXERS
from nemotron_h.compression.hybridise.rounds import RESULTS, Round, distillations_of
from nemotron_h.compression.pipeline.text import HALVES, REPORTED
from nemotron_h.compression.recovery import recovered, sentence
from nemotron_h.core.files import write_json
from nemotron_h.launch.stages import Stage


def stage(c: Context, each: Round) -> Stage:
    """Return the stage."""
    frozen = f"mixers alone for {c.part.frozen_tokens} tokens, then " if c.part.frozen_tokens else ""
    title = f"distilled from the parent, {frozen}all of it for {c.recipe.tokens} tokens"
    return Stage(each.distil, title, (each.mixers,), (RESULTS,), partial(inputs, c), partial(run, c, each))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the mixers."""
    return {
        **c.distillation_inputs(),
        **c.parent.score_inputs(*HALVES),
        "tokens": c.recipe.tokens,
        **c.keys("frozen_tokens", "frozen_lr"),
    }


def run(c: Context, each: Round, folder: Path) -> str:
    """Distil the model and measure it after each run."""
    start, student = c.transplanted(each), c.model_of(each)
    runs = distillations_of(c.recipe, each, student, start, c.parent.checkpoint, folder)
    measured = [c.measure(c.trained(run, f"  {run.name}")) for run in runs]
    parent, before, after = c.parent.own_score(REPORTED), c.read(each.mixers, MIXERS)["measured"], measured[-1]
    losses = (parent.loss, before["loss"], after["loss"])
    result = {
        "parent": asdict(parent),
        "frozen": measured[0] if len(runs) > 1 else None,
        "child": after,
        "recovered": recovered(*losses),
    }
    write_json(folder / RESULTS, result)
    steps = " -> ".join(f"{loss:.3f}" for loss in (before["loss"], *(model["loss"] for model in measured)))
    return f"loss {steps}, parent {parent.loss:.3f}: {sentence(*losses)}"
