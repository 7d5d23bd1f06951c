"""Import megatron-core without a GPU, also with a PyTorch that was built for CUDA, and keep tuned kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import cpp_extension


def keep_tuned_kernels() -> None:
    """Let Triton store which variant of a kernel was the fastest, so that later processes take it without timing it.

    mamba-ssm's kernels, which megatron-core imports, come in many variants; `TRITON_CACHE_AUTOTUNING=0` switches this
    off. Where sums are asked for in a fixed order (`MAMBA_DETERMINISTIC=1`) it stays off: mamba-ssm then has one
    variant of each kernel. With the variable set it would let each process time those that Triton does not store, and
    the order of their sums would be the winner's.
    """
    if os.environ.get("MAMBA_DETERMINISTIC", "")[:1] != "1":
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


@contextlib.contextmanager
def without_gpu_builds() -> Iterator[None]:
    """Compile no extension inside the block; a no-op where a GPU is visible.

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
