"""Write a checkpoint of an adapter and its base as one ordinary checkpoint, one tensor at a time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotron_h.checkpoint import folders, torch_dist
from nemotron_h.checkpoint.adapters import AdaptedWeights, adapter_record
from nemotron_h.checkpoint.reader import WEIGHTS, read_record
from nemotron_h.checkpoint.torch_dist import Advance
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.export.folder import new_folder

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Plan:
    """Plan of a merge.

    Attributes:
        checkpoint: of the adapter.
        weights: merged when they are read.
        size: bytes of all tensors.
    """

    checkpoint: Path
    weights: AdaptedWeights
    size: int


def plan(checkpoint: Path, base: Path | None = None) -> Plan:
    """Look at an adapter's checkpoint and its base; reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        base: where its base is, if it was moved.
    Errors:
        UserError: it holds no adapter, the base is not found, or one of the two is damaged.
    """
    if adapter_record(checkpoint) is None:
        raise UserError(f"{checkpoint} holds no adapter", hint="it is a whole checkpoint: use it as it is")
    weights = AdaptedWeights(checkpoint, base)
    size = sum(torch.Size(shape).numel() * weights.dtypes[name].itemsize for name, shape in weights.shapes.items())
    return Plan(checkpoint, weights, size)


def write(plan: Plan, out: Path, advance: Advance = lambda _: None) -> None:
    """Write the checkpoint: weights in the base's dtypes, and the adapter's record without its adapter.

    Args:
        plan: what to write.
        out: the folder; must not exist.
        advance: told the bytes of each written tensor.
    Errors:
        UserError: `out` exists, the disk is full, or a checkpoint's weights are damaged.
    """
    file = plan.weights
    empty = {
        file.prefix + name: torch.empty(shape, dtype=file.dtypes[name], device="meta")
        for name, shape in file.shapes.items()
    }

    def read(key: str) -> Tensor:
        tensor = torch.empty_like(empty[key], device="cpu")
        file.read({key.removeprefix(file.prefix): tensor})
        return tensor

    with new_folder(out, plan.size) as folder:
        torch_dist.save(folder / WEIGHTS, empty, read, advance)
        record = read_record(plan.checkpoint)
        record["merged"] = {"checkpoint": str(plan.checkpoint.absolute()), **record.pop("adapter")}
        write_json(folder / folders.RECORD, record)
        if (plan.checkpoint / RECIPE).is_file():
            shutil.copyfile(plan.checkpoint / RECIPE, folder / RECIPE)
        folders.write_integrity(folder, folders.describe(folder, folders.content(folder)))
