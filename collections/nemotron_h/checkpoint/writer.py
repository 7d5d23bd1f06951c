"""Write a checkpoint in training's format, one weight at a time, from weights that come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint import folders, torch_dist
from nemotron_h.checkpoint.definition import definition_text
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import WEIGHTS
from nemotron_h.checkpoint.torch_dist import Advance
from nemotron_h.core.files import write_json

DEFINITION = "model.yaml"
TOKENIZER = "tokenizer"
#: what stands before a weight's name in a training checkpoint
_PREFIX = "module."
#: the tensors of a row, under our names
Read = Callable[[Weight], Mapping[str, Tensor]]


class _Rows:
    """The checkpoint's tensors in the order of the table of weights, which are read row by row."""

    def __init__(self, definition: ModelDefinition, dtype: torch.dtype, read: Read) -> None:
        self.empty: dict[str, Tensor] = {}
        self.rows: dict[str, Weight] = {}
        self._read = read
        self._last: tuple[Weight, Mapping[str, Tensor]] | None = None
        for row in weights(definition):
            # the layers of the CPU and those of Transformer Engine look for a norm under different names
            for name in (*row.ours, *([row.fused] if row.fused else [])):
                shape = row.ours.get(name) or next(iter(row.ours.values()))
                self.empty[_PREFIX + name] = torch.empty(shape, dtype=row.dtype(dtype), device="meta")
                self.rows[_PREFIX + name] = row

    def tensor(self, key: str) -> Tensor:
        """Return a tensor of the checkpoint; its row is read once for all of them."""
        row = self.rows[key]
        if self._last is None or self._last[0] is not row:  # a row's tensors follow each other
            self._last = row, self._read(row)
        tensor = self._last[1].get(key.removeprefix(_PREFIX))
        # the norm's other name
        return next(iter(self._last[1].values())) if tensor is None else tensor


def size(definition: ModelDefinition, dtype: torch.dtype) -> int:
    """Return the bytes of the checkpoint's tensors."""

    def of(row: Weight) -> int:
        numbers = sum(torch.Size(shape).numel() for shape in row.ours.values())
        return numbers * row.dtype(dtype).itemsize * (2 if row.fused else 1)

    return sum(of(row) for row in weights(definition))


def write_weights(
    folder: Path, definition: ModelDefinition, dtype: torch.dtype, read: Read, advance: Advance = lambda _: None
) -> None:
    """Write the weights of a checkpoint.

    Args:
        folder: of the checkpoint, which exists.
        dtype: of the weights but the exact ones.
        read: gives the tensors of one row after the other, in the dtypes that the row has in a model of `dtype`.
        advance: told the bytes of each written tensor.
    """
    rows = _Rows(definition, dtype, read)
    torch_dist.save(folder / WEIGHTS, rows.empty, rows.tensor, advance)


def finish(folder: Path, definition: ModelDefinition, record: Mapping[str, Any], comment: str) -> None:
    """Write what stands beside the weights: the record, the definition, and last the sizes and hashes of all files.

    Args:
        record: what the checkpoint tells but for its model.
        comment: first line of the definition's file.
    """
    write_json(folder / folders.RECORD, {"model": asdict(definition), **record})
    (folder / DEFINITION).write_text(definition_text(definition, comment), encoding="utf-8")
    folders.write_integrity(folder, folders.describe(folder, folders.content(folder)))
