"""A run changes between FP8 and BF16 at its checkpoints, which hold neither FP8 values nor FP8 state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Small

MODEL = ("model.config.mamba_num_heads=16",)  # 592 values of the input projection, a multiple of 16
FP8 = (*MODEL, "trainer.plugins.name=fp8_current_scaling", "trainer.plugins.bf16_edge_layers=1")
BF16 = (*MODEL, "trainer.plugins.name=bf16")
pytestmark = pytest.mark.slow


def content(checkpoint: Path) -> dict[str, str]:
    """Key -> dtype of every tensor of a checkpoint, and key -> `object` of everything else."""
    script = (
        "import json, sys; from torch.distributed.checkpoint import FileSystemReader;"
        "entries = FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata;"
        "print(json.dumps({k: str(e.properties.dtype) if hasattr(e, 'properties') else 'object'"
        " for k, e in entries.items()}))"
    )
    command = [sys.executable, "-c", script, str(checkpoint / "weights")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def losses(small: Small, name: str) -> list[float]:
    """Of steps 1 to 12."""
    records = small.steps(name)
    return [float.fromhex(records[step]["loss"]) for step in range(1, 13)]


def test_fp8_to_bf16_to_fp8(small: Small) -> None:
    first = small.train("changing", *FP8, "kill=5", check=False)
    assert "E4M3 weights and activations, E5M2 gradients" in first.stdout
    assert "fp8_current_scaling is emulated on the CPU" in first.stdout
    second = small.train("changing", *BF16, "kill=9", check=False)
    assert "resumed at step 4" in second.stdout, second.stderr[-3000:]
    third = small.train("changing", *FP8)
    assert "resumed at step 8" in third.stdout
    straight = small.train("unchanged", *FP8)
    assert "started" in straight.stdout
    changing, unchanged = losses(small, "changing"), losses(small, "unchanged")
    assert changing[:4] == unchanged[:4], "both are FP8"
    assert changing[4:8] != unchanged[4:8], "one is BF16"
    assert changing == pytest.approx(unchanged, rel=2e-2)
    assert unchanged[-1] < unchanged[0] - 0.3, "FP8 does not train"
    for step in (4, 8, 12):
        kept = content(small.run_dir("changing") / "checkpoints" / f"step-{step:06d}")
        assert any("linear_fc1.weight" in key for key in kept)
        assert not [key for key in kept if "extra_state" in key]
        assert not [key for key, dtype in kept.items() if "float8" in dtype or "int8" in dtype]
