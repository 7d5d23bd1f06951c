"""Frequencies of rotary positions (Su et al. 2021, arXiv 2104.09864), plain or scaled as Llama 3.1's.

With base b and n rotated channels, f_i = b^(-2 i / n). Scaled by F over an original length L, with low and high
frequency factors l and h, and the waves w_i = 2 pi / f_i:

    s_i = clamp((L / w_i - l) / (h - l), 0, 1)
    f'_i = (1 - s_i) f_i / F + s_i f_i
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotary_frequencies(
    channels: int,
    base: int,
    scaling: tuple[float, float, float, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the angle per position of each pair of channels, [channels / 2].

    Args:
        channels: of a head that are rotated.
        scaling: F, l, h and L; None leaves the frequencies as they are.
        dtype: float32, as training computes angles whatever the model's dtype; tests take float64.
    """
    exponents = torch.arange(0, channels, 2, dtype=dtype, device=device) / channels
    frequencies = 1.0 / base**exponents
    if scaling is None:
        return frequencies
    factor, low, high, length = scaling
    turns = length * frequencies / (2 * math.pi)  # of each pair over the original length: L / w
    stays = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - stays) * frequencies / factor + stays * frequencies
