"""Activations of feed-forward layers, elementwise.

Squared ReLU (Nemotron-H, arXiv 2504.03624, section 2.1; So et al. 2022, arXiv 2109.08668): ``y = relu(x)^2``,
``dx = 2 relu(x) dy``.

Gated SiLU (Shazeer 2020, arXiv 2002.05202), with the two numbers that Falcon-H1 multiplies by (arXiv 2507.22448), with
``t = a g`` and ``s = sigmoid(t)``: ``y = b t s u``, ``du = b t s dy``, ``dg = a b s (1 + t (1 - s)) u dy``.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
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


class _GatedSiLU(torch.autograd.Function):
    """Gated SiLU that keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate, up, a, b):
        ctx.save_for_backward(gate, up)
        ctx.scales = a, b
        return _gated_silu(gate, up, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _gradients(dy, gate, up, *ctx.scales, dgate, dup)
        return dgate, dup, None, None


class _SwiGLU(torch.autograd.Function):
    """Gated SiLU of one tensor that holds gate and up, whose gradients are written into one tensor too."""

    @staticmethod
    def forward(ctx, inner, a, b):
        ctx.save_for_backward(inner)
        ctx.scales = a, b
        return _gated_silu(*inner.chunk(2, dim=-1), a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (inner,) = ctx.saved_tensors
        gradient = torch.empty_like(inner)
        _gradients(dy, *inner.chunk(2, dim=-1), *ctx.scales, *gradient.chunk(2, dim=-1))
        return gradient, None, None


def _gated_silu(gate: Tensor, up: Tensor, a: float, b: float) -> Tensor:
    y = F.silu(gate if a == 1 else gate * a).mul_(up)
    return y if b == 1 else y.mul_(b)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, a: float, b: float, dgate: Tensor, dup: Tensor) -> None:
    """Write both gradients, by the module's formulas."""
    t = gate if a == 1 else gate * a
    torch.mul(F.silu(t), dy, out=dup)
    torch.ops.aten.silu_backward.grad_input(dy * up, t, grad_input=dgate)
    if b != 1:
        dup.mul_(b)
    if a * b != 1:
        dgate.mul_(a * b)


def gated_silu(gate: Tensor, up: Tensor, gate_scale: float = 1.0, scale: float = 1.0) -> Tensor:
    """Return scale * up * silu(gate_scale * gate), all of one shape."""
    return _GatedSiLU.apply(gate, up, gate_scale, scale)


def swiglu(inner: Tensor, gate_scale: float = 1.0, scale: float = 1.0) -> Tensor:
    """Return scale * up * silu(gate_scale * gate), [..., n] of gate and up side by side, [..., 2 n]."""
    return _SwiGLU.apply(inner, gate_scale, scale)
