"""Read the weights of a training checkpoint without NeMo and megatron-core, whatever parallel layout wrote it.

Megatron's `torch_dist` format is PyTorch's distributed checkpoint format. Reading it as such needs PyTorch alone, so
a command that needs only the weights starts in the time of `import torch`; NeMo's import takes several times as long.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.finite import check_weights
from nemotron_h.checkpoint.folders import INDEX, WEIGHTS
from nemotron_h.checkpoint.hub_cache import check_fetched, path_of
from nemotron_h.checkpoint.index import IndexedReader, read_index
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object

#: in the name of the one weight of a distillation that is no part of its student: it is kept to resume, and read by no
#: other command
PROJECTION = "hidden_projection"
#: a weight that every whole checkpoint has; what stands before `decoder` in its key is the prefix of all keys
_LAST_NORM = "decoder.final_norm.weight"
_FIRST_PART = "decoder."


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that `path` means: itself, the newest finished one of a run folder, or one of the Hub.

    Errors:
        UserError: there is none, it is unfinished or torn, or a file is missing or has another size than was written;
            one of the Hub is not fetched yet.
    """
    check_fetched(path)
    path = path_of(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    if not (path / WEIGHTS).is_dir():
        newest = folders.newest(path)
        if newest is None:
            raise UserError(
                f"{path} is neither a checkpoint nor a run with a finished one",
                hint="name a run folder (runs/NAME) or one of its checkpoints (runs/NAME/checkpoints/step-000100)",
            )
        path = newest
    try:
        recorded = folders.read_integrity(path)
    except UserError as error:
        raise UserError(f"{path} is not a finished checkpoint: {error.message}") from error
    for name, (size, _) in recorded.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual:,} bytes, {size:,} were written"
            raise UserError(f"checkpoint {path} is damaged: {name} {state}", hint="use another checkpoint of the run")
    return path


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return the run record beside the weights.

    Errors:
        UserError: it is missing, no JSON, or a section is of another shape.
    """
    try:
        record = read_json_object(checkpoint / folders.RECORD)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {error.message}") from error
    for key in ("model", "data", "recipe", "adapter"):
        if not isinstance(record.get(key, {}), dict | None):
            raise UserError(f"checkpoint {checkpoint} is damaged: {folders.RECORD}: {key} is no mapping")
    return record


class WeightFile:
    """The weights of one checkpoint, by their names in the model (without the prefix of the training wrapper).

    Args:
        checkpoint: a folder as `find_checkpoint` returns it. That of an adapter is read by `adapters.open_weights`.
        last: end of the name of a weight that the checkpoint has.
    Errors:
        UserError: the index is missing or damaged.
    """

    def __init__(self, checkpoint: Path, last: str = _LAST_NORM) -> None:
        self.checkpoint = checkpoint
        self.index = index = read_index(checkpoint / WEIGHTS)
        keys = (k for k in index.state_dict_metadata if k.endswith(last) and not k.startswith("optimizer"))
        key = next((k for k in keys if _FIRST_PART in k), None)
        if key is None:
            raise UserError(f"checkpoint {checkpoint} is damaged: {WEIGHTS}/{INDEX} has no {last}")
        self.prefix = prefix = key[: key.index(_FIRST_PART)]
        tensors = {
            key.removeprefix(prefix): entry
            for key, entry in index.state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata) and PROJECTION not in key
        }
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Read whole tensors into `targets`, which may be of another dtype or device and slices of larger tensors.

        Errors:
            UserError: a tensor is missing or of another shape (the folder holds another model), is not readable, or
                holds NaN or infinite numbers.
        """
        for name, target in targets.items():
            if self.shapes.get(name) != tuple(target.shape):
                raise UserError(
                    f"checkpoint {self.checkpoint}: {name} is {self.shapes.get(name, 'missing')}, its run.json asks "
                    f"for {tuple(target.shape)}",
                    hint="weights and run.json of the folder belong to different runs; restore the folder",
                )
        state = {self.prefix + name: target for name, target in targets.items()}
        self._check_sums(set(state))
        try:
            dcp.load(state, storage_reader=IndexedReader(self.checkpoint / WEIGHTS, self.index), no_dist=True)
        except (dcp.api.CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            raise UserError(
                f"checkpoint {self.checkpoint} is damaged: its weights are not readable: {reason}"
            ) from error
        check_weights(targets, f"checkpoint {self.checkpoint}")

    def _check_sums(self, keys: set[str]) -> None:
        """Compare every tensor's bytes with the checksum stored beside them, which PyTorch's reader does not.

        Hashing whole files reads the optimizer's states too, seven times the weights: that is for files whose tensors
        have no checksums, which training with PyTorch 2.11 has written.
        """
        wanted = [index for index in self.index.storage_data if index.fqn in keys]
        without = set()
        with ThreadPoolExecutor() as pool:
            for index, problem in zip(wanted, pool.map(self._problem, wanted), strict=True):
                name = f"{WEIGHTS}/{self.index.storage_data[index].relative_path}"
                if problem is None:
                    without.add(name)
                elif problem:
                    raise self._damage(f"{name} ({index.fqn}) {problem}")
        recorded = folders.read_integrity(self.checkpoint) if without else {}
        for name, described in folders.describe(self.checkpoint, without).items():
            if tuple(described) != recorded.get(name):
                raise self._damage(f"{name} does not match its checksum")

    def _damage(self, problem: str) -> UserError:
        return UserError(
            f"checkpoint {self.checkpoint} is damaged: {problem}", hint="use another checkpoint of the run"
        )

    def _problem(self, index: MetadataIndex) -> str | None:
        """Return what is wrong with a tensor's bytes, if anything; None where no checksum is beside them."""
        place = self.index.storage_data[index]
        try:
            with (self.checkpoint / WEIGHTS / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            # one archive per tensor, as torch.save writes it
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if not any(part.CRC for part in archive.infolist()):
                    return None
                return "does not match its checksum" if archive.testzip() else ""
        except (OSError, zipfile.BadZipFile) as error:
            return str(error)
