"""Import NeMo and megatron-core: without a GPU, without packages that nothing here calls, with tuned kernels kept."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.imports import RequirementCache
from torch.utils import cpp_extension

#: packages that upstream imports wherever they are installed, for plots, scores and reports that nothing here asks for
UNUSED = ("matplotlib", "sklearn", "wandb")


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


@contextlib.contextmanager
def without_unused() -> Iterator[None]:
    """Import NeMo inside the block in two thirds of the time: without `UNUSED`, a compiler or searches for garbage.

    megatron-core wraps its fused functions in `torch.compile` while it is imported, which loads the compiler. Without a
    GPU the model's options leave these functions alone (`GPU_OPTIONS` of `model.gpu_options`), and nothing is wrapped.
    What modules create while they load lives as long as the process: collecting garbage would search it again and
    again, for nothing, now and later.
    """
    first = "nemo.collections.llm" not in sys.modules
    hidden = [name for name in UNUSED if name not in sys.modules]
    check, compiler, collecting = RequirementCache._check_requirement, torch.compile, gc.isenabled()

    def checked(self: RequirementCache) -> None:  # torchmetrics asks for versions, which are there
        check(self)
        self.available = self.available and self.requirement.split(">")[0] not in hidden

    def unchanged(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))
    RequirementCache._check_requirement = checked
    if not torch.cuda.is_available():
        torch.compile = unchanged
    try:
        yield
    finally:
        RequirementCache._check_requirement, torch.compile = check, compiler
        for name in hidden:
            sys.modules.pop(name, None)
        if first:
            gc.freeze()
        if collecting:
            gc.enable()
