"""RMSNorm, plain and gated over groups, in plain PyTorch; the backward keeps the inputs and 1/rms only.

Axes: g groups of e channels, d = g * e; the leading axes, any number of them, are taken in memory order.

Zhang and Sennrich 2019 (arXiv 1910.07467); before Mamba-2's output projection over the gated scan, within each group
of heads (Dao and Gu 2024, arXiv 2405.21060, section 7.1). With ``rstd = 1 / sqrt(mean(h^2) + eps)`` of a group:

    h = y silu(z)      norm = h rstd      out = weight norm
    dweight = sum_tokens dout norm      dh = rstd (weight dout - norm mean(weight dout norm))
    dy = dh silu(z)      dz = dh y silu'(z)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ours: elements of a block; its few float32 buffers stay in cache.
BLOCK_ELEMENTS = 1 << 18


def _order(t: Tensor) -> list[int]:
    """Return the leading dimensions by falling stride (memory order), then the last dimension."""
    return [*sorted(range(t.dim() - 1), key=lambda i: -t.stride(i)), t.dim() - 1]


def _blocks(t: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS * t.shape[0] // t.numel())
    return (slice(i, i + step) for i in range(0, t.shape[0], step))


class _GroupRMSNorm(torch.autograd.Function):
    """Differentiate the module's formulas by hand; h = y without a gate."""

    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        order = _order(y)
        out = torch.empty_like(y)
        yp, op = y.permute(order), out.permute(order)
        zp = None if z is None else z.permute(order)
        rstd = torch.empty(*yp.shape[:-1], groups, 1, dtype=dtype, device=y.device)  # [..., g, 1]
        w = weight.to(dtype)
        with torch.autocast(y.device.type, enabled=False):
            for rows in _blocks(yp) if y.numel() else ():
                h = _gated(yp[rows].to(dtype), None if zp is None else zp[rows].to(dtype)).unflatten(-1, (groups, -1))
                rstd[rows] = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
                op[rows] = h.mul(rstd[rows]).flatten(-2).mul_(w)
        ctx.save_for_backward(y, z, weight, rstd)
        ctx.groups = groups
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, z, weight, rstd = ctx.saved_tensors
        groups, dtype = ctx.groups, rstd.dtype
        order = _order(y)
        w = weight.to(dtype)
        dweight = torch.zeros_like(w)
        dy, dz = torch.empty_like(y), None if z is None else torch.empty_like(z)
        yp, dyp, doutp = y.permute(order), dy.permute(order), dout.permute(order)
        zp, dzp = (None, None) if z is None else (z.permute(order), dz.permute(order))
        with torch.autocast(y.device.type, enabled=False):
            for rows in _blocks(yp) if y.numel() else ():
                yf, zf = yp[rows].to(dtype), None if zp is None else zp[rows].to(dtype)
                gate = None if zf is None else F.silu(zf)
                normed = (yf if gate is None else yf * gate).unflatten(-1, (groups, -1)) * rstd[rows]  # [..., g, e]
                dh = doutp[rows].to(dtype).mul(normed.flatten(-2))
                dweight += dh.flatten(0, -2).sum(0)
                mean = dh.mul_(w).unflatten(-1, (groups, -1)).mean(-1, keepdim=True)  # [..., g, 1]
                dh = doutp[rows].to(dtype).mul(w).unflatten(-1, (groups, -1))
                dh = dh.sub_(normed.mul_(mean)).mul_(rstd[rows]).flatten(-2)
                if gate is None:
                    dyp[rows] = dh
                else:
                    dyp[rows] = gate.mul_(dh)
                    dzp[rows] = torch.ops.aten.silu_backward(dh.mul_(yf), zf)
        grads = (dy, dz, dweight.to(weight.dtype))
        return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


def _gated(y: Tensor, z: Tensor | None) -> Tensor:
    return y if z is None else F.silu(z).mul_(y)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, group_size: int, eps: float = 1e-5) -> Tensor:
    """Return Mamba-2's output norm, gate first: ``h = y * silu(z)``, then ``weight * h / sqrt(mean(h^2) + eps)`` per
    group.

    Args:
        y, z: [..., d], any strides.
        weight: [d].
        group_size: channels of one group; the mean goes over each run of that many.
        eps: added to the mean square.

    Returns:
        [..., d] in ``y``'s dtype and memory order; float32 inside (float64 for float64). Differentiable once.

    Errors:
        ValueError: shapes that do not fit together.
    """
    if y.shape != z.shape:
        raise ValueError(f"gated_rms_norm: y and z must have one shape, got {tuple(y.shape)} and {tuple(z.shape)}")
    _check("gated_rms_norm", y, weight, group_size)
    return _GroupRMSNorm.apply(y, z, weight, y.shape[-1] // group_size, eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, without gate and groups."""
    _check("rms_norm", x, weight, x.shape[-1])
    return _GroupRMSNorm.apply(x, None, weight, 1, eps)


def rms_norm_inference(x: Tensor, weight: Tensor, z: Tensor | None = None, *, group_size: int, eps: float) -> Tensor:
    """Compute `gated_rms_norm` (`rms_norm` without `z`): not differentiable, in as few operations as there can
    be.

    Args:
        x, z: [..., d].
        weight: [d].

    Returns:
        [..., d] in ``x``'s dtype; float32 inside (float64 for float64).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(dtype) if z is None else F.silu(z.to(dtype)).mul_(x)
    h = h.unflatten(-1, (-1, group_size))  # [..., g, e]
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().mul_(1 / group_size).add_(eps).rsqrt_()
    h = h * rstd if z is None else h.mul_(rstd)
    return h.flatten(-2).mul_(weight).to(x.dtype)


def _check(name: str, y: Tensor, weight: Tensor, group_size: int) -> None:
    if tuple(weight.shape) != tuple(y.shape[-1:]):
        raise ValueError(f"{name}: weight must have shape {tuple(y.shape[-1:])}, got {tuple(weight.shape)}")
    if group_size < 1 or y.shape[-1] % group_size:
        raise ValueError(f"{name}: {y.shape[-1]} channels do not divide into groups of {group_size}")


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return the LayerNorm of `x` over its last axis, or the RMSNorm where there is no bias; on a GPU by
    PyTorch's own kernels.

    Args:
        x: [..., channels].
        weight, bias: [channels].
    """
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else rms_norm(x, weight, eps=eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
