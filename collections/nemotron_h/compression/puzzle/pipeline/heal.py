"""Stage `heal`: the child, distilled from its parent for the recipe's tokens, and once more at longer windows.

    nemotron-h puzzle RECIPE --stage heal

Reads the child. Writes the run <name>, the run <name>_long where the recipe asks for it, and results.json. With
`distill.hidden_weight` the states after each layer that stayed are compared (2411.19146, 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.variants import NO_OP
from nemotron_h.compression import distillations
from nemotron_h.compression.pipeline.text import REPORTED
from nemotron_h.compression.puzzle.context import Context, Picks
from nemotron_h.compression.puzzle.pipeline.child import CHILD, PRUNED, name_of
from nemotron_h.compression.recovery import recovered, sentence
from nemotron_h.core.files import write_json
from nemotron_h.launch.runs import Run
from nemotron_h.launch.stages import Stage
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig

RESULTS = "results.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title = f"the child, distilled for {c.recipe.tokens} tokens"
    return Stage("heal", title, ("child",), (RESULTS,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the child."""
    return {
        **c.distillation_inputs(),
        **c.parent.score_inputs(REPORTED),
        "tokens": c.recipe.tokens,
        **c.keys("long_tokens", "long_seq_length"),
    }


def run(c: Context, folder: Path) -> str:
    """Distil the child and measure it."""
    child, start = c.read("child", CHILD), c.path("child", PRUNED)
    student = c.definition_of(child["picks"], name_of(c))
    recipe = with_layers(c.recipe, child["picks"])
    short, long = c.recipe.name, f"{c.recipe.name}_long"
    healing = distillations.run_of(recipe, short, student, start, c.parent.checkpoint, c.recipe.tokens, folder)
    checkpoint = c.trained(healing, f"  {short}")
    if c.part.long_tokens:
        second = with_long_windows(recipe)
        longer = distillations.run_of(
            second, long, student, checkpoint, c.parent.checkpoint, c.part.long_tokens, folder
        )
        checkpoint = c.trained(longer, f"  {long}")
    score, pruned, measured = c.parent.own_score(REPORTED), child[REPORTED]["loss"], c.measure(checkpoint)
    share = recovered(score.loss, pruned, measured["loss"])
    write_json(folder / RESULTS, {"parent": asdict(score), "child": measured, "recovered": share})
    loss = measured["loss"]
    return f"loss {pruned:.3f} before -> {loss:.3f}, parent {score.loss:.3f}: {sentence(score.loss, pruned, loss)}"


def with_layers(recipe: RecipeConfig, picks: Picks) -> RecipeConfig:
    """Return the recipe with the pairs of layers whose states are compared, where it weighs them."""
    if recipe.distill is None or not recipe.distill.hidden_weight:
        return recipe
    stay = [layer for layer, pick in enumerate(picks) if pick != NO_OP]
    pairs = [[number, layer] for number, layer in enumerate(stay)]
    return dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, hidden_layers=pairs))


def with_long_windows(recipe: RecipeConfig) -> RecipeConfig:
    """Return the recipe with its second healing's windows; a step has as many tokens as before, or one window."""
    length, data = recipe.puzzle.long_seq_length, recipe.data
    rows = max(1, data.global_batch_size * data.seq_length // length)
    micro = max(1, min(rows, data.micro_batch_size * data.seq_length // length))
    longer = dataclasses.replace(data, seq_length=length, global_batch_size=rows, micro_batch_size=micro)
    return dataclasses.replace(recipe, data=longer)


def planned(recipe: RecipeConfig) -> Sequence[Run]:
    """Return the healing as it would be started, the parent standing for the child."""
    parent, root = definition_of(recipe, recipe.name), Path(recipe.log.dir) / recipe.name
    start, folder, teacher = root / "child" / PRUNED, root / "heal", Path(recipe.puzzle.parent)
    runs = [distillations.run_of(recipe, recipe.name, parent, start, teacher, recipe.tokens, folder)]
    if recipe.puzzle.long_tokens:
        again, name = with_long_windows(recipe), f"{recipe.name}_long"
        start = folder / recipe.name
        runs.append(distillations.run_of(again, name, parent, start, teacher, recipe.puzzle.long_tokens, folder))
    return runs
