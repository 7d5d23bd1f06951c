"""Write a checkpoint whose key-value heads are aligned, or merged too, one weight in memory at a time.

It appears only if it holds the planned number of parameters and computes what its parent does: for merged heads the
parent with each head in the place of which its group's mean stands, rotated back; for layers that were trained, with
these in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.checkpoint.writer import Advance, Read, finish, size, write_weights
from nemotron_h.compression.child import Child
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import aligned_definition
from nemotron_h.compression.heads.fusion import Alignments, PooledLayers
from nemotron_h.compression.heads.training import TrainedLayer
from nemotron_h.compression.puzzle.local import Piece, Replaced, own_layer
from nemotron_h.compression.slicing import Masked, check_written, rounded
from nemotron_h.export.folder import new_folder
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import load_model
from nemotron_h.inference.trained_tokenizer import inherit_data


def write_aligned(
    checkpoint: Path,
    alignments: Alignments,
    kv_heads: int | None,
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    advance: Advance = lambda _: None,
    trained: Mapping[int, TrainedLayer] | None = None,
) -> ModelDefinition:
    """Fuse alignments into a checkpoint's weights, as a checkpoint of its own.

    Args:
        checkpoint: the parent's, of any parallel layout, or a run: its newest.
        alignments: of all its layers with attention.
        kv_heads: what they are merged to in each layer; None aligns alone.
        out: the folder; must not exist. It has the format of an imported model: weights, run.json, model.yaml.
        name: of its definition.
        settings: what run.json tells under `aligned`, besides the parent and each layer's groups.
        advance: told the bytes of each written tensor; `aligned_size` is all of them.
        trained: layer -> what is written of it, where layers were trained after merging.
    Returns:
        the definition.
    Errors:
        UserError: no or a damaged checkpoint; `out` exists or the disk is full; what was written is not what was
            planned, which leaves nothing behind.
    """
    checkpoint = find_checkpoint(checkpoint)
    record, source = read_record(checkpoint), ModelSource(checkpoint)
    parent, dtype = source.definition, source.dtype
    definition = aligned_definition(parent, kv_heads, name)
    with new_folder(out, size(definition, dtype)) as folder:
        read = _reader(source, alignments, kv_heads is not None, trained or {})
        write_weights(folder, definition, dtype, read, advance)
        of_layers = [{"layer": layer, **alignment.record()} for layer, alignment in alignments.items()]
        for of_layer in of_layers:
            of_layer |= trained[of_layer["layer"]].record() if trained else {}
        written = {
            "data": inherit_data(checkpoint, record, folder),
            "aligned": {
                "from": str(checkpoint.absolute()),
                "model": parent.name,
                "kv_heads": kv_heads,
                **settings,
                "layers": of_layers,
            },
        }
        verb = "Aligned" if kv_heads is None else "Heads merged"
        finish(folder, definition, written, f"{verb} from {parent.name}; parameters are checked when loaded.")
        _check(checkpoint, alignments, kv_heads is not None, trained or {}, folder, dtype)
    return definition


def aligned_size(checkpoint: Path, kv_heads: int | None) -> int:
    """Return the bytes of the tensors that `write_aligned` writes."""
    source = ModelSource(find_checkpoint(checkpoint))
    return size(aligned_definition(source.definition, kv_heads, "aligned"), source.dtype)


def _reader(source: ModelSource, alignments: Alignments, merge: bool, trained: Mapping[int, TrainedLayer]) -> Read:
    """Return what gives the tensors of each weight, with the rotations in those of attention."""
    parent = list(weights(source.definition))
    origins = {next(iter(row.ours)): row for row in parent}
    places: dict[str, tuple[int, bool]] = {}  # first tensor of a projection -> layer, and if it is the output's
    own: dict[str, Tensor] = {}
    for layer, alignment in alignments.items():
        rows = [name for name in origins if name.startswith(f"decoder.layers.{layer}.")]
        if layer in trained:
            own |= dict(zip(rows, trained[layer].piece.tensors, strict=True))
        places[rows[alignment.heads.qkv]], places[rows[alignment.heads.proj]] = (layer, False), (layer, True)

    def read(row: Weight) -> Mapping[str, Tensor]:
        name = next(iter(row.ours))
        if name in own:
            parts = own[name].to("cpu", row.dtype(source.dtype)).split([shape[0] for shape in row.ours.values()])
            return {key: part.contiguous() for key, part in zip(row.ours, parts, strict=True)}
        origin = origins[name]
        theirs = source.read(set(origin.theirs), source.dtype)
        whole = torch.cat([theirs[their] for their in origin.theirs])
        if name in places:
            layer, of_output = places[name]
            alignment = alignments[layer]
            if of_output:
                whole = alignment.proj(whole).to(whole.dtype)
            else:
                parts = whole.split([shape[0] for shape in origin.theirs.values()])
                whole = torch.cat(alignment.qkv(*parts, merge)).to(whole.dtype)
        return {key: tensor.contiguous() for key, tensor in row.to_ours(whole).items()}

    return read


def _check(
    checkpoint: Path,
    alignments: Alignments,
    merged: bool,
    trained: Mapping[int, TrainedLayer],
    written: Path,
    dtype: torch.dtype,
) -> None:
    """Compare a written checkpoint with its parent: parameters with the plan, and logits.

    Both are read from disk, a layer at a time.

    Errors:
        UserError: they differ.
    """
    parent = load_model(checkpoint, dtype=torch.float32, lazy=True)
    if trained:
        forward = Forward(parent)
        pieces = {n: Piece(each.piece.running.block, each.piece.tensors, forward) for n, each in trained.items()}
        expected = Replaced(forward, lambda layer: pieces.get(layer) or own_layer(forward, layer))
    else:
        if merged:
            parent.layers = PooledLayers(parent, alignments)
        expected = Masked(parent, Child.whole(parent.definition))
    check_written(expected, written, rounded(dtype), f"the aligned {checkpoint} computes something else than it should")
