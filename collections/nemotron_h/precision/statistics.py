"""Statistics of an operand's cast to float8: its largest magnitude, and the shares that underflow and saturate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.precision.emulation import RECIPES
from nemotron_h.precision.scaling import E4M3


@dataclass(frozen=True)
class CastStatistics:
    """Counts of one operand, of one cast or of several added up.

    Attributes:
        amax: largest magnitude; infinite or NaN where a value is.
        nonzero: values that are not zero before the cast.
        underflowed: of those, the ones that the cast makes zero.
        saturated: of those, the ones that the cast makes the format's largest value. With one scale per tensor amax is
            one of them; scales of blocks, powers of 2, may leave room above it.
        clipped: of the saturated, those beyond what rounding takes there: overflow. Current scaling has none, as it
            scales amax to the largest value, unless a value is not finite.
    """

    amax: float
    nonzero: int
    underflowed: int
    saturated: int
    clipped: int

    def __add__(self, other: CastStatistics) -> CastStatistics:
        return CastStatistics(
            math.nan if math.isnan(self.amax + other.amax) else max(self.amax, other.amax),
            self.nonzero + other.nonzero,
            self.underflowed + other.underflowed,
            self.saturated + other.saturated,
            self.clipped + other.clipped,
        )

    def shares(self) -> dict[str, float]:
        """Return `underflow`, `saturation` and `overflow` as shares of the values that are not zero."""
        of = max(self.nonzero, 1)
        return {
            "underflow": self.underflowed / of,
            "saturation": self.saturated / of,
            "overflow": self.clipped / of,
        }


@torch.no_grad()
def cast_counts(x: Tensor, operand: str, recipe: str) -> Tensor:
    """Quantise an operand as `recipe` does and count; a device is not waited for.

    Args:
        x: bfloat16 or float32 [..., columns].
        operand: `activation`, `weight` or `gradient`.
        recipe: `fp8_current_scaling` or `fp8_blockwise`. Blockwise activations and gradients are cast twice; counted is
            the cast for the first matmul that reads them (output, and gradient of the input).
    Returns:
        float64 [5], the fields of `CastStatistics` in order; `as_statistics` reads it.
    Errors:
        KeyError: another recipe.
    """
    chosen = RECIPES[recipe]
    dtype = chosen.gradient_dtype if operand == "gradient" else E4M3
    rows = x.detach().reshape(-1, x.shape[-1])
    cast, _ = getattr(chosen, operand)(rows, dtype)
    size, read = rows.abs().float(), cast.dequantize().abs()
    format_ = torch.finfo(dtype)
    nonzero = size > 0
    bits = cast.values.view(torch.uint8) & 0x7F
    saturated = nonzero & (bits == torch.tensor(format_.max).to(dtype).view(torch.uint8).item())
    # a saturated value may be half a step (1 / (2 mantissa)) larger; 2 ** floor(log2(max)) * eps is that step
    half_step = format_.eps * 2.0 ** torch.tensor(format_.max).log2().floor().item() / 2
    clipped = saturated & (size > read * (1 + half_step / format_.max))
    amax = size.amax() if size.numel() else size.new_zeros(())
    counts = [mask.sum() for mask in (nonzero, nonzero & (bits == 0), saturated, clipped)]
    return torch.stack([amax.double(), *(count.double() for count in counts)])


def as_statistics(counts: Tensor) -> CastStatistics:
    """Return the statistics of `cast_counts`' counts; waits for the device."""
    amax, *rest = counts.tolist()
    return CastStatistics(amax, *(int(count) for count in rest))
