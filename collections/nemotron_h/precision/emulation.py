"""FP8 linear layers without FP8 hardware: float8 casts around matmuls in float32.

Casts, formats and scales are those of Transformer Engine's linear layers, in all three matmuls (output, gradient of
the input, gradient of the weight). What differs is the order in which matmuls are summed, and the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_h.ops import linear
from nemotron_h.precision.scaling import BLOCK, E4M3, E5M2, Quantized, decode, quantize_blocks, quantize_tensor

#: (matrix, float8 format) -> the matrix quantised for matmuls that sum over its columns, and for those over its rows
Quantize = Callable[[Tensor, torch.dtype], tuple[Quantized, Quantized]]


def _per_tensor(x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    """Quantise with one scale, so that the same values serve both directions."""
    quantized = quantize_tensor(x, dtype)
    return quantized, quantized


def _square_blocks(x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    quantized = quantize_blocks(x, dtype, (BLOCK, BLOCK))
    return quantized, quantized


def _summed_blocks(x: Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    """Quantise in blocks along the axis that is summed over, so that each direction is quantised from the original."""
    return quantize_blocks(x, dtype, (1, BLOCK)), quantize_blocks(x, dtype, (BLOCK, 1))


@dataclass(frozen=True)
class Recipe:
    """Formats and scales of the operands of a linear layer."""

    activation: Quantize
    weight: Quantize
    gradient: Quantize
    gradient_dtype: torch.dtype


RECIPES = {
    "fp8_current_scaling": Recipe(_per_tensor, _per_tensor, _per_tensor, E5M2),
    "fp8_blockwise": Recipe(_summed_blocks, _square_blocks, _summed_blocks, E4M3),
}


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T, float32."""
    return linear.matmul(a, b) if linear.takes(a, b) else a @ b.t()


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype, a_rows: bool = False, b_rows: bool = False) -> Tensor:
    """Multiply `a @ b.T`, summed in float32, in `dtype`; `a_rows`, `b_rows`: take the transpose of that operand."""
    if a.block is None and b.block is None:
        left, right, factor = decode(a.values), decode(b.values), a.scale_inv * b.scale_inv
    else:
        left, right, factor = a.dequantize(), b.dequantize(), None
    out = _matmul(left.t() if a_rows else left, right.t() if b_rows else right)
    return (out if factor is None else out.mul_(factor)).to(dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, name):
        recipe = RECIPES[name]
        x_forward, x_backward = recipe.activation(x.reshape(-1, x.shape[-1]), E4M3)
        w_forward, w_backward = recipe.weight(weight, E4M3)
        # TE keeps float8 for the backward pass too
        ctx.save_for_backward(x_backward.values, x_backward.scale_inv, w_backward.values, w_backward.scale_inv)
        ctx.recipe, ctx.blocks = recipe, (x_backward.block, w_backward.block)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return multiply(x_forward, w_forward, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved, (x_block, w_block) = ctx.saved_tensors, ctx.blocks
        x, weight = Quantized(*saved[:2], x_block), Quantized(*saved[2:], w_block)
        dy_input, dy_weight = ctx.recipe.gradient(dy.reshape(-1, dy.shape[-1]), ctx.recipe.gradient_dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy_input, weight, ctx.dtypes[0], b_rows=True).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dweight = multiply(dy_weight, x, ctx.dtypes[1], a_rows=True, b_rows=True)
        return dx, dweight, None


def fp8_linear(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """Multiply `x @ weight.T` with operands in float8, differentiable once.

    Args:
        x: bfloat16 or float32 [..., inputs].
        weight: [outputs, inputs].
        recipe: `fp8_current_scaling` or `fp8_blockwise`.
    Returns:
        [..., outputs] in the dtype of `x`.
    Errors:
        KeyError: another recipe.
    """
    return _Fp8Linear.apply(x, weight, recipe)
