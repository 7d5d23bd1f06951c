"""A checkpoint's weights under Hugging Face's names, as many at a time as are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path

import torch
from torch import Tensor

from nemotron_h.checkpoint.adapters import open_weights
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import read_record


class ModelSource:
    """Weights of a checkpoint as an export reads them. Opening it reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it.
    Attributes:
        checkpoint: its folder.
        definition: the model.
        rows: the table of its weights.
        dtype: the checkpoint's.
        seq_length: tokens that it was trained on at once; None where the record does not tell.
    Errors:
        UserError: the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, record = checkpoint, read_record(checkpoint)
        self.definition = read_definition(record, f"checkpoint {checkpoint}")
        self._file = open_weights(checkpoint)
        self.rows = list(weights(self.definition))
        self.dtype = self._file.dtypes[next(iter(self.rows[0].ours))]
        self.seq_length: int | None = (record.get("data") or {}).get("seq_length")

    def read(self, wanted: Set[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return tensors by their names in Hugging Face's model; the exact ones are float32 in any `dtype`."""
        targets: dict[str, Tensor] = {}
        wholes: list[tuple[Weight, Tensor]] = []
        for row in self.rows:
            if wanted.isdisjoint(row.theirs):
                continue
            ours = self._names_in(row)
            lengths = [shape[0] for shape in ours.values()]
            shape = next(iter(ours.values()))
            whole = torch.empty(sum(lengths), *shape[1:], dtype=row.dtype(dtype))
            targets.update(zip(ours, whole.split(lengths), strict=True))
            wholes.append((row, whole))
        self._file.read(targets)
        return {name: tensor for row, whole in wholes for name, tensor in _theirs(row, whole, wanted)}

    def read_row(self, row: Weight) -> Tensor:
        """Return a row of the table under our names, its tensors concatenated along their first axis."""
        theirs = self.read(set(row.theirs), self.dtype)
        return torch.cat(list(row.to_ours(torch.cat([theirs[name] for name in row.theirs])).values()))

    def _names_in(self, row: Weight) -> dict[str, tuple[int, ...]]:
        """Return a row's names and shapes here: Transformer Engine's names, and the vocabulary's padding."""
        shapes = self._file.shapes
        if row.fused in shapes:
            return {row.fused: next(iter(row.ours.values()))}
        if row.padded:
            ((name, shape),) = row.ours.items()
            return {name: (max(shape[0], shapes.get(name, (0,))[0]), *shape[1:])}
        return row.ours


def _theirs(row: Weight, whole: Tensor, wanted: Set[str]) -> Iterable[tuple[str, Tensor]]:
    rows = sum(shape[0] for shape in row.theirs.values())
    for name, tensor in row.to_theirs(whole[:rows]).items():
        if name in wanted:
            # several tensors of one memory cannot be saved
            yield name, tensor if len(row.theirs) == 1 else tensor.clone()
