"""Scale parts of a tensor's last axis by a number each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ScaleSections(torch.autograd.Function):
    """Scale into one new tensor, with nothing kept; autograd of slices and their concatenation would copy twice."""

    @staticmethod
    def forward(ctx, x, sections, scales):
        ctx.sections, ctx.scales = sections, scales
        return _scaled(x, sections, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _scaled(dy, ctx.sections, ctx.scales), None, None


def _scaled(x: Tensor, sections: Sequence[int], scales: Sequence[float]) -> Tensor:
    out = torch.empty_like(x)
    parts = (x.split(sections, dim=-1), out.split(sections, dim=-1))
    for part, scaled, scale in zip(*parts, scales, strict=True):
        torch.mul(part, scale, out=scaled)
    return out


def scale_sections(x: Tensor, sections: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Return x [..., sum of sections], each section times its number, which no dtype rounds."""
    return _ScaleSections.apply(x, list(sections), tuple(scales))
