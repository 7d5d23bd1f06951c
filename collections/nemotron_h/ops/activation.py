"""Squared ReLU, the activation of feed-forward layers (Nemotron-H, arXiv 2504.03624, section 2.1).

So et al. 2022 (arXiv 2109.08668): ``y = relu(x)^2``, ``dx = 2 relu(x) dy``, elementwise.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: what Transformer Engine's kernels take
ENGINE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _SquaredReLU(torch.autograd.Function):
    """Squared ReLU in one pass each way and one saved tensor; autograd of two operations takes four passes more."""

    @staticmethod
    def forward(ctx, x):
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (positive,) = ctx.saved_tensors
        return torch.addcmul(positive.new_zeros(()), dy, positive, value=2)


class _EngineSquaredReLU(torch.autograd.Function):
    """Transformer Engine's kernels: one forward, one backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _engine().srelu(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return _engine().dsrelu(dy.contiguous(), x, None)


@functools.cache
def _engine() -> ModuleType | None:
    """Return Transformer Engine's compiled functions, or None."""
    try:
        import transformer_engine.pytorch  # noqa: F401 (loads the library that the next import needs)
        import transformer_engine_torch
    except Exception:  # a build for another torch or CUDA fails in many ways; the doctor and the log say which
        return None
    return transformer_engine_torch


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)^2 of any shape. Named, so that configurations can be saved."""
    if x.is_cuda and x.dtype in ENGINE_DTYPES and _engine() is not None:
        return _EngineSquaredReLU.apply(x)
    return _SquaredReLU.apply(x)
