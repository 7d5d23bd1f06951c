"""Cut a child out of its parent's weights: in memory, or from checkpoint to checkpoint, one weight at a time.

A child's checkpoint appears only if it holds the planned number of parameters and computes what the parent computes
with the dropped layers and channels masked (`forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Cut, stays
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.checkpoint.writer import Advance, finish, size, write_weights
from nemotron_h.compression.child import Child, child_definition
from nemotron_h.compression.forward import Forward
from nemotron_h.core.errors import UserError
from nemotron_h.export.folder import new_folder
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.trained_tokenizer import inherit_data

#: ours: largest difference of logits between masked parent and child in float32, of the largest logit; 118 layers round
#: to 1e-5, and a wrong slice is off by the logits themselves
TOLERANCE = 1e-3
#: ours: logits may differ by so many roundings of a checkpoint's dtype, where weights are rounded anew
ROUNDINGS = 4
#: ours: tokens of the comparison, more than a chunk of the scan
CHECK_TOKENS = 80


def cuts(parent: ModelDefinition, child: Child) -> list[tuple[Cut, ...]]:
    """Return what stays of each weight of each layer that stays, in the order of `names.weights`."""
    return [parent.blocks[layer].cuts(child.kept[layer], child.hidden) for layer in child.layers]


def cut(tensor: Tensor, rows_and_columns: Cut) -> Tensor:
    """Return the part of a weight that stays; the weight itself where that is all."""
    for axis, indices in enumerate(rows_and_columns):
        if indices is None:
            continue
        index = torch.from_numpy(np.ascontiguousarray(indices)).to(tensor.device)
        if index.ndim == 1:
            tensor = tensor.index_select(axis, index)
        else:  # a row for each place of the first axis, of which the others are gone by now
            tensor = tensor.take_along_dim(index.unsqueeze(3 - axis), axis)
    return tensor


def slice_model(model: GenerationModel, child: Child, name: str = "child") -> GenerationModel:
    """Return the child in memory; what is not cut is the parent's own memory.

    Args:
        model: the parent.
        name: of the child's definition.
    """
    definition = child_definition(model.definition, child, name)
    hidden = stays(child.hidden, model.definition.hidden_size)
    layers = []
    for layer, of_layer in zip(child.layers, cuts(model.definition, child), strict=True):
        w = model.layers[layer]
        parts = (cut(getattr(w, field.name), part) for field, part in zip(fields(w), of_layer, strict=True))
        layers.append(type(w)(*parts))
    return GenerationModel(
        definition,
        cut(model.embedding, (None, hidden)),
        layers,
        cut(model.final_norm, (hidden, None)),
        cut(model.output, (None, hidden)),
    )


class Logits(Protocol):
    """Something that computes what a model should."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, length, vocabulary] of tokens, int64 [rows, length]."""


class Masked:
    """The parent, computing what its child should: dropped layers add nothing, dropped channels are zero.

    Args:
        model: the parent.
    """

    def __init__(self, model: GenerationModel, child: Child) -> None:
        d, self.child = model.definition, child
        self._like = {"dtype": model.dtype, "device": model.device}
        hidden = None
        if len(child.hidden) < d.hidden_size:
            hidden = torch.zeros(d.hidden_size, **self._like)
            hidden[torch.from_numpy(child.hidden)] = 1
        self.forward = Forward(model, hidden)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, length, vocabulary] of tokens, int64 [rows, length]."""
        x, blocks = self.forward.embed(tokens), self.forward.definition.blocks
        for layer in self.child.layers:
            masks = blocks[layer].masks(self.child.kept[layer])
            on_device = {name: torch.from_numpy(mask).to(**self._like) for name, mask in masks.items()}
            x = x + self.forward.layer(layer, self.forward.weights(layer), x, masks=on_device)
        return self.forward.logits(x)


def write_child(
    checkpoint: Path,
    child: Child,
    out: Path,
    name: str,
    settings: Mapping[str, Any] | None = None,
    advance: Advance = lambda _: None,
) -> ModelDefinition:
    """Cut a child out of a checkpoint into a checkpoint of its own, one weight in memory at a time.

    Args:
        checkpoint: the parent's, of any parallel layout, or a run: its newest.
        out: the child's folder; must not exist. It has the format of an imported model: weights, run.json, model.yaml.
        name: of the child's definition.
        settings: what run.json tells under `pruned`, besides the parent and the layers that stay.
        advance: told the bytes of each written tensor; `child_size` is all of them.
    Returns:
        the child's definition.
    Errors:
        UserError: no or a damaged checkpoint; `out` exists or the disk is full; the child is not what was planned or
            computes something else than its masked parent, which leaves nothing behind.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    record, source = read_record(checkpoint), ModelSource(checkpoint)
    parent, dtype = source.definition, source.dtype
    definition = child_definition(parent, child, name)
    with new_folder(out, size(definition, dtype)) as folder:
        write_weights(folder, definition, dtype, _reader(source, child, definition), advance)
        written = {
            "data": inherit_data(checkpoint, record, folder),
            "pruned": {
                "from": str(checkpoint.absolute()),
                "model": parent.name,
                "layers": list(child.layers),
                **(settings or {}),
            },
        }
        finish(
            folder, definition, written, f"Pruned from {parent.name}; counts and parameters are checked when loaded."
        )
        check_child(checkpoint, child, folder)
    return definition


