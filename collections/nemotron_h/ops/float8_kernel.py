"""Triton kernels for matrices in FP8: a few rows times weights widened as they are read, and rows rounded to FP8.

Axes: m rows, n outputs, k inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: ours, the fastest of those tried on an H200: outputs of a program, inputs at a time, warps and stages
OUTPUTS, INPUTS, WARPS, STAGES = 64, 128, 4, 3
#: ours: programs that keep an H200's 132 multiprocessors busy, and the least inputs that one adds up
PROGRAMS, LEAST_INPUTS = 512, 512
#: the largest number of E4M3
LARGEST = 448.0
#: ours: activations of up to 4 million are times this within float16, where one instruction widens two weights;
#: what is lost is below 2e-6
SHRINK = 2.0**-6


@triton.jit
def _few_rows_kernel(
    x, values, scales, y, x_m, rows, N, K, share,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SPLIT: tl.constexpr, SHRINK: tl.constexpr,
):  # fmt: skip
    """Write the rows' outputs of a few weights over a share of the inputs, summed in float32: all, or a part of all."""
    n, m, k = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    there, inside_n = m[None, :] < rows, n[:, None] < N
    begin = tl.program_id(1) * share
    of_values = values + n[:, None].to(tl.int64) * K + k[None, :]
    of_x = x + m[None, :].to(tl.int64) * x_m + k[:, None]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(begin, min(begin + share, K), INPUTS):
        inside = first + k < K
        weights = tl.load(of_values + first, mask=inside[None, :] & inside_n, other=0.0)
        inputs = tl.load(of_x + first, mask=there & inside[:, None], other=0.0)
        inputs = (inputs.to(tl.float32) * SHRINK).to(tl.float16)
        total = tl.dot(weights.to(tl.float16), inputs, total)  # [n, k] @ [k, m]
    total *= tl.load(scales + n, mask=n < N, other=0.0)[:, None] / SHRINK
    at = tl.program_id(1) * rows * N if SPLIT else 0
    tl.store(y + at + m[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=there & inside_n)


@triton.jit
def _sum_kernel(parts, y, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit
def _round_rows_kernel(x, values, scales, x_m, K, LARGEST: tl.constexpr, INPUTS: tl.constexpr):
    """Scale a row so that its largest number is that of E4M3, and round it."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, INPUTS)
    largest = tl.zeros((INPUTS,), tl.float32)
    for first in range(0, K, INPUTS):
        each = tl.load(x + row * x_m + first + k, mask=first + k < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(each.to(tl.float32)))
    scale = tl.maximum(tl.max(largest, axis=0), 1e-30) / LARGEST
    tl.store(scales + row, scale)
    for first in range(0, K, INPUTS):
        each = tl.load(x + row * x_m + first + k, mask=first + k < K, other=0.0).to(tl.float32) / scale
        tl.store(values + row * K + first + k, each.to(values.dtype.element_ty), mask=first + k < K)


def few_rows(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Return x times weights [n, k] in E4M3 with a float32 scale [n] for each output.

    Args:
        x: [m, k], dense rows.

    Returns:
        [m, n] in the dtype of x.
    """
    (rows, inputs), outputs = x.shape, values.shape[0]
    programs = triton.cdiv(outputs, OUTPUTS)
    parts = 1
    while programs * parts < PROGRAMS and inputs >= 2 * parts * LEAST_INPUTS:
        parts *= 2
    share = triton.cdiv(inputs, parts * INPUTS) * INPUTS
    y = x.new_empty(rows, outputs)
    out = y if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    _few_rows_kernel[(programs, parts)](
        x, values, scales, out, x.stride(0), rows, outputs, inputs, share,
        ROWS=max(16, triton.next_power_of_2(rows)), OUTPUTS=OUTPUTS, INPUTS=INPUTS, SPLIT=parts > 1, SHRINK=SHRINK,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        _sum_kernel[(triton.cdiv(y.numel(), 512),)](out, y, y.numel(), PARTS=parts, BLOCK=512, num_warps=4)
    return y


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [m, k] in E4M3 and their float32 scales [m, 1]."""
    rows, inputs = x.shape
    values = torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(inputs), 4096)
    _round_rows_kernel[(rows,)](x, values, scales, x.stride(0), inputs, LARGEST=LARGEST, INPUTS=block, num_warps=8)
    return values, scales
