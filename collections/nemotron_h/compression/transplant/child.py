"""Write a checkpoint with mixers in the place of attention layers, one weight in memory at a time.

It appears only if it holds the planned number of parameters and computes what its parent does with the mixers in
memory in these layers' places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import Weight
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.checkpoint.writer import Advance, Read, finish, size, write_weights
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.puzzle.local import Replaced, own_layer
from nemotron_h.compression.slicing import check_written, rounded
from nemotron_h.compression.transplant.mixers import Error, Mixers
from nemotron_h.export.folder import new_folder
from nemotron_h.inference.model import load_model
from nemotron_h.inference.trained_tokenizer import inherit_data

#: where weights come from that are no attention's
SAMPLED = "sampled"


def write_child(
    mixers: Mixers,
    definition: ModelDefinition,
    layers: Sequence[int],
    out: Path,
    settings: Mapping[str, Any],
    errors: Mapping[int, Error],
    advance: Advance = lambda _: None,
) -> None:
    """Write a parent's weights with mixers in some layers, as a checkpoint of its own.

    Args:
        mixers: of these layers, and maybe of others.
        definition: of the child.
        layers: that are transplanted.
        out: the folder; must not exist. It has the format of an imported model: weights, run.json, model.yaml.
        settings: what run.json tells under `transplanted`, besides the parent and the layers.
        errors: of the mixers that were trained.
        advance: told the bytes of each written tensor.
    Errors:
        UserError: `out` exists or the disk is full, or what was written is not what was planned, which leaves nothing
            behind.
    """
    source = mixers.source
    checkpoint, parent = source.checkpoint, source.definition.name
    of_layers = [{"layer": layer, **record(mixers, layer)} for layer in layers]
    for row in of_layers:
        if row["layer"] in errors:
            row["error"] = asdict(errors[row["layer"]])
    with new_folder(out, size(definition, source.dtype)) as folder:
        write_weights(folder, definition, source.dtype, _reader(mixers, definition, layers), advance)
        written = {
            "data": inherit_data(checkpoint, read_record(checkpoint), folder),
            "transplanted": {
                "from": str(checkpoint.absolute()),
                "model": parent,
                "seed": mixers.seed,
                **settings,
                "layers": of_layers,
            },
        }
        finish(folder, definition, written, f"Transplanted from {parent}; counts are checked when loaded.")
        _check(mixers, layers, folder)


def record(mixers: Mixers, layer: int) -> dict[str, Any]:
    """Return where the weights of a layer's mixer come from, for JSON."""
    transplant = mixers.transplants[layer]
    heads, sampled = transplant.heads, mixers.start == "random"
    shared = heads.groups * heads.queries // transplant.groups
    mean = f", means of {shared} query heads" if shared > 1 else ""
    copies = f", {heads.queries} copies each" if heads.queries > 1 else ""
    return {
        "heads": heads.groups * heads.queries,
        "groups": transplant.groups,
        "C": SAMPLED if sampled else f"Q{mean}",
        "B": SAMPLED if sampled else f"K{mean or copies}",
        "x": SAMPLED if sampled else f"V{copies}",
        "out_proj": SAMPLED if sampled else "O",
        "dropped": transplant.dropped(),
    }


def _reader(mixers: Mixers, definition: ModelDefinition, layers: Sequence[int]) -> Read:
    """Return what gives the tensors of each of the child's weights: the parent's, or a mixer's."""
    source = mixers.source
    origins = {next(iter(row.ours)): row for row in source.rows}
    places = {
        next(iter(row.ours)): (layer, place)
        for layer in layers
        for place, row in enumerate(definition.blocks[layer].tensors(f"decoder.layers.{layer}.", ""))
    }
    last: dict[int, list[Tensor]] = {}  # the mixer whose rows are being written

    def read(row: Weight) -> Mapping[str, Tensor]:
        name = next(iter(row.ours))
        if name in places:
            layer, place = places[name]
            if layer not in last:
                last.clear()
                last[layer] = mixers.tensors(layer)
            whole = last[layer][place].to(row.dtype(source.dtype))
        else:
            whole = source.read_row(origins[name])
        parts = whole.split([shape[0] for shape in row.ours.values()])
        return {key: part.contiguous() for key, part in zip(row.ours, parts, strict=True)}

    return read


def _check(mixers: Mixers, layers: Sequence[int], written: Path) -> None:
    """Compare a written child with its parent that has the mixers: parameters with the plan, and logits.

    Both are read from disk, a layer at a time.

    Errors:
        UserError: they differ.
    """
    checkpoint = mixers.source.checkpoint
    forward = Forward(load_model(checkpoint, dtype=torch.float32, lazy=True))
    expected = Replaced(
        forward, lambda layer: mixers.piece(layer, forward) if layer in layers else own_layer(forward, layer)
    )
    wrong = f"the transplanted {checkpoint} computes something else than it should"
    check_written(expected, written, rounded(mixers.source.dtype), wrong)
