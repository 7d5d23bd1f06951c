"""Keep what an interrupted measurement has come to, so that the next attempt goes on from there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.compression.measure import Sums

#: ours: seconds between two writes; a 56B writes 0.2 GB
WRITE_EVERY_S = 60.0


class Unfinished:
    """A file of intermediate values; what was measured on other settings is not taken up.

    Args:
        path: of the file; None keeps nothing.
        key: what the values depend on.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.layers: Tensor | None = None
        self.sums: dict[str, Sums] = {}
        self._written = time.monotonic()
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        except (SafetensorError, OSError):
            return  # half a file of an interrupted write
        self.layers = tensors.pop("layers")
        self.sums = {name: Sums(values, int(about["samples"])) for name, values in tensors.items()}

    def keep_layers(self, values: Tensor) -> None:
        """Keep the values of the windows so far."""
        self.layers = values
        self._write()

    def keep_widths(self, sums: dict[str, Sums]) -> None:
        """Keep the sums over the windows so far."""
        self.sums = sums
        self._write()

    def _write(self) -> None:
        if self.path is None or time.monotonic() - self._written < WRITE_EVERY_S:
            return
        samples = next(iter(self.sums.values())).samples if self.sums else 0
        tensors = {"layers": self.layers, **{name: each.sums for name, each in self.sums.items()}}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        metadata = {"key": self.key, "samples": str(samples)}
        save_file({name: torch.clone(values) for name, values in tensors.items()}, temporary, metadata)
        os.replace(temporary, self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the measurement is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
