"""The library of a compression: every variant's trained weights, each stored once under the hash of what made it.

<folder>/variants/<hash>.safetensors    as `compression/stored.py` writes them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron_h.compression import stored

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
        stored.save(self.path(entry.hash), asdict(entry), tensors)

    def entry(self, name: str) -> Entry | None:
        """Return the record of a variant by its hash; None where it is not there.

        Errors:
            UserError: its file is damaged.
        """
        path = self.path(name)
        return Entry(**stored.read_record(path)) if path.is_file() else None

    def tensors(self, name: str) -> list[Tensor]:
        """Return the weights of a variant by its hash.

        Errors:
            UserError: its file is missing or damaged.
        """
        return stored.read_tensors(self.path(name))
