"""The library of a compression: every variant's trained weights, each stored once under the hash of what made it.

<folder>/variants/<hash>.safetensors    tensors by their place among `Block.tensors`; the record is in the header
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.core.errors import UserError, writing

FOLDER = "variants"


@dataclass(frozen=True)
class Entry:
    """A variant in the library.

    Attributes:
        layer: of the parent.
        variant: its name.
        hash: of what made it.
        tokens: that it was trained on.
        made, trained: |o_p - o_c|^2 / |o_p|^2 over held-out text before and after its training; 1 is a layer that is
            left out.
    """

    layer: int
    variant: str
    hash: str
    tokens: int
    made: float
    trained: float


def hash_of(inputs: Mapping[str, Any]) -> str:
    """Return the name of a variant that these inputs make."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


class Library:
    """The variants of a compression on disk.

    Args:
        folder: of the compression.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def path(self, name: str) -> Path:
        """Return the file of a variant by its hash."""
        return self.folder / f"{name}.safetensors"

    def save(self, entry: Entry, tensors: Sequence[Tensor]) -> None:
        """Write a variant; it is there whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(entry.hash)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with writing(temporary):
            named = {str(place): tensor.cpu().contiguous() for place, tensor in enumerate(tensors)}
            save_file(named, temporary, {"entry": json.dumps(asdict(entry))})
            temporary.replace(path)

    def entry(self, name: str) -> Entry | None:
        """Return the record of a variant by its hash; None where it is not there.

        Errors:
            UserError: its file is damaged.
        """
        if not self.path(name).is_file():
            return None
        with self._open(name) as file:
            return Entry(**json.loads(file.metadata()["entry"]))

    def tensors(self, name: str) -> list[Tensor]:
        """Return the weights of a variant by its hash.

        Errors:
            UserError: its file is missing or damaged.
        """
        with self._open(name) as file:
            return [file.get_tensor(place) for place in sorted(file.keys(), key=int)]

    def _open(self, name: str) -> Any:
        path = self.path(name)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}", hint=f"remove it, and run again: rm {path}") from error
