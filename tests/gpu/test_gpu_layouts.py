"""On two GPUs with NCCL: two ranks train what one does: a hybrid, Muon, experts, Falcon-H1, linear layers and a Llama.

`python tests/gpu/test_gpu_layouts.py` does it without pytest and prints the largest difference of a loss and a norm.
Without GPUs it tries itself on the CPU with gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_runs import FIXED_ORDER, KINDS, PROCESSES, main, recipe, run_checks, small_run

try:
    import pytest

    few = torch.cuda.device_count() < 2
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(few, reason="needs two NVIDIA GPUs")]
except ImportError:
    pytest = None  # type: ignore[assignment]

#: sizes of layouts, by the name of Megatron's setting
LAYOUTS = {
    "tensor": {"tensor_model": 2},
    "data": {},
    "expert": {"expert_model": 2},
    "context": {"context": 2},
}
#: ours: of the first step's loss and gradient norm, and of any step's loss: BF16 rounds sums of two ranks otherwise
BOUNDS = (1e-3, 5e-2, 2e-2)


def values(small: small_run.Small, name: str, key: str) -> list[float]:
    """Return what each step recorded."""
    return [float.fromhex(step[key]) for _, step in sorted(small.steps(name).items())]


def check(small: small_run.Small, kind: str) -> None:
    """Train on one rank and in each layout on two, and compare losses and gradient norms."""
    PROCESSES.environment = FIXED_ORDER
    one = f"{kind}_one"
    small.train(one, recipe=recipe(small, one, kind=kind))
    for layout, sizes in LAYOUTS.items():
        if layout == "expert" and kind != "experts":
            continue
        two = f"{kind}_{layout}"
        options = [f"trainer.strategy.{name}_parallel_size={size}" for name, size in sizes.items()]
        options.append(f"trainer.strategy.sequence_parallel={layout == 'tensor'}")
        small.train(two, "trainer.devices=2", *options, ranks=2, recipe=recipe(small, two, kind=kind))
        pairs = [
            [abs(a - b) / abs(a) for a, b in zip(values(small, one, key), values(small, two, key), strict=True)]
            for key in ("loss", "grad_norm")
        ]
        errors = (pairs[0][0], pairs[1][0], max(pairs[0]))
        print(
            f"{kind}, {layout}: first loss {errors[0]:.1e}, gradient norm {errors[1]:.1e}; losses {errors[2]:.1e}",
            flush=True,
        )
        assert all(error < bound for error, bound in zip(errors, BOUNDS, strict=True)), (kind, layout, errors)


def hybrid(small: small_run.Small) -> None:
    """Compare layouts of the hybrid."""
    check(small, "hybrid")


def muon(small: small_run.Small) -> None:
    """Compare layouts of the hybrid with Muon."""
    check(small, "muon")


def experts(small: small_run.Small) -> None:
    """Compare layouts of a model with experts."""
    check(small, "experts")


def parallel(small: small_run.Small) -> None:
    """Compare layouts of attention beside Mamba-2, whose branches' outputs are summed over ranks once."""
    check(small, "parallel")


def linear(small: small_run.Small) -> None:
    """Compare layouts of a model with linear layers, which every tensor-parallel rank holds whole."""
    check(small, "linear")


def llama(small: small_run.Small) -> None:
    """Compare layouts of attention with biases and norms of heads, and an embedding that is the output matrix too."""
    check(small, "llama")


CHECKS = (hybrid, muon, experts, parallel, linear, llama)
assert [each.__name__ for each in CHECKS] == list(KINDS)

if pytest is not None:

    def test_layouts_on_gpus(tmp_path: Path) -> None:
        run_checks(tmp_path, CHECKS)


if __name__ == "__main__":
    main(CHECKS)
