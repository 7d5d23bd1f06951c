"""Read the weights of a training checkpoint without NeMo and megatron-core, whatever parallel layout wrote it.

Megatron's `torch_dist` format is PyTorch's distributed checkpoint format. Reading it as such needs PyTorch alone, so
a command that needs only the weights starts in the time of `import torch`; NeMo's import takes several times as long.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from nemotron_h.errors import UserError
from nemotron_h.model.definition import Expect, ModelDefinition
from nemotron_h.training import checkpoints

WEIGHTS = "weights"
#: in the name of the one weight of a distillation that is no part of its student: it is kept to resume, and read by no
#: other command
PROJECTION = "hidden_projection"
#: a weight that every whole checkpoint has; what stands before `decoder` in its key is the prefix of all keys
_LAST_NORM = "decoder.final_norm.weight"
_FIRST_PART = "decoder."


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest finished one of a run folder.

    Errors:
        UserError: there is none, it is unfinished or torn, or a file is missing or has another size than was written.
    """
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    if not (path / WEIGHTS).is_dir():
        newest = checkpoints.newest(path)
        if newest is None:
            raise UserError(
                f"{path} is neither a checkpoint nor a run with a finished one",
                hint="name a run folder (runs/NAME) or one of its checkpoints (runs/NAME/checkpoints/step-000100)",
            )
        path = newest
    try:
        recorded = json.loads((path / checkpoints.INTEGRITY).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a finished checkpoint: {checkpoints.INTEGRITY}: {error}") from error
    for name, (size, _) in recorded.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual:,} bytes, {size:,} were written"
            raise UserError(f"checkpoint {path} is damaged: {name} {state}", hint="use another checkpoint of the run")
    return path


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The run record beside the weights.

    Errors:
        UserError: it is missing or no JSON.
    """
    try:
        return json.loads((checkpoint / checkpoints.RECORD).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {checkpoints.RECORD}: {error}") from error


def read_definition(record: Mapping[str, Any], origin: str) -> ModelDefinition:
    """The model that a run record describes.

    Errors:
        UserError: a value is missing, unknown or impossible.
    """
    try:
        values = dict(record["model"])
        definition = ModelDefinition(**{**values, "expect": Expect(**values["expect"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin}: its record of the model is not readable: {error}") from error
    definition.validate_structure(origin)
    return definition


class _Inert:
    """Stands for objects in the index that nothing here needs, such as megatron-core's plan of who wrote what."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _IndexUnpickler(pickle.Unpickler):
    """Builds PyTorch's description of the tensors and nothing else: imports no megatron-core, runs no foreign code."""

    _modules = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        "torch.distributed.checkpoint.filesystem",
    )

    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":  # PyTorch's, with a field more
            return Metadata
        if "." not in name:
            if module in self._modules and isinstance(found := super().find_class(module, name), type):
                return found
            if (module, name) == ("torch.serialization", "_get_layout"):
                return super().find_class(module, name)
            if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | type):
                return found
        return _Inert


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, with the index read by `_IndexUnpickler`."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class WeightFile:
    """The weights of one checkpoint, by their names in the model (without the prefix of the training wrapper).

    Args:
        checkpoint: a folder as `find_checkpoint` returns it. One of an adapter is read by `adapted.open_weights`.
        last: end of the name of a weight that the checkpoint has.
    Errors:
        UserError: the index is missing or damaged.
    """

    def __init__(self, checkpoint: Path, last: str = _LAST_NORM) -> None:
        self.checkpoint = checkpoint
        try:
            metadata = _Reader(str(checkpoint / WEIGHTS)).read_metadata()
            key = next(k for k in metadata.state_dict_metadata if k.endswith(last) and not k.startswith("optimizer"))
            prefix = key[: key.index(_FIRST_PART)]
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, StopIteration, ValueError) as error:
            raise UserError(f"checkpoint {checkpoint} is damaged: {WEIGHTS}/.metadata: {error!r}") from error
        self.prefix, self._places = prefix, metadata.storage_data
        tensors = {
            key.removeprefix(prefix): entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata) and PROJECTION not in key
        }
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Read whole tensors into `targets`, which may be of another dtype or device and slices of larger tensors.

        Errors:
            UserError: a tensor is missing or of another shape (the folder holds another model), or is not readable.
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
            dcp.load(state, storage_reader=_Reader(str(self.checkpoint / WEIGHTS)), no_dist=True)
        except (dcp.api.CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            raise UserError(
                f"checkpoint {self.checkpoint} is damaged: its weights are not readable: {reason}"
            ) from error

    def _check_sums(self, keys: set[str]) -> None:
        """Compare every tensor's bytes with the checksum stored beside them, which PyTorch's reader does not.

        Hashing whole files would read the optimizer's state too, seven times the weights.
        """
        with ThreadPoolExecutor() as pool:
            for name, problem in pool.map(self._problem, [index for index in self._places if index.fqn in keys]):
                if problem:
                    raise UserError(
                        f"checkpoint {self.checkpoint} is damaged: {name} {problem}",
                        hint="use another checkpoint of the run",
                    )

    def _problem(self, index: MetadataIndex) -> tuple[str, str]:
        place = self._places[index]
        where = f"{WEIGHTS}/{place.relative_path} ({index.fqn})"
        try:
            with (self.checkpoint / WEIGHTS / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = file.read(place.length)
            # one archive per tensor, as torch.save writes it
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                wrong = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            return where, str(error)
        return where, "does not match its checksum" if wrong else ""
