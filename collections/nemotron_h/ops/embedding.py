"""Embedding lookup whose backward adds to Megatron's gradient buffer the rows that were looked up, and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_h.ops.main_grad import handed_over


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids,), weight = ctx.saved_tensors, ctx.weight
        buffer = weight.main_grad
        # sorts the ids and adds in their order: as reproducible as the dense gradient
        buffer.index_put_((ids,), dout.to(buffer.dtype), accumulate=True)
        return None, handed_over(weight)


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight[ids]``; the gradient goes to ``weight.main_grad`` where Megatron's DDP has made that buffer.

    A dense gradient is as large as the vocabulary: zeros are written, read and added for every row that no token has.

    Args:
        ids: int [...], rows of ``weight``.
        weight: [vocabulary, hidden].

    Returns:
        [..., hidden]. Differentiable once.
    """
    return _Lookup.apply(ids, weight) if hasattr(weight, "main_grad") else F.embedding(ids, weight)
