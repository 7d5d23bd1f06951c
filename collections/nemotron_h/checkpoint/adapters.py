"""Checkpoints of adapters: which checkpoint they change, and the weights that the two make.

A checkpoint of a LoRA or DoRA run holds the adapters alone; its `run.json` tells kind, rank, alpha and targets, and
names the checkpoint of the frozen weights with a hash. Readers get the merged weights, W + alpha/rank B A (with DoRA
each row brought to its trained length), one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.hub_cache import path_of
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256

#: between a matrix's name and its adapter's parts, and those parts
ADAPTER = ".adapter."


def adapter_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return what the checkpoint's record tells of its adapter; None for a whole checkpoint."""
    return read_record(checkpoint).get("adapter")


def check_whole(checkpoint: Path, where: str = "") -> None:
    """Refuse a checkpoint of adapters; `where` begins the error."""
    if adapter_record(checkpoint):
        raise UserError(
            f"{where}{checkpoint} is an adapter, not a whole model", hint="merge it: nemotron-h merge-adapter"
        )


def describe_base(base: Path) -> dict[str, str]:
    """Describe a base as a record names it: its path, and the hash of its list of hashes."""
    return {"checkpoint": str(base.absolute()), "integrity_sha256": file_sha256(base / folders.INTEGRITY)}


def find_base(checkpoint: Path, named: str | Path | None = None) -> Path:
    """Find the checkpoint that an adapter was trained on.

    Args:
        checkpoint: of an adapter.
        named: where to look if it is not where it was: a run or a checkpoint.
    Errors:
        UserError: it is not there any more, or is another one.
    """
    recorded = adapter_record(checkpoint)["base"]  # type: ignore[index]
    found = []
    for place in (recorded["checkpoint"], named):
        if place is None or not (path := path_of(place)).is_dir():
            continue
        try:
            found.append(find_checkpoint(path))
        except UserError:
            continue
        if describe_base(found[-1])["integrity_sha256"] == recorded["integrity_sha256"]:
            return found[-1]
    was = f"the adapter of {checkpoint} was trained on {recorded['checkpoint']}"
    hint = (
        "restore that folder; or, where it was moved, name it: --base DIR of merge-adapter and export peft, "
        "init.checkpoint=DIR of a run"
    )
    if found:
        raise UserError(f"{was}; {found[-1]} is another checkpoint", hint=hint)
    raise UserError(f"{was}, which is not there any more", hint=hint)


def open_weights(checkpoint: Path, base: Path | None = None) -> WeightFile:
    """Open the weights of a checkpoint; those of an adapter are merged into its base's.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        base: where an adapter's base is, if it was moved.
    Errors:
        UserError: a checkpoint is damaged, or the adapter's base is not found.
    """
    if adapter_record(checkpoint) is None:
        return WeightFile(checkpoint)
    return AdaptedWeights(checkpoint, base)


class AdaptedWeights(WeightFile):
    """The base's weights with an adapter's changes; names, shapes and dtypes are the base's.

    Args:
        checkpoint: of an adapter, as `find_checkpoint` returns it.
        base: where its base is, if it was moved.
    Errors:
        UserError: a checkpoint is damaged, or the base is not found.
    """

    def __init__(self, checkpoint: Path, base: Path | None = None) -> None:
        record = adapter_record(checkpoint)
        assert record is not None
        self.base = find_base(checkpoint, base)
        super().__init__(self.base)
        self.adapter = WeightFile(checkpoint, last=f"{ADAPTER}a")
        self.scale, self.dora = record["alpha"] / record["rank"], record["kind"] == "dora"
        self.adapted = {name for name in self.shapes if self.adapter_names(name)["b"] in self.adapter.shapes}
        stray = {name.partition(ADAPTER)[0] for name in self.adapter.shapes} - {_matrix(name) for name in self.adapted}
        if stray:
            raise UserError(
                f"checkpoint {checkpoint} has adapters on {', '.join(sorted(stray)[:5])}, which {self.base} lacks"
            )

    @staticmethod
    def adapter_names(name: str) -> dict[str, str]:
        """Return the names of a weight's adapter. `in_proj.weight.z` has its own rows of B and shares A."""
        matrix, _, part = name.partition(".weight")
        return {
            "a": f"{matrix}{ADAPTER}a",
            "b": f"{matrix}{ADAPTER}b{part}",
            "magnitude": f"{matrix}{ADAPTER}magnitude{part}",
        }

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Read as `WeightFile.read`, merged. Sums are in float32, or in the target's dtype where it is more precise."""
        super().read({name: target for name, target in targets.items() if name not in self.adapted})
        for name in targets:
            if name in self.adapted:
                exact = torch.promote_types(torch.promote_types(targets[name].dtype, self.dtypes[name]), torch.float32)
                weight = torch.empty(self.shapes[name], dtype=exact)
                super().read({name: weight})
                targets[name].copy_(self._merged(name, weight))

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        names = self.adapter_names(name)
        if not self.dora:
            del names["magnitude"]
        parts = {part: torch.empty(self.adapter.shapes[key], dtype=weight.dtype) for part, key in names.items()}
        self.adapter.read({key: parts[part] for part, key in names.items()})
        # of all experts in one, or of one matrix
        (torch.Tensor.baddbmm_ if weight.ndim == 3 else torch.Tensor.addmm_)(
            weight, parts["b"], parts["a"], alpha=self.scale
        )
        if self.dora:
            weight.mul_((parts["magnitude"] / weight.square().sum(dim=-1).sqrt()).unsqueeze(-1))
        return weight


def _matrix(name: str) -> str:
    return name.partition(".weight")[0]
