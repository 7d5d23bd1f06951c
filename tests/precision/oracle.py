"""FP8 linear layers in numpy and float64, from the formats' definitions; shares no code with the package."""

from __future__ import annotations

import numpy as np

#: format -> exponent bits, mantissa bits, bias, largest finite value
FORMATS = {"e4m3": (4, 3, 7, 448.0), "e5m2": (5, 2, 15, 57344.0)}


def magnitudes(name: str) -> np.ndarray:
    """Every finite non-negative value of a format, ascending; its index is its bit pattern."""
    exponent_bits, mantissa_bits, bias, largest = FORMATS[name]
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            power = max(exponent, 1) - bias
            values.append(np.ldexp(fraction + (exponent > 0), power))
    return np.array([v for v in values if v <= largest])


def round_to(x: np.ndarray, name: str) -> np.ndarray:
    """The nearest value of the format, ties to the even bit pattern, saturating."""
    grid = magnitudes(name)
    size = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    above = np.searchsorted(grid, size)
    below = np.maximum(above - 1, 0)
    up, down = grid[above] - size, size - grid[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return np.copysign(np.where(take_up, grid[above], grid[below]), x)


def scale(amax: float, name: str, power_of_2: bool) -> np.float32:
    """The factor before the cast."""
    if amax == 0 or not np.isfinite(amax):
        return np.float32(1)
    factor = np.float32(FORMATS[name][3]) / np.float32(amax)
    if power_of_2:
        factor = np.float32(2.0 ** np.floor(np.log2(np.float64(factor))))
    return factor


def quantized(
    x: np.ndarray, name: str, block: tuple[int, int] | None = None, power_of_2: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Dequantised values in float64, and the inverse scale of each block."""
    rows, columns = x.shape
    high, wide = block or x.shape
    out = np.empty(x.shape, np.float64)
    inverse = np.empty((-(-rows // high), -(-columns // wide)), np.float32)
    for i in range(inverse.shape[0]):
        for j in range(inverse.shape[1]):
            part = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            factor = scale(np.abs(x[part]).max(), name, power_of_2)
            inverse[i, j] = np.float32(1) / factor
            out[part] = round_to(x[part].astype(np.float32) * factor, name) * np.float64(inverse[i, j])
    return out, inverse


def linear(recipe: str, x: np.ndarray, weight: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """Output, input gradient and weight gradient; all operands quantised, all sums in float64."""
    if recipe == "fp8_current_scaling":
        qx, qw, qdy = quantized(x, "e4m3")[0], quantized(weight, "e4m3")[0], quantized(dy, "e5m2")[0]
        return {"y": qx @ qw.T, "dx": qdy @ qw, "dw": qdy.T @ qx}

    def blocks(t: np.ndarray, high: int, wide: int) -> np.ndarray:
        return quantized(t, "e4m3", (high, wide), power_of_2=True)[0]

    qw = blocks(weight, 128, 128)
    return {
        "y": blocks(x, 1, 128) @ qw.T,
        "dx": blocks(dy, 1, 128) @ qw,
        "dw": blocks(dy, 128, 1).T @ blocks(x, 128, 1),
    }
