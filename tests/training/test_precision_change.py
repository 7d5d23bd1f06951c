"""A run changes between FP8 and BF16 at its checkpoints, which hold neither FP8 values nor FP8 state."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Small, without_last
from torch.distributed.checkpoint import FileSystemReader

MODEL = ("model.config.mamba_num_heads=16",)  # 592 values of the input projection, a multiple of 16
FP8 = (*MODEL, "trainer.plugins.name=fp8_current_scaling", "trainer.plugins.bf16_edge_layers=1")
BF16 = (*MODEL, "trainer.plugins.name=bf16")
pytestmark = pytest.mark.slow


def content(checkpoint: Path) -> dict[str, str]:
    """Key -> dtype of every tensor of a checkpoint, and key -> `object` of everything else."""
    entries = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    return {key: str(e.properties.dtype) if hasattr(e, "properties") else "object" for key, e in entries.items()}


def losses(small: Small, name: str, first: int, last: int) -> list[float]:
    """Of these steps."""
    records = small.steps(name)
    return [float.fromhex(records[step]["loss"]) for step in range(first, last + 1)]


def test_fp8_to_bf16_to_fp8(small: Small) -> None:
    straight = small.train("fp8", *FP8)
    assert "E4M3 weights and activations, E5M2 gradients" in straight.stdout
    assert "fp8_current_scaling is emulated on the CPU" in straight.stdout
    fp8 = losses(small, "fp8", 1, 12)
    assert fp8[-1] < fp8[0] - 0.3, "FP8 does not train"

    without_last(small, "fp8", "changing")
    assert "resumed at step 8" in small.train("changing", *BF16).stdout
    bf16 = losses(small, "changing", 9, 12)
    assert bf16 != fp8[8:], "one is BF16"
    assert bf16 == pytest.approx(fp8[8:], rel=1e-2)

    again = small.train("changing", *FP8, "trainer.max_steps=14").stdout
    assert "resumed at step 12" in again
    assert "  precision: bf16 -> fp8_current_scaling\n" in again
    # of other samples
    assert losses(small, "changing", 13, 14) == pytest.approx([bf16[-1]] * 2, rel=1e-1)
    for name, step in (("fp8", 12), ("changing", 12), ("changing", 14)):
        kept = content(small.run_dir(name) / "checkpoints" / f"step-{step:06d}")
        assert any("linear_fc1.weight" in key for key in kept)
        assert not [key for key in kept if "extra_state" in key]
        assert not [key for key, dtype in kept.items() if "float8" in dtype or "int8" in dtype]
