"""`x @ weight.T` in float32 on the CPU through oneDNN, with its backward.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that are not Intel's: half of what their
AVX-512 units can do. oneDNN (torch's own, where bfloat16 goes too) uses them; it stays in float32 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies these: float32 on the CPU, outside autocast, in a torch that has oneDNN."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T over the last axes, of tensors that `takes` accepts.

    oneDNN wants `a` dense and copies it otherwise; `b` may be strided.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight asks for no x
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = product(rows, weight.t()).view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            # Of the two transposes the narrower is the first operand, the one that is copied.
            if rows.shape[1] <= inputs.shape[1]:
                dweight = product(rows.t(), inputs.t())
            else:
                dweight = product(inputs.t(), rows.t()).t()
        return dx, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, differentiable once.

    Args:
        x: float32 [..., inputs], any strides.
        weight: float32 [outputs, inputs].

    Returns:
        float32 [..., outputs].

    Raises:
        ValueError: tensors that `takes` refuses.
    """
    if not takes(x, weight):
        raise ValueError(f"linear: needs float32 on the CPU, got {x.dtype} and {weight.dtype} on {x.device}")
    return _Linear.apply(x, weight)
