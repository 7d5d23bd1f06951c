"""Float8 quantisation with the scales that Transformer Engine 2.11 computes, in plain PyTorch.

A tensor is multiplied by `scale = largest value of the format / amax` and cast, saturating, to the nearest float8;
`1 / scale` undoes the scaling. amax is the largest magnitude now: of the whole tensor, or of each block.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = 128
#: what makes Transformer Engine depart from its defaults: float32 scales of tensors, powers of 2 for blocks
TENSOR_POWERS_OF_2, BLOCK_FP32 = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES", "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


@dataclass(frozen=True)
class Quantized:
    """A matrix in float8.

    Attributes:
        values: float8 [rows, columns].
        scale_inv: float32, by which `values` are multiplied to read them: [] for a tensor, else one per block,
            [ceil(rows / block[0]), ceil(columns / block[1])].
        block: rows and columns of a block; None when one scale serves the whole tensor.
    """

    values: Tensor
    scale_inv: Tensor
    block: tuple[int, int] | None = None

    def dequantize(self) -> Tensor:
        """Return the values in float32 [rows, columns]."""
        values = decode(self.values)
        if self.block is None:
            return values * self.scale_inv
        rows, columns = values.shape
        per_row = self.scale_inv.repeat_interleave(self.block[0], 0)[:rows]
        return values.mul_(per_row.repeat_interleave(self.block[1], 1)[:, :columns])


def decode(values: Tensor) -> Tensor:
    """Decode float8 to float32, exactly; by table on the CPU, where torch's conversion takes twice as long."""
    if values.device.type != "cpu":
        return values.float()
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float()
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)


def scale_from_amax(amax: Tensor, dtype: torch.dtype, largest_scale: float, power_of_2: bool) -> Tensor:
    """Return the factor before the cast, float32; 1 where amax is 0, infinite or not a number.

    Args:
        amax: float32, any shape.
        dtype: the float8 format.
        largest_scale: taken where the quotient overflows float32.
        power_of_2: round the scale down to a power of 2.
    """
    # tensor by tensor: torch computes number / tensor as a product with the reciprocal, which rounds twice
    scale = torch.full_like(amax, torch.finfo(dtype).max) / amax
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, largest_scale), scale)
    if power_of_2:  # the exponent's bits alone
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float32 to the nearest float8, ties to even; magnitudes beyond the format become its largest value."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def quantize_tensor(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantise `x`, [rows, columns] in bfloat16 or float32, with one scale."""
    amax = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    power_of_2 = os.environ.get(TENSOR_POWERS_OF_2) == "1"
    scale = scale_from_amax(amax, dtype, torch.finfo(torch.float32).max, power_of_2)
    return Quantized(cast(x.float() * scale, dtype), scale.reciprocal())


def quantize_blocks(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantized:
    """Quantise `x`, [rows, columns] in bfloat16 or float32, with a scale per block; edge blocks may be smaller."""
    (rows, columns), (high, wide) = x.shape, block
    padded = F.pad(x.float(), (0, -columns % wide, 0, -rows % high))
    tiles = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    power_of_2 = os.environ.get(BLOCK_FP32) != "1"
    scale = scale_from_amax(tiles.abs().amax((1, 3)), dtype, torch.finfo(x.dtype).max, power_of_2)
    values = cast((tiles * scale[:, None, :, None]).view(padded.shape)[:rows, :columns], dtype)
    return Quantized(values, scale.reciprocal(), block)
