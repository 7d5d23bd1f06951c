"""Compare every tensor of two checkpoints: `same_tensors.py ONE TWO` prints how many there are, or which differ.

Run by `small_run.same_tensors` in a fork of a process that has imported everything.
"""

from __future__ import annotations

import sys

import torch

from nemotron_h.platform import cpu

cpu.install()

from megatron.core.dist_checkpointing import load_plain_tensors  # noqa: E402


def main(one: str, two: str) -> None:
    """Load both and compare them bit for bit."""
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    first, second = ({k: v for k, v in load_plain_tensors(f).items() if torch.is_tensor(v)} for f in (one, two))
    assert first.keys() == second.keys()
    assert any("exp_avg" in key for key in first)
    differ = [key for key, value in first.items() if not torch.equal(value, second[key])]
    print(f"differ: {', '.join(differ)}" if differ else f"same: {len(first)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
