"""On a GPU: weights reach Megatron's buffers as they were made, however busy the GPU is meanwhile.

`python tests/gpu/test_gpu_setup.py` does it without pytest. Without a GPU it tries itself on the CPU tests' model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_runs import FIXED_ORDER, ON_GPU, PROCESSES, main, recipe, run_checks, small_run

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

#: of an H200's clock, about three seconds
CYCLES = 6_000_000_000


def a_busy_gpu_has_the_same_weights(small: small_run.Small) -> None:
    """Compare weights before the first step, and every step, of a run whose GPU had to wait and of one that had not."""
    PROCESSES.environment = FIXED_ORDER
    small.train("calm", recipe=recipe(small, "calm"))
    small.train("busy", f"busy={CYCLES}", recipe=recipe(small, "busy"))
    calm, busy = (torch.load(small.folder / name / "start.pt", weights_only=True) for name in ("calm", "busy"))
    assert calm.keys() == busy.keys()
    differing = [name for name in calm if not torch.equal(calm[name], busy[name])]
    assert not differing, differing
    assert small.steps("calm") == small.steps("busy")


CHECKS = (a_busy_gpu_has_the_same_weights,)

if pytest is not None:

    def test_the_set_up_of_a_busy_gpu(tmp_path: Path) -> None:
        run_checks(tmp_path, CHECKS)


if __name__ == "__main__":
    main(CHECKS)
