"""`x @ weight.T` on the CPU through oneDNN's float32 matmuls, with its backward.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that are not Intel's: half of what their
AVX-512 units can do. oneDNN (torch's own, where bfloat16 goes too) uses them; it stays in float32 throughout.

A processor without bfloat16 units multiplies bfloat16 matrices at a fifth of its float32 speed, Intel's AVX512-BF16 at
two thirds. There the operands are widened, which is exact, multiplied and summed in float32, and the result is rounded,
as in the slow matmul.

Axes: t rows of all leading axes of x, i inputs, o outputs.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: widened operands and results at a time, so that they stay in the cache and add little to the peak
BLOCK_BYTES = 4 << 20


def _is_x86_without_amx() -> bool:
    """Return True if this is an x86 without AMX; of other processors torch does not say what they have."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_amx_tile_supported()


def lacks_bfloat16_units() -> bool:
    """Return True if this processor is an x86 without AVX512-BF16 and AMX."""
    return _is_x86_without_amx() and not torch.cpu._is_avx512_bf16_supported()


@functools.cache
def widens_bfloat16() -> bool:
    """Return True if bfloat16 matmuls of this processor go through float32: an x86 that is slower in bfloat16.

    That is one without bfloat16 units, or Intel's with AVX512-BF16 and without AMX (a virtual machine may hide it):
    it multiplies no more numbers a cycle than in float32, AMD's twice as many.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.8
    return lacks_bfloat16_units() or (_is_x86_without_amx() and known.get("cpu_name", "").startswith("Intel"))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Return True if `linear` multiplies these: on the CPU, outside autocast, in a torch that has oneDNN, and float32,
    or bfloat16 where that is widened.
    """
    return (
        x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and widens_bfloat16()))
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
    )


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if not a.numel():  # an expert without tokens; oneDNN refuses it
        return a.new_zeros(*a.shape[:-1], b.shape[0])
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of both that are together worth a block of float32."""
    rows = max(1, BLOCK_BYTES // (4 * (a.shape[1] + b.shape[1])))
    return zip(a.split(rows), b.split(rows), strict=True)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T over the last axes, of tensors that `takes` accepts.

    oneDNN wants `a` dense and copies it otherwise; `b` may be strided.
    """
    if a.dtype == torch.float32:
        return _multiply(a, b)
    wide = b.float()
    out = a.new_empty(*a.shape[:-1], b.shape[0])
    for rows, target in _blocks(a.reshape(-1, a.shape[-1]), out.view(-1, b.shape[0])):
        target.copy_(_multiply(rows.float(), wide))
    return out


def _transposed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a.T @ b of matrices that `takes` accepts, summed in float32."""
    # Of the two transposes the narrower is the first operand, the one that is copied.
    if a.shape[1] > b.shape[1]:
        return _transposed_matmul(b, a).t()
    if a.dtype == torch.float32:
        return _multiply(a.t(), b.t())
    total = torch.zeros(a.shape[1], b.shape[1])
    for rows, others in _blocks(a, b):
        total.addmm_(rows.float().t(), others.float())
    return total.to(a.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight asks for no x
        return matmul(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # y = x W^T: dx = dy W, dW = dy^T x
        x, weight = ctx.saved_tensors
        dx = dweight = None
        rows = dy.reshape(-1, dy.shape[-1])  # [t, o]
        if ctx.needs_input_grad[0]:
            dx = matmul(rows, weight.t()).view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            dweight = _transposed_matmul(rows, x.reshape(-1, x.shape[-1]))
        return dx, dweight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, differentiable once.

    Args:
        x: float32 [..., inputs], any strides; bfloat16 where `widens_bfloat16`.
        weight: [outputs, inputs], of the same dtype.

    Returns:
        [..., outputs] of that dtype.

    Errors:
        ValueError: tensors that `takes` refuses.
    """
    if not takes(x, weight):
        kinds = "float32 or bfloat16" if widens_bfloat16() else "float32"
        raise ValueError(f"linear: needs {kinds} on the CPU, got {x.dtype} and {weight.dtype} on {x.device}")
    return _Linear.apply(x, weight)
