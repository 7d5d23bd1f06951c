"""Write a child of variants as a checkpoint of its own, one weight in memory at a time.

It appears only if it holds the planned number of parameters and computes what the variants compute in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import NO_OP, PARENT
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.checkpoint.writer import finish, size, write_weights
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.puzzle.context import Context, Picks, Refined
from nemotron_h.compression.puzzle.local import Replaced
from nemotron_h.compression.slicing import check_written, rounded
from nemotron_h.export.folder import new_folder
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import load_model
from nemotron_h.inference.trained_tokenizer import inherit_data


def write_child(
    c: Context, picks: Picks, refined: Refined, out: Path, name: str, settings: Mapping[str, Any]
) -> ModelDefinition:
    """Write the child that has these variants in its layers' places.

    Args:
        picks, refined: of each layer of the parent; see `Context.realised`.
        out: the folder; must not exist. It has the format of an imported model: weights, run.json, model.yaml.
        name: of its definition.
        settings: what run.json tells under `puzzle`, besides the parent and the variants.
    Errors:
        UserError: the disk is full, a file of the library is damaged, or what was written is not what was planned,
            which leaves nothing behind.
    """
    checkpoint, definition = c.parent.checkpoint, c.definition_of(picks, name)
    source = ModelSource(checkpoint)
    with new_folder(out, size(definition, source.dtype)) as folder:
        write_weights(folder, definition, source.dtype, _Reader(c, picks, refined, definition, source))
        written = {
            "data": inherit_data(checkpoint, read_record(checkpoint), folder),
            "puzzle": {
                "from": str(checkpoint.absolute()),
                "model": c.definition.name,
                "variants": list(picks),
                **settings,
            },
        }
        finish(folder, definition, written, f"Compressed from {c.definition.name}; counts are checked when loaded.")
        _check(c, picks, refined, folder, source.dtype)
    return definition


class _Reader:
    """The tensors of the child's weights: the parent's, or the library's."""

    def __init__(
        self, c: Context, picks: Picks, refined: Refined, definition: ModelDefinition, source: ModelSource
    ) -> None:
        self.source = source
        self.origins: dict[str, Weight] = {}
        self.variants: dict[str, tuple[str, int]] = {}
        parent = {next(iter(row.ours)): row for row in weights(source.definition)}
        stay = [layer for layer, pick in enumerate(picks) if pick != NO_OP]
        for name in (next(iter(row.ours)) for row in weights(definition)):
            number = _layer(name)
            if number is None:
                self.origins[name] = parent[name]
            elif picks[stay[number]] == PARENT:
                own = f"decoder.layers.{stay[number]}."
                self.origins[name] = parent[name.replace(f"decoder.layers.{number}.", own, 1)]
        for number, layer in enumerate(stay):
            if picks[layer] != PARENT:
                stored = c.stored(layer, picks[layer], refined)
                rows = definition.blocks[number].tensors(f"decoder.layers.{number}.", "")
                self.variants |= {next(iter(row.ours)): (stored, place) for place, row in enumerate(rows)}
        self.library = c.library

    def __call__(self, row: Weight) -> Mapping[str, Tensor]:
        """Return the tensors of a row."""
        name = next(iter(row.ours))
        if name in self.variants:
            stored, place = self.variants[name]
            whole = self.library.tensors(stored)[place].to(row.dtype(self.source.dtype))
        else:
            whole = self.source.read_row(self.origins[name])
        parts = whole.split([shape[0] for shape in row.ours.values()])
        return {key: part.contiguous() for key, part in zip(row.ours, parts, strict=True)}


def _layer(name: str) -> int | None:
    """Return the layer that a weight of ours is in; None for those outside of the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["decoder", "layers"] else None


def _check(c: Context, picks: Picks, refined: Refined, written: Path, dtype: torch.dtype) -> None:
    """Compare a written child with its variants: parameters with the plan, and logits.

    Both are read from disk, a layer at a time.

    Errors:
        UserError: they differ.
    """
    forward = Forward(load_model(c.parent.checkpoint, dtype=torch.float32, lazy=True))
    expected = Replaced(forward, lambda layer: c.part_of(layer, picks[layer], forward, refined))
    wrong = f"the child of {c.parent.checkpoint} computes something else than its variants"
    check_written(expected, written, rounded(dtype), wrong)
