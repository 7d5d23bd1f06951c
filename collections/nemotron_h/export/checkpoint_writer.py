"""Write a checkpoint in training's format, one weight at a time, from weights that come from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemotron_h.data.manifest import write_json
from nemotron_h.export.names import Weight, weights
from nemotron_h.inference.checkpoint import WEIGHTS
from nemotron_h.model.definition import ModelDefinition
from nemotron_h.training import checkpoints

DEFINITION = "model.yaml"
TOKENIZER = "tokenizer"
#: what stands before a weight's name in a training checkpoint
_PREFIX = "module."
#: how megatron-core names the format
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Advance = Callable[[int], None]
#: the tensors of a row, under our names
Read = Callable[[Weight], Mapping[str, Tensor]]


class _LazyPlanner(dcp.DefaultSavePlanner):
    """PyTorch's planner over tensors without memory, whose values are read when they are written."""

    def __init__(self, read: Read, dtype: torch.dtype, advance: Advance) -> None:
        super().__init__()
        self.read, self.dtype, self.advance = read, dtype, advance
        self.rows: dict[str, Weight] = {}
        self._last: tuple[Weight, Mapping[str, Tensor]] | None = None

    def empty(self, definition: ModelDefinition) -> dict[str, Tensor]:
        """The checkpoint's tensors, without memory."""
        state = {}
        for row in weights(definition):
            # the layers of the CPU and those of Transformer Engine look for a norm under different names
            for name in (*row.ours, *([row.fused] if row.fused else [])):
                shape = row.ours.get(name) or next(iter(row.ours.values()))
                state[_PREFIX + name] = torch.empty(shape, dtype=row.dtype(self.dtype), device="meta")
                self.rows[_PREFIX + name] = row
        return state

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Called for one tensor after the other."""
        row = self.rows[index.fqn]
        name = index.fqn.removeprefix(_PREFIX)
        if self._last is None or self._last[0] is not row:  # a row's tensors follow each other
            self._last = row, self.read(row)
        tensor = self._last[1].get(name)
        if tensor is None:  # the norm's other name
            tensor = next(iter(self._last[1].values()))
        self.advance(tensor.nbytes)
        return tensor


def size(definition: ModelDefinition, dtype: torch.dtype) -> int:
    """Bytes of the checkpoint's tensors."""

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
    planner = _LazyPlanner(read, dtype, advance)
    target = folder / WEIGHTS
    dcp.save(planner.empty(definition), storage_writer=dcp.FileSystemWriter(target), planner=planner, no_dist=True)
    torch.save({}, target / "common.pt")
    (target / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


def finish(folder: Path, definition: ModelDefinition, record: Mapping[str, Any], comment: str) -> None:
    """Write what stands beside the weights: the record, the definition, and last the sizes and hashes of all files.

    Args:
        record: what the checkpoint tells but for its model.
        comment: first line of the definition's file.
    """
    write_json(folder / checkpoints.RECORD, {"model": asdict(definition), **record})
    (folder / DEFINITION).write_text(definition_text(definition, comment), encoding="utf-8")
    checkpoints.write_integrity(folder, checkpoints.describe(folder, checkpoints.content(folder)))


def definition_text(definition: ModelDefinition, comment: str) -> str:
    """A file for `configs/model/`, without what is left out of it."""
    values = {key: value for key, value in asdict(definition).items() if value not in (0, {})}
    return f"# {comment}\n" + yaml.safe_dump(values, sort_keys=False)
