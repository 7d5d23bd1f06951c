"""Stage `score`: the parent with one layer replaced, for every variant, on held-out text (2411.19146, 4.2).

    nemotron-h puzzle RECIPE --stage score

Reads the library. Writes scores.json; `layer-N.json` holds the scores of a layer, so that an interrupted attempt goes
on from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.architecture.variants import PARENT
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.puzzle.context import Context
from nemotron_h.compression.puzzle.local import Change, changes
from nemotron_h.compression.workers import over_layers
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.launch.stages import Stage

SCORES = "scores.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title, needs = "every variant in its layer's place, on held-out text", ("importance", "library")
    return Stage("score", title, needs, (SCORES,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside the library."""
    return {**c.parent.score_inputs(CHOICE), "variants": [list(of_layer) for of_layer in c.variants]}


def run(c: Context, folder: Path) -> str:
    """Score what is not scored yet."""
    layers = [layer for layer, of_layer in enumerate(c.variants) if len(of_layer) > 1]
    missing = [layer for layer in layers if not _path(folder, layer).is_file()]  # the first ones take longest
    work = {layer: len(c.variants[layer]) * (len(c.variants) - layer) + layer for layer in missing}
    with StageProgress(c.console, "work on layers", sum(work.values())) as bar:
        for layer, scores in over_layers(c, score_layer, missing):
            write_json(_path(folder, layer), scores)
            bar.advance(work[layer])
    scores = {layer: json.loads(_path(folder, layer).read_text()) for layer in layers}
    parent = next(iter(scores.values()))[PARENT]
    write_json(folder / SCORES, {"parent": parent, "layers": scores})
    changed = [(layer, name, each["kl"]) for layer, row in scores.items() for name, each in row.items()]
    layer, name, kl = max(changed, key=lambda each: each[2])
    return f"{len(changed) - len(layers)} variants; the parent misses most by layer {layer}, {name}: KL {kl:.3f}"


def _path(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.json"


def score_layer(c: Context, layer: int) -> dict[str, Any]:
    """Return the scores of a layer's variants by name, the parent's among them."""
    forward = Forward(c.parent.model)
    pieces = {name: c.part_of(layer, name, forward) for name in c.variants[layer] if name != PARENT}
    found = changes(forward, layer, pieces, c.text.held_out[CHOICE], c.recipe.data.micro_batch_size)
    return {name or PARENT: asdict(change) for name, change in found.items()}


def read_scores(c: Context) -> tuple[Change, list[dict[str, Change]]]:
    """Return the parent's own results, and those of each layer's variants by name."""
    stored = c.read("score", SCORES)
    parent = Change(**stored["parent"])
    rows = [stored["layers"].get(str(layer), {PARENT: stored["parent"]}) for layer in range(len(c.variants))]
    return parent, [{name: Change(**each) for name, each in row.items()} for row in rows]
