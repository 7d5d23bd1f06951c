"""Matrices in FP8 for generation, behind `torch.nn.functional.linear`: E4M3 with a scale for each output.

A step of a few sequences waits for weights to be read: they are widened to the dtype of x on the chip, and x is exact.
Many rows wait for matmuls: those are in FP8, for which each row of x is scaled and rounded as well, so that what a row
gets does not hang on the others.

Axes: m rows of all leading axes of x, n outputs, k inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: torch's FP8 matmuls take multiples of this
MULTIPLE = 16
#: ours, where both take as long on an H200: up to so many rows the weights are widened
FEW = 32
#: the first GPUs with FP8 units, Ada and Hopper
CAPABILITY = (8, 9)


class Float8Matrix:
    """The weight of a linear layer.

    Args:
        values: E4M3 [n, k].
        scales: float32 [n], which the values of an output are times.
    """

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    @classmethod
    def round(cls, weight: Tensor) -> Float8Matrix:
        """Scale each row [k] of a weight so that its largest number is that of E4M3, and round it."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = weight.abs().amax(dim=1).float().clamp(min=1e-30) / largest
        return cls((weight.float() / scales[:, None]).to(torch.float8_e4m3fn), scales)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Multiply; no other function of torch takes these matrices."""
        if function is not F.linear or kwargs or len(args) != 2:
            return NotImplemented
        x, weight = args
        return weight.multiply(x)

    def __getitem__(self, outputs: slice) -> Float8Matrix:
        """Return some of the outputs: a view."""
        return Float8Matrix(self.values[outputs], self.scales[outputs])

    def widened(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a tensor."""
        return (self.values.float() * self.scales[:, None]).to(dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x [..., k] times the weight, [..., n] in the dtype of x.

        The CPU computes the same in float32, of widened numbers: that saves neither time nor memory.
        """
        rows = x.reshape(-1, x.shape[-1])
        y = self._on_gpu(rows) if x.is_cuda else self._on_cpu(rows)
        return y.view(*x.shape[:-1], len(self.scales))

    def _on_cpu(self, rows: Tensor) -> Tensor:
        wide = Float8Matrix.round(rows).widened(torch.float32) if len(rows) > FEW else rows.float()
        return F.linear(wide, self.widened(torch.float32)).to(rows.dtype)

    def _on_gpu(self, rows: Tensor) -> Tensor:
        from nemotron_h.ops.float8_kernel import few_rows, round_rows

        if len(rows) <= FEW:
            return few_rows(rows, self.values, self.scales)
        values, scales = round_rows(rows)
        return torch._scaled_mm(
            values, self.values.t(), scales, self.scales[None], out_dtype=rows.dtype, use_fast_accum=True
        )


def takes(weight: Tensor) -> bool:
    """Return True if a weight can be a `Float8Matrix`: a matrix of sizes that FP8 matmuls take."""
    return weight.dim() == 2 and not any(size % MULTIPLE for size in weight.shape)
