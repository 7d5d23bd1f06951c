"""Read a Hugging Face folder of type `nemotron_h` into a checkpoint, one tensor at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_h.errors import UserError
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export.checkpoint_writer import TOKENIZER, Advance, finish, size, write_weights
from nemotron_h.export.config import definition_name, from_config
from nemotron_h.export.folder import new_folder
from nemotron_h.export.hf_writer import INDEX
from nemotron_h.export.names import Weight, weights
from nemotron_h.model.definition import ModelDefinition

SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_NAMED = 5  # tensors that an error lists


class TensorFolder:
    """The tensors of a Hugging Face folder, over all of its files.

    Args:
        folder: holds `model.safetensors`, or files and their index.
    Errors:
        UserError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        names = self._file_names()
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:_NAMED])}",
                hint="download or copy the folder again",
            )
        for name in names:
            try:
                file = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / name} is damaged: {error}", hint="download or copy it again") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
        self.dtypes = {name: file.get_slice(name).get_dtype() for name, file in self._files.items()}

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}",
                    hint="only safetensors are read; other formats have to be saved again as such by transformers",
                )
            return [SINGLE]
        return sorted(set(read_json(index)["weight_map"].values()))

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._files[name].get_tensor(name)

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was looked at and can be imported.

    Attributes:
        folder: where it is.
        definition: of its model.
        dtype: of its weights.
        max_positions: what its configuration tells, for a later export.
        size: bytes of the checkpoint's tensors.
    """

    folder: Path
    definition: ModelDefinition
    dtype: torch.dtype
    max_positions: int | None
    size: int


def examine(folder: Path, name: str | None = None) -> Source:
    """Check a folder before any work.

    Args:
        folder: as `nemotron-h export hf` or transformers writes it.
        name: of the model definition; None makes one of the folder's name.
    Errors:
        UserError: another architecture, missing files or tensors, tensors too many, or of a wrong shape or dtype.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    path = folder / "config.json"
    config = read_json(path)
    definition = from_config(config, name or definition_name(folder.absolute().name), str(path))
    with TensorFolder(folder) as tensors:
        rows = list(weights(definition))
        expected = {their: shape for row in rows for their, shape in row.theirs.items()}
        _compare(folder, tensors, expected)
        dtype = _dtype(folder, tensors, rows)
    return Source(folder, definition, dtype, config.get("max_position_embeddings"), size(definition, dtype))


def _compare(folder: Path, tensors: TensorFolder, expected: dict[str, tuple[int, ...]]) -> None:
    def listed(names: list[str]) -> str:
        return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

    if missing := [name for name in expected if name not in tensors.shapes]:
        raise UserError(f"{folder}: {len(missing)} tensors are missing: {listed(missing)}")
    if extra := [name for name in tensors.shapes if name not in expected]:
        raise UserError(
            f"{folder}: {len(extra)} tensors have no place in the model of its config.json: {listed(extra)}",
            hint="config.json and the weights belong to different models",
        )
    wrong = [
        f"{name} is {list(tensors.shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if tensors.shapes[name] != shape
    ]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors have a wrong shape: {listed(wrong)}")


def _dtype(folder: Path, tensors: TensorFolder, rows: list[Weight]) -> torch.dtype:
    """The one dtype of the weights; the exact ones may have another."""
    unknown = sorted(set(tensors.dtypes.values()) - set(_DTYPES))
    found = sorted({tensors.dtypes[name] for row in rows if not row.exact for name in row.theirs})
    if unknown or len(found) != 1:
        kinds = ", ".join(unknown or found)
        raise UserError(f"{folder}: weights of dtype {kinds}; all F32 or all BF16 are read")
    return _DTYPES[found[0]]


def write(source: Source, out: Path, advance: Advance = lambda _: None) -> None:
    """Write the checkpoint: weights, record, model definition, and the tokenizer where the folder has one.

    Args:
        source: of `examine`.
        out: the checkpoint's folder; must not exist.
        advance: told the bytes of each written tensor.
    Errors:
        UserError: `out` exists, or the disk is full.
    """
    with new_folder(out, source.size) as folder, TensorFolder(source.folder) as tensors:

        def read(row: Weight) -> dict[str, Tensor]:
            joined = torch.cat([tensors.read(their) for their in row.theirs])
            return row.to_ours(joined.to(row.dtype(source.dtype)))

        write_weights(folder, source.definition, source.dtype, read, advance)
        has_tokenizer = tokenizers.read(source.folder, folder / TOKENIZER)
        record = {
            # relative to the checkpoint, so that the folder can be moved
            "data": {"tokenizer": TOKENIZER if has_tokenizer else None, "seq_length": source.max_positions},
            "imported": {"from": str(source.folder.absolute())},
        }
        finish(folder, source.definition, record, "Imported; counts and parameters are checked when it is loaded.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file.

    Errors:
        UserError: it is missing or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return found
