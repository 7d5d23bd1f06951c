"""Compare every tensor of pairs of checkpoints: `same_tensors.py ONE TWO ...` prints for each pair how many there are,
or which differ.

Run by `small_run.same_tensors` in a fork of a process that has imported everything.
"""

from __future__ import annotations

import sys

import torch

from nemotron_h.platform import cpu

cpu.install()

from megatron.core.dist_checkpointing import load_plain_tensors, load_tensors_metadata  # noqa: E402

#: the main weights, as `fully_reshardable` names them, and as `fully_sharded_model_space` does
FORMER, MAIN = "optimizer.state.param.", "optimizer.state.fp32_param."


def whole_tensors(folder: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a `weights` folder in the model's shapes, of either format of the optimizer's state."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    shapes = load_tensors_metadata(folder)
    return {
        key.replace(FORMER, MAIN): value.reshape(shapes[key].local_shape)
        for key, value in load_plain_tensors(folder).items()
        if torch.is_tensor(value)
    }


def equal(key: str, one: torch.Tensor, two: torch.Tensor) -> bool:
    """Compare bit for bit; of a vocabulary the rows of both, as tensor parallelism decides how it is padded."""
    if key.endswith(("word_embeddings.weight", "output_layer.weight")):
        one, two = one[: len(two)], two[: len(one)]
    return torch.equal(one, two)


def main(*folders: str) -> None:
    """Load each pair and compare it bit for bit."""
    for one, two in zip(folders[::2], folders[1::2], strict=True):
        first, second = map(whole_tensors, (one, two))
        assert first.keys() == second.keys(), first.keys() ^ second.keys()
        assert any("exp_avg" in key for key in first)
        differ = [key for key, value in first.items() if not equal(key, value, second[key])]
        print(f"differ: {', '.join(differ)}" if differ else f"same: {len(first)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
