"""Host memory that a rank's shards are copied into before they are written: one block, allocated once and reused.

A GPU copies them beside the next forward and backward pass, on a stream of its own. The update of the weights waits for
the copies on the GPU, the threads that write wait for them on the host; training does not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

#: bytes; ours: shards begin at multiples of it, as pages do
_ALIGNMENT = 4096
#: ours: bytes that a thread touches at a time
_TOUCHED = 1 << 28
#: ours: bytes of a GPU's tensor from which it is copied beside the next pass. Smaller ones are copied before it: they
#: may be buffers that a pass changes, where only an update changes weights and optimizer states.
_BESIDE = 1 << 20


class Staging:
    """Copies of tensors in host memory, pinned where there is a GPU, from `reserve` until the next one.

    After `reserve` and a `copy` of each comes `seal`; then whoever reads the copies calls `wait`, and whoever is about
    to change the tensors `wait_on_gpu`.

    Attributes:
        size: bytes of the block.
        seconds: that the last `reserve` spent on allocating; 0 where the block was large enough.
    """

    def __init__(self) -> None:
        self.size, self.seconds, self._end = 0, 0.0, 0
        self._memory: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def reserve(self, sizes: Iterable[int]) -> None:
        """Make room for tensors of so many bytes each; the copies of before are gone."""
        needed, self._end, self.seconds = sum(map(_aligned, sizes)), 0, 0.0
        if needed > self.size:
            began = time.monotonic()
            self._free()
            self._memory, self.size = _pinned(needed) if torch.cuda.is_available() else _plain(needed), needed
            self.seconds = time.monotonic() - began
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy with a storage of its own size; of a GPU's tensor, it is whole after `wait`."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        begin, self._end = self._end, self._end + _aligned(tensor.nbytes)
        copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
        copy = copy.view(tensor.shape)
        if tensor.is_cuda and tensor.nbytes >= _BESIDE:
            with torch.cuda.stream(self._stream):
                copy.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(self._stream)  # one that is made for the save alone is freed before it is copied
            return copy
        return copy.copy_(tensor.detach(), non_blocking=True)

    def seal(self) -> None:
        """Take note that all copies have been asked for."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            self._copied = self._stream.record_event()

    def wait(self) -> None:
        """Wait until the copies are whole; work that the GPU is given beside them is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()

    def wait_on_gpu(self) -> None:
        """Have the GPU do what it is given from now on after the copies; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def _free(self) -> None:
        if isinstance(self._memory, mmap.mmap) and torch.cuda.is_available():
            torch.cuda.cudart().cudaHostUnregister(torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr())
        self._memory, self.size = None, 0


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _plain(size: int) -> mmap.mmap:
    """Return zeroed memory that no child process inherits: a data loader's worker would have pages copied."""
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _pinned(size: int) -> Any:
    """Return memory that the GPU copies to by itself.

    PyTorch's own pinned memory is rounded up to a power of two, and one thread makes its pages. It is taken where the
    driver does not register this process's memory.
    """
    memory = _plain(size)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(Tensor.zero_, whole.split(_TOUCHED)))
    if not int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), size, 0)):
        return memory
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # takes the driver's error, which the next kernel would be blamed for
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
