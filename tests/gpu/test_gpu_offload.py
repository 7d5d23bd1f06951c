"""On a GPU: inputs of recomputed layers in host memory change no bit of losses and gradients, also of the second model
of a process that has freed the first one's host memory.

`python tests/gpu/test_gpu_offload.py` prints what it measures; pytest runs that as a process of its own, because
kernels are asked to add in a fixed order before they are imported. Without a GPU the script tries itself on the plain
stack.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    os.environ.setdefault("CAUSAL_CONV1D_DETERMINISTIC", "1")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_packed_documents import DEVICE, LENGTH, MODELS, ROWS, model, results, seq_idx, start, tokens

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]


def second_step(offload: bool) -> dict[str, Any]:
    """Losses, logits and gradients of a second step, whose inputs take the blocks of the first."""
    pattern, precision, adapted, changes = MODELS["hybrid, recomputed"]
    built = model(pattern, precision, adapted, {**changes, "recompute_offload": offload})
    learnt = torch.ones(ROWS, LENGTH, dtype=torch.bool, device=DEVICE)
    for _ in range(2):
        found = results(built, tokens(), seq_idx(65), learnt)
    del built
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return found


def check() -> None:
    """Compare models with and without, one after the other."""
    start()
    first, kept, again = (second_step(offload) for offload in (True, False, True))
    for name, found in (("the first model", first), ("one after it", again)):
        different = [key for key, value in kept.items() if not value.equal(found[key])]
        print(f"offloaded, {name}: {len(kept) - len(different)} of {len(kept)} tensors are equal", flush=True)
        assert not different, different


def test_offloaded_inputs_change_no_bit() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600)
    print(done.stdout[-3000:], flush=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    check()
