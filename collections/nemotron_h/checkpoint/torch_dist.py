"""Write weights in Megatron's `torch_dist` format from one process, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

#: told the bytes of each finished tensor or file
Advance = Callable[[int], None]

#: how megatron-core names the format
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _LazyPlanner(dcp.DefaultSavePlanner):
    """PyTorch's planner over tensors without memory, whose values are read when they are written."""

    def __init__(self, read: Callable[[str], Tensor], advance: Advance) -> None:
        super().__init__()
        self.read, self.advance = read, advance

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Read the values of a tensor; called for one after the other."""
        tensor = self.read(index.fqn)
        self.advance(tensor.nbytes)
        return tensor


def save(
    folder: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], advance: Advance = lambda _: None
) -> None:
    """Write a checkpoint's `weights` folder, which training and every reader of checkpoints take.

    Args:
        folder: is created.
        tensors: name -> a tensor on the meta device, of the shape and dtype to write.
        read: the values of a name; called once for each, in the order of `tensors`.
        advance: told the bytes of each written tensor.
    Errors:
        whatever `read` or the file system raises.
    """
    writer = dcp.FileSystemWriter(folder)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=_LazyPlanner(read, advance), no_dist=True)
    except dcp.api.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))  # one process writes, so there is one
        raise cause from None
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
