"""On GPUs: a compression by its command, whose layers are trained by one process and by one for each of two GPUs.

`python tests/gpu/test_gpu_puzzle.py` does it without pytest. On one GPU one process trains them; without
any, two share a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from gpu_runs import ON_GPU, PROCESSES, main, recipe, run_checks, small_run

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

PUZZLE = """
stage: puzzle
puzzle:
  parent: {parent}
  layer_samples: 4
  neuron_samples: 16
  library: {{num_query_groups: [1], ffn_hidden_size: [48], mamba_num_heads: [4], linear: [attention], no_op: [ffn]}}
  local: {{tokens: 8192, batch: 8, lr: 2e-3}}
  score_tokens: 1024
  refine_tokens: 2048
  costs: {{batch: 2, prompt: 64, output: 16, memory_gib: 10}}
"""
#: ours: between errors of variants that other processes have trained: kernels add in any order
BOUND = 1e-2


def compress(small: small_run.Small, name: str, parent: Path, *settings: str) -> list[dict]:
    """Compress the parent by `nemotron-h puzzle`, and return its library."""
    file = recipe(
        small,
        name,
        ("/base/pretrain", "/base/distill"),
        ("\ntokens:", f"{PUZZLE.format(parent=parent)}tokens:"),
    )
    small.command(f"puzzle_{name}", "puzzle", str(file), *settings)
    return json.loads((small.run_dir(name) / "library/library.json").read_text())


def a_compression_ends_and_processes_agree(small: small_run.Small) -> None:
    """Compare the libraries of one process and of two, and have the last child be generated with."""
    PROCESSES.environment = {}
    small.train("parent", recipe=recipe(small, "parent"))
    parent = small.run_dir("parent")
    last, one = "one", compress(small, "one", parent)
    assert all(entry["trained"] <= entry["made"] for entry in one)
    if torch.cuda.device_count() == 1:
        print("two processes were not tried: they want a GPU each")
    else:
        last, two = "two", compress(small, "two", parent, "parallel.devices=2", "data.micro_batch_size=2")
        assert [entry["variant"] for entry in one] == [entry["variant"] for entry in two]
        largest = max(abs(a["trained"] - b["trained"]) / a["trained"] for a, b in zip(one, two, strict=True))
        print(f"{len(one)} variants, largest relative difference of an error: {largest:.1e}")
        assert largest < BOUND
    child = json.loads((small.run_dir(last) / "report/result.json").read_text())["checkpoint"]
    small.command("generate", "generate", child, "the", "--max-tokens", "4")


CHECKS = (a_compression_ends_and_processes_agree,)

if pytest is not None:

    def test_puzzle_on_a_gpu(tmp_path: Path) -> None:
        run_checks(tmp_path, CHECKS)


if __name__ == "__main__":
    main(CHECKS)
