"""Read the files of a checkpoint's `weights` folder that are pickles without running what a pickle can name.

A checkpoint is data, often somebody else's. `.metadata` (the index of tensors) is a pickle, so are `common.pt` and
each object in a `.distcp` file; PyTorch and megatron-core load some of them in the form that calls any function.
Commands that need weights alone read the index with `read_index`; training, where megatron-core reads, does so inside
of `safe_reads`. Imports PyTorch alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from nemotron_h.checkpoint.folders import COMMON, FORMAT, INDEX, strangers
from nemotron_h.core.errors import UserError

_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
#: all that an index is made of, beside numbers, text and containers; none of it does more than hold its fields
_PARTS: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
                "TensorStorageMetadata _MEM_FORMAT_ENCODING",
            ),
            (planner, "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType"),
            (filesystem, "_StorageInfo _StoragePrefix"),
        )
        for name in names.split()
    },
    # PyTorch's, with a field more, which unpickling sets as it sets the others
    (_MEGATRON, "MCoreMetadata"): Metadata,
    (_MEGATRON, "MCoreSavePlan"): planner.SavePlan,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PurePosixPath,  # of the folder that was written to
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
#: the switches of `torch.load`
_SAFE, _UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that builds PyTorch's description of the tensors and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        part = _PARTS.get((module, name))
        if part is None and module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if part is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index of tensors")
        return part


def parse_index(content: bytes, file: Path) -> Metadata:
    """Return the index that a `.metadata` file holds.

    Args:
        content: of the file.
        file: CHECKPOINT/weights/.metadata, to name in errors.
    Errors:
        UserError: it is damaged, names anything but the parts of an index, or has a tensor outside of its folder.
    """
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
        _check(index)
    except Exception as error:  # a pickle of another's making raises what it likes
        raise _damage(file, repr(error)[:300]) from error
    if index.storage_meta is None:
        index.storage_meta = metadata.StorageMeta()
    return index


def _check(index: Any) -> None:
    """Refuse what the readers of PyTorch and megatron-core trust to be of the right type, or beside the index."""
    if not isinstance(index, Metadata):
        raise TypeError(f"{type(index).__name__} in place of an index")
    for key, entry in index.state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata) and isinstance(entry.size, torch.Size)
        # an object with the size of a tensor would be loaded in place of the tensor
        if not isinstance(key, str) or not (tensor or (isinstance(entry, BytesStorageMetadata) and not vars(entry))):
            raise TypeError(f"{key!r} is no tensor")
        if tensor and not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{key} has the dtype {entry.properties.dtype!r}")
    for key, place in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise TypeError(f"{key!r} has no place")
        name = place.relative_path
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".distcp"):
            raise ValueError(f"{key.fqn} lies in {name!r}, outside of the folder")
        if not all(isinstance(number, int) and number >= 0 for number in (place.offset, place.length)):
            raise ValueError(f"{key.fqn} lies at {place.offset!r}, {place.length!r} bytes")


def _damage(file: Path, problem: str) -> UserError:
    weights = file.parent
    return UserError(
        f"checkpoint {weights.parent} is damaged: {weights.name}/{file.name}: {problem}", hint="use another checkpoint"
    )


def read_index(weights: Path) -> Metadata:
    """Return the index of a checkpoint's `weights` folder.

    Errors:
        UserError: see `parse_index`; or the file cannot be read.
    """
    file = weights / INDEX
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _damage(file, error.strerror) from error
    return parse_index(content, file)


class IndexedReader(FileSystemReader):
    """PyTorch's reader of tensors, by an index that was parsed before: what was checked is what is read."""

    def __init__(self, weights: Path, index: Metadata) -> None:
        super().__init__(str(weights))
        self.index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index."""
        return self.index


def check_weights(weights: Path) -> Metadata:
    """Refuse a `weights` folder with anything that training does not write, or that names code; return its index.

    Errors:
        UserError: a damaged index; an unknown file, such as NVIDIA ModelOpt's state, which is a pickle; another format
            than `torch_dist`, whose files may be pickles; a `common.pt` of more than numbers, text and tensors.
    """
    index = read_index(weights)
    if names := strangers(weights.parent):
        raise UserError(f"checkpoint {weights.parent}: {names[0]} is no file that training writes", hint="remove it")
    try:
        written = json.loads((weights / FORMAT).read_text())
        if (written["sharded_backend"], written["common_backend"]) != ("torch_dist", "torch"):
            raise ValueError(f"its format is {written['sharded_backend']}, {written['common_backend']}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damage(weights / FORMAT, str(error)) from error
    try:
        torch.load(weights / COMMON, map_location="cpu", weights_only=True)
    except Exception as error:  # see `parse_index`
        reason = str(error).strip().splitlines()
        named = next((line.strip() for line in reason if "GLOBAL" in line), reason[0] if reason else repr(error))
        raise _damage(weights / COMMON, named) from error
    return index


@contextmanager
def safe_reads(weights: Path) -> Iterator[Metadata]:
    """Check a `weights` folder, keep the readers of PyTorch, megatron-core and NeMo to data while they load it, and
    yield its index.

    megatron-core takes `torch.load`'s default, which the environment can make unsafe, and PyTorch unpickles the index
    and the objects beside tensors as programs. Inside, each index is parsed by `parse_index` out of the same bytes, and
    each `torch.load` has weights_only=True, whatever it asks for.

    Errors:
        UserError: see `check_weights`.
    """
    index = check_weights(weights)
    original = FileSystemReader.read_metadata
    switches = {name: os.environ.pop(name, None) for name in (_SAFE, _UNSAFE)}
    FileSystemReader.read_metadata = _read_metadata
    os.environ[_SAFE] = "1"
    try:
        yield index
    finally:
        FileSystemReader.read_metadata = original
        del os.environ[_SAFE]
        os.environ.update({name: value for name, value in switches.items() if value is not None})


def _read_metadata(self: FileSystemReader, *_: Any, rank: int | None = None, **__: Any) -> Metadata:
    """Stand in for PyTorch's method."""
    path = self._get_metadata_path(rank)
    with self.fs.create_stream(path, "rb") as file:
        index = parse_index(file.read(), Path(path))
    index.storage_meta.load_id = self.load_id
    return index
