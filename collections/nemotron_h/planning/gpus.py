"""Peak rates and memory of GPUs, from `configs/gpus.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest
from nemotron_h.core.strict_yaml import read_yaml


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it.

    Attributes:
        name: as `--gpu` takes it.
        bf16, fp8: dense matmuls with float32 accumulation, in TFLOP/s; None where there are none.
        memory_gb: 10^9 bytes.
        bandwidth_gb_s: of its memory, 10^9 bytes per second.
        per_node: GPUs that NVLink connects; tensor parallelism stays within.
        to_host_gb_s: copies of one GPU to pinned host memory, 10^9 bytes per second.
        node_memory_gb: host memory of `per_node` GPUs; None where it is not known.
        source: where the numbers come from.
    """

    name: str
    bf16: float
    fp8: float | None
    memory_gb: float
    bandwidth_gb_s: float
    per_node: int
    to_host_gb_s: float
    node_memory_gb: float | None
    source: str

    @property
    def memory(self) -> int:
        """Return the bytes that a layout may plan with."""
        return int(self.memory_gb * 1e9)

    def peak(self, precision: str) -> float:
        """Return the FLOP/s of the GEMMs of a recipe's precision.

        Errors:
            UserError: the GPU does not multiply FP8.
        """
        if not precision.startswith("fp8"):
            return self.bf16 * 1e12
        if self.fp8 is None:
            raise UserError(f"{self.name} has no FP8 products", hint="plan with precision=bf16, or another --gpu")
        return self.fp8 * 1e12


def known_gpus() -> list[str]:
    """Return the names of `configs/gpus.yaml`."""
    return [name for name in _read() if name != "sources"]


def _read() -> dict[str, Any]:
    return read_yaml(Path(str(files("nemotron_h.configs"))) / "gpus.yaml")


def gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Errors:
        UserError: there is none; names the nearest.
    """
    data = _read()
    sources = data.pop("sources")
    if name not in data:
        hint = f"{nearest(name, data)}Known: {', '.join(data)} (configs/gpus.yaml)."
        raise UserError(f"there is no GPU {name!r}", hint=hint)
    return Gpu(name=name, source=sources[name], **data[name])
