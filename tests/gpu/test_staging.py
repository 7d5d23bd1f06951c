"""Copies of a GPU's tensors into pinned host memory: whole, fast, and without memory of the GPU.

`python tests/gpu/test_staging.py` does it without pytest and prints the bytes per second.
"""

from __future__ import annotations

import time

import torch

from nemotron_h.platform.staging import Staging

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

BYTES = 1 << 30


def test_copies_are_whole_pinned_and_take_no_memory_of_the_gpu() -> None:
    tensors = [torch.randn(BYTES // 4, device="cuda"), torch.randn(1000, 33, device="cuda").bfloat16()]
    tensors += [torch.arange(7, device="cuda"), torch.tensor(1.5)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, staging = torch.cuda.memory_allocated(), Staging()
    for turn in range(2):
        staging.reserve(tensor.nbytes for tensor in tensors)
        began = time.perf_counter()
        copies = [staging.copy(tensor) for tensor in tensors]
        staging.wait()
        seconds = time.perf_counter() - began
        assert torch.cuda.max_memory_allocated() == before
        print(f"allocated in {staging.seconds:.2f} s, copied at {BYTES / seconds / 1e9:.1f} GB/s")
        for copy, tensor in zip(copies, tensors, strict=True):
            assert copy.is_pinned()
            assert torch.equal(copy, tensor.cpu())
            assert copy.untyped_storage().nbytes() == copy.nbytes
        tensors[0].add_(1)
        assert (staging.seconds > 0) == (turn == 0)


if __name__ == "__main__":
    test_copies_are_whole_pinned_and_take_no_memory_of_the_gpu()
