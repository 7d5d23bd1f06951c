"""Stage `then-N`: a recipe of fine-tuning or preferences, begun from the result before it.

    nemotron-h hybridise RECIPE --stage then-1

Reads the last round, or the recipe before. Writes the recipe's run, and results.json.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.distillations import MATTERS
from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.rounds import RESULTS, following_run
from nemotron_h.compression.pipeline.text import HALVES, content_of
from nemotron_h.core.files import write_json
from nemotron_h.data.blend import load_blend
from nemotron_h.data.manifest import check_manifest
from nemotron_h.launch.stages import Stage, settings


def stage(c: Context, stage_name: str, recipe: str) -> Stage:
    """Return the stage.

    Args:
        recipe: name or path of what follows.
    """
    arguments = (c, _before(c, stage_name), recipe)
    title, needs = f"{recipe} from there", (arguments[1],)
    return Stage(stage_name, title, needs, (RESULTS,), partial(inputs, c, recipe), partial(run, *arguments))


def _before(c: Context, stage_name: str) -> str:
    """Return the stage that it begins from."""
    number = int(stage_name.rpartition("-")[2])
    return f"then-{number - 1}" if number > 1 else c.rounds[-1].distil


def inputs(c: Context, recipe: str) -> dict[str, Any]:
    """Return what the result depends on, beside the result before."""
    own = c.following(recipe)
    blend = load_blend(own.data.blend)
    text = content_of(blend, check_manifest(own.data.root, blend), "train")
    keys = {"stage": own.stage, "tokens": own.tokens, **settings(own, MATTERS)}
    keys["preference"] = asdict(own.preference) if own.preference else None
    return {**c.parent.score_inputs(*HALVES), "text": text, **{f"then: {key}": each for key, each in keys.items()}}


def run(c: Context, before: str, recipe: str, folder: Path) -> str:
    """Train the recipe's run and measure its result on the text of the rounds."""
    start = c.read(before, RESULTS)["child"]
    own = following_run(c.following(recipe), c.model_of(c.rounds[-1]), Path(start["checkpoint"]), folder)
    measured = c.measure(c.trained(own, f"  {own.name}"))
    write_json(folder / RESULTS, {"recipe": recipe, "stage": own.recipe.stage, "child": measured})
    return f"loss {start['loss']:.3f} -> {measured['loss']:.3f} on the text of the rounds"
