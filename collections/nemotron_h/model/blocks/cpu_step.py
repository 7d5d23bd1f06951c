"""Buffers of a step on the CPU.

A small model's step is short against what PyTorch takes per operation. So every operation writes into buffers that are
made once per batch, and so are the views of them; matmuls add to the residual stream themselves and scale what a norm
left unscaled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Normed:
    """The last dimension of `values`, divided by its length in one operation after the length itself.

    A constant channel behind the others holds what epsilon adds: sqrt(sum of squares + channels * epsilon) is then a
    plain length. The root mean square is that length / sqrt(channels): `gain`, left to the matmul that follows.
    """

    def __init__(self, *shape: int, eps: float, dtype: torch.dtype) -> None:
        self.whole = torch.full((*shape[:-1], shape[-1] + 1), math.sqrt(shape[-1] * eps), dtype=dtype)
        self.values = self.whole[..., :-1]
        self.length = torch.empty(*shape[:-1], 1, dtype=dtype)
        self.result = torch.empty(shape, dtype=dtype)
        self.flat = self.result.flatten(1)
        self.gain = math.sqrt(shape[-1])

    def __call__(self, weight: Tensor) -> Tensor:
        """Return [batch, channels], to be multiplied by `gain`."""
        torch.linalg.vector_norm(self.whole, dim=-1, keepdim=True, out=self.length)
        torch.div(self.values, self.length, out=self.result)
        return self.flat.mul_(weight)


class Residual(Normed):
    """The residual stream of a step, [batch, hidden]."""

    def matmul(self, h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Write the matmul of the normalised stream `h` into `out` and return it."""
        return torch.addmm(out, h, weight.t(), beta=0, alpha=self.gain, out=out)
