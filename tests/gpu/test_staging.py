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
        staging.seal()
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


def test_an_update_waits_for_the_copies_and_a_pass_does_not() -> None:
    weights, buffer = torch.ones(BYTES // 4, device="cuda"), torch.ones(7, device="cuda")
    staging = Staging()

    def save() -> list[torch.Tensor]:
        staging.reserve((weights.nbytes, buffer.nbytes))
        with torch.cuda.stream(staging._stream):
            torch.cuda._sleep(1 << 30)  # the copies come late
        copies = [staging.copy(weights), staging.copy(buffer)]
        temporary = staging.copy(weights + 1)  # its memory is free before it is copied, and taken by the next line
        other = torch.zeros_like(weights)
        staging.seal()
        buffer.add_(1)  # as a pass does
        return [*copies, temporary, other]

    staging.reserve((2 * weights.nbytes + 4096, buffer.nbytes))
    save()  # once, so that memory of the GPU is there
    staging.wait()
    buffer.fill_(1)
    began = time.perf_counter()
    copies = save()
    assert time.perf_counter() - began < 0.2, "the host waits for nothing"
    staging.wait_on_gpu()
    weights.add_(1)  # as an update does
    staging.wait()
    assert [float(copy.min()) for copy in copies[:3]] == [1, 1, 2]
    assert [float(copy.max()) for copy in copies[:3]] == [1, 1, 2]
    weights.fill_(1)
    copies = save()
    weights.add_(1)  # not told of the copies
    staging.wait()
    assert float(copies[0].max()) == 2, "the copies were not late: the test shows nothing"


if __name__ == "__main__":
    test_copies_are_whole_pinned_and_take_no_memory_of_the_gpu()
    test_an_update_waits_for_the_copies_and_a_pass_does_not()