def child_size(checkpoint: Path, child: Child) -> int:
    """Return the bytes of the tensors that `write_child` writes."""
    source = ModelSource(find_checkpoint(Path(checkpoint)))
    return size(child_definition(source.definition, child, "child"), source.dtype)


def _reader(source: ModelSource, child: Child, definition: ModelDefinition) -> Callable[[Weight], Mapping[str, Tensor]]:
    """Return what gives the tensors of each of the child's weights, cut from the parent's."""
    hidden = stays(child.hidden, source.definition.hidden_size)
    of_layers = [part for layer in cuts(source.definition, child) for part in layer]
    output = [] if source.definition.tied_embeddings else [(None, hidden)]
    every_cut = [(None, hidden), *of_layers, (hidden, None), *output]
    of_parent = zip(_rows_of(source.definition, child), every_cut, strict=True)
    origins = {next(iter(row.ours)): origin for row, origin in zip(weights(definition), of_parent, strict=True)}

    def read(row: Weight) -> Mapping[str, Tensor]:
        origin, part = origins[next(iter(row.ours))]
        parts = cut(source.read_row(origin), part).split([shape[0] for shape in row.ours.values()])
        return {key: part.contiguous() for key, part in zip(row.ours, parts, strict=True)}

    return read


def _rows_of(parent: ModelDefinition, child: Child) -> list[Weight]:
    """Return the parent's weights that the child's are cut from, in the child's order."""
    prefixes = tuple(f"decoder.layers.{layer}." for layer in child.layers)
    names = ((row, next(iter(row.ours))) for row in weights(parent))
    return [row for row, name in names if name.startswith(prefixes) or not name.startswith("decoder.layers.")]


def check_child(checkpoint: Path, child: Child, written: Path) -> None:
    """Compare a written child with its parent: parameters with the plan, and logits with the masked parent's.

    Both are read from disk, a layer at a time.

    Errors:
        UserError: they differ.
    """
    masked = Masked(load_model(checkpoint, dtype=torch.float32, lazy=True), child)
    check_written(
        masked, written, TOLERANCE, f"the child of {checkpoint} computes something else than its masked parent"
    )


def check_written(expected: Logits, written: Path, allowed: float, wrong: str) -> None:
    """Compare a written model, read a layer at a time, with its plan: its parameters, and the logits of random tokens.

    Args:
        expected: computes what it should, in float32.
        allowed: difference of logits, of the largest.
        wrong: begins the error of logits that differ.
    Errors:
        UserError: they differ.
    """
    model = load_model(written, dtype=torch.float32, lazy=True)
    check_parameters(model.definition, written)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.definition.vocab_size, (1, CHECK_TOKENS), generator=rng)
    error = logits_error(expected, model, tokens)
    if not error <= allowed:  # not a number is an error too
        raise UserError(
            f"{wrong}: logits differ by {error:.1e} of the largest, {allowed:.0e} is allowed",
            hint="nothing was written; the checkpoint or this code is broken",
        )


def rounded(dtype: torch.dtype) -> float:
    """Return what logits may differ by where weights are rounded anew to the dtype of a checkpoint."""
    return max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def check_parameters(definition: ModelDefinition, written: Path) -> None:
    """Count the parameters of a checkpoint.

    Errors:
        UserError: it has another number than its definition plans.
    """
    shapes = WeightFile(written).shapes
    actual = sum(torch.Size(shapes[name]).numel() for row in weights(definition) for name in row.ours)
    if actual != definition.expect.parameters:
        raise UserError(
            f"{written} has {actual:,} parameters, {definition.expect.parameters:,} are planned",
            hint="nothing was written; this is a mistake of the code",
        )


@torch.inference_mode()
def logits_error(masked: Logits, sliced: GenerationModel, tokens: Tensor) -> float:
    """Return the largest difference of the logits, of the largest logit."""
    expected = masked.logits(tokens).double()
    states = sliced.new_states(*tokens.shape)
    actual = sliced.logits(sliced.extend(tokens, states)).double()
    return float((actual - expected).abs().max() / expected.abs().max())
