"""Import megatron-core where no GPU is visible, also with a PyTorch that was built for CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import cpp_extension


@contextlib.contextmanager
def without_gpu_builds() -> Iterator[None]:
    """Inside the block no extension is compiled; a no-op where a GPU is visible.

    `megatron.core.inference.unified_memory` compiles an allocator while it is imported and takes three errors for
    "there is none". A PyTorch for CUDA on a machine with a CUDA toolkit and no visible GPU raises a fourth (an
    `IndexError`: it asks the GPUs for their architecture), and nothing that imports megatron-core loads.
    """
    if torch.cuda.is_available():
        yield
        return

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no GPU is visible")

    original = cpp_extension.load_inline
    cpp_extension.load_inline = refuse
    try:
        yield
    finally:
        cpp_extension.load_inline = original
