"""Stage `mixers-N`: mixers that begin from attention, trained by themselves, in the place of the layers that go.

    nemotron-h hybridise RECIPE --stage mixers-1

Reads what the round before made. Writes layer-L.safetensors, and score-L.json where layers are chosen by them, so that
an interrupted attempt goes on from there; transplanted/ (checkpoint) and mixers.json.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemotron_h.architecture.hybrid import evenly
from nemotron_h.checkpoint.writer import size
from nemotron_h.compression import stored
from nemotron_h.compression.hybridise.context import Context
from nemotron_h.compression.hybridise.rounds import TRANSPLANTED, Round, hybrid_of, name_of
from nemotron_h.compression.pipeline.text import CHOICE, HALVES
from nemotron_h.compression.puzzle.local import Change
from nemotron_h.compression.transplant.child import write_child
from nemotron_h.compression.transplant.mixers import Error, MatrixError, least_harmful
from nemotron_h.compression.workers import bound, over_layers
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.launch.stages import Stage

MIXERS = "mixers.json"


def stage(c: Context, each: Round) -> Stage:
    """Return the stage."""
    needs = (c.rounds[each.number - 2].distil,) if each.number > 1 else ()
    title = f"Mamba-2 in the place of attention, which stays in {each.stay} layers"
    run_round = partial(run, c, each)
    return Stage(each.mixers, title, needs, (MIXERS, TRANSPLANTED), partial(inputs, c, each), run_round)


def inputs(c: Context, each: Round) -> dict[str, Any]:
    """Return what the result depends on, beside the round before."""
    return {
        **c.parent.score_inputs(*HALVES),
        **c.text.inputs("train"),
        **c.keys("choice", "groups", "start"),
        **{f"hybridise.local.{key}": value for key, value in asdict(c.part.local).items()},
        "layers of attention": each.stay,
        "init_seed": c.recipe.init_seed,
    }


def run(c: Context, each: Round, folder: Path) -> str:
    """Make and train the mixers, choose the layers that go, and write the model."""
    made = c.mixers_of(each)
    before, layers = made.source.definition, list(made.transplants)
    by_scores = c.part.choice == "kl" and each.stay > 0
    stay = evenly(layers, each.stay)
    tried = layers if by_scores else [layer for layer in layers if layer not in stay]
    _train(c, each, folder, tried)
    scores = _score(c, each, folder, tried) if by_scores else {}
    c.release()
    go = least_harmful(scores, len(layers) - each.stay) if by_scores else tried
    errors = {layer: _error(_weights(folder, layer)) for layer in go}
    made.trained.update({layer: stored.read_tensors(_weights(folder, layer)) for layer in go})
    model = hybrid_of(before, go, c.part.groups, name_of(c.definition, each))
    settings = {"chosen_by": c.part.choice, "round": each.number, "of": c.recipe.name}
    shutil.rmtree(folder / TRANSPLANTED, ignore_errors=True)  # an attempt that was interrupted
    with StageProgress(c.console, "writing", size(model, made.source.dtype), "bytes") as bar:
        write_child(made, model, go, folder / TRANSPLANTED, settings, errors, bar.advance)
    result = {
        "share": each.share,
        "stay": [layer for layer in layers if layer not in go],
        "go": go,
        "pattern": model.pattern,
        "errors": {layer: asdict(error) for layer, error in errors.items()},
        "kl": {layer: {name: change.kl for name, change in row.items() if name} for layer, row in scores.items()},
        "measured": c.measure(folder / TRANSPLANTED),
    }
    write_json(folder / MIXERS, result)
    mean = sum(error.trained for error in errors.values()) / len(errors)
    return f"{model.pattern}; error {mean:.3f}, the mean of {len(go)} mixers; loss {result['measured']['loss']:.3f}"


def _train(c: Context, each: Round, folder: Path, layers: list[int]) -> None:
    """Train the mixers that are not there yet, several layers at a time."""
    missing = sorted((layer for layer in layers if not _weights(folder, layer).is_file()), reverse=True)
    tokens = sum(length.tokens for length in (c.lengths.matrix, c.lengths.output) if length)
    work = {layer: (layer + 4) * max(tokens, 1) for layer in missing}  # the layers before, and the mixer three times
    with StageProgress(c.console, "work on layers", sum(work.values())) as bar:
        for layer, line in over_layers(c, bound(train_layer, each, folder), missing):
            bar.say(f"  layer {layer}: {line}")
            bar.advance(work[layer])


def train_layer(c: Context, layer: int, each: Round, folder: Path) -> str:
    """Train a layer's mixer, store it, and return its errors on a line."""
    mixers, held_out = c.mixers_of(each), c.text.held_out[CHOICE][:, :-1]
    error = mixers.train(layer, c.forward_of(each), c.lengths, c.batches(), held_out, c.part.local.batch)
    stored.save(_weights(folder, layer), asdict(error), mixers.trained[layer])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return error.line()


def _score(c: Context, each: Round, folder: Path, layers: list[int]) -> dict[int, dict[str, Change]]:
    """Return what changes with each layer's mixer in its place, by layer."""
    missing = [layer for layer in layers if not _scores(folder, layer).is_file()]
    with StageProgress(c.console, "layers scored", len(missing)) as bar:
        for layer, row in over_layers(c, bound(score_layer, each, folder), missing):
            write_json(_scores(folder, layer), row)
            bar.advance()
    rows = {layer: json.loads(_scores(folder, layer).read_text()) for layer in layers}
    return {layer: {name: Change(**change) for name, change in row.items()} for layer, row in rows.items()}


def score_layer(c: Context, layer: int, each: Round, folder: Path) -> dict[str, Any]:
    """Return what changes with a layer's mixer in its place."""
    mixers, text = c.mixers_of(each), c.text.held_out[CHOICE]
    mixers.trained[layer] = stored.read_tensors(_weights(folder, layer))
    row = mixers.score(layer, c.forward_of(each), text, c.recipe.data.micro_batch_size)
    return {name: asdict(change) for name, change in row.items()}


def _weights(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _scores(folder: Path, layer: int) -> Path:
    return folder / f"score-{layer}.json"


def _error(path: Path) -> Error:
    record = stored.read_record(path)
    matrix = record.pop("matrix")
    return Error(**record, matrix=MatrixError(**matrix) if matrix else None)
