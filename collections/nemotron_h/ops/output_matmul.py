"""The output layer's matmul and its gradients for a few tokens at a time, as losses without whole logits take them.

Axes: t tokens (of a chunk), v words of this rank, h width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.ops import linear

#: ours: logits of one model in a chunk, by device: few enough to save memory, enough for the matmuls to be efficient
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


def tokens_of_a_chunk(weight: Tensor) -> int:
    """Return the tokens whose logits exist at once, by the output layer's rows [vocabulary of this rank, width]."""
    return max(1, CHUNK_ELEMENTS["cuda" if weight.is_cuda else "cpu"] // weight.shape[0])


def _takes(a: Tensor, b: Tensor) -> bool:
    """Return True for float32: with widened bfloat16 matmuls two ranks' distillation was not that of one."""
    return a.dtype == torch.float32 and linear.takes(a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T, in oneDNN where that is faster."""
    return linear.matmul(a.contiguous(), b) if _takes(a, b) else a @ b.t()


def zeros_of(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros [v, h] to sum the weight's gradient in, with the strides that `add_matmul` adds at."""
    if _takes(hidden, weight):
        return torch.zeros(weight.shape[::-1], dtype=dtype, device=weight.device).t()
    return torch.zeros_like(weight, dtype=dtype)


def add_matmul(total: Tensor, rows: Tensor, inputs: Tensor) -> None:
    """Add rows.T @ inputs, of [t, v] and [t, h], to `total` [v, h], which may be wider than the matmul's operands."""
    if _takes(rows, inputs):
        total += linear.matmul(inputs.t().contiguous(), rows.t()).t()
    elif total.dtype == rows.dtype:
        total.addmm_(rows.t(), inputs)
    elif total.is_cuda:
        torch.addmm(total, rows.t(), inputs, out_dtype=total.dtype, out=total)
    else:
        total += rows.t() @ inputs
