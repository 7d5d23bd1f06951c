"""Write a layer's weights with a record of them, whole or not at all, and read both again.

A safetensors file: tensors by their place among `Block.tensors`; the record, as JSON, is in the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.core.errors import UserError, writing


def save(path: Path, record: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Write them; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with writing(temporary):
        named = {str(place): tensor.cpu().contiguous() for place, tensor in enumerate(tensors)}
        save_file(named, temporary, {"entry": json.dumps(record)})
        temporary.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record.

    Errors:
        UserError: the file is missing or damaged.
    """
    with _open(path) as file:
        return json.loads(file.metadata()["entry"])


def read_tensors(path: Path) -> list[Tensor]:
    """Return the weights.

    Errors:
        UserError: the file is missing or damaged.
    """
    with _open(path) as file:
        return [file.get_tensor(place) for place in sorted(file.keys(), key=int)]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}", hint=f"remove it, and run again: rm {path}") from error
