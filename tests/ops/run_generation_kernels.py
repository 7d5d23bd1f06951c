"""Run our Triton kernels of generation under Triton's interpreter, and PyTorch's operations; print differences.

With TRITON_INTERPRET=1. float32 only: in the interpreter bfloat16 products are wrong. A process of its own: the
interpreter is chosen when a kernel is defined, and what the kernels ask of CUDA is put into torch here.
"""

from __future__ import annotations

import json
import sys
import types

import torch

PROCESSORS = 4
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=PROCESSORS)

from nemotron_h.ops import (  # noqa: E402
    attention,
    attention_kernel,
    conv1d,
    float8_kernel,
    float8_matrix,
    ssd_window,
    window_kernel,
)


def difference(lengths: list[int], groups: int, heads: int, dim: int, capacity: int, tokens: int = 1) -> float:
    """max |a - b| / max |b| of one step, or of a window of tokens, keys written by the kernel; beyond the lengths (of
    all tokens) lies rubbish.
    """
    rng = torch.Generator().manual_seed(0)
    batch = len(lengths)
    rows = torch.randn(batch, tokens, groups, heads + 2, dim, generator=rng)
    q, key, value = rows[..., :heads, :], rows[..., heads, :], rows[..., heads + 1, :]
    keys, values = (torch.randn(batch, groups, capacity, dim, generator=rng) for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    positions = torch.tensor(lengths) - tokens
    attention.cache_append(expected_keys, expected_values, key, value, positions)
    attention_kernel.cache_append(keys, values, key, value, positions)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    ragged = len(set(lengths)) > 1
    if tokens == 1:
        expected = attention.attention_step(q[:, 0], keys, values, positions + 1, max(lengths), ragged)
    else:
        expected = attention.attention_window(q, keys, values, positions + 1, max(lengths))
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = torch.nan
    assert attention_kernel.takes(q, keys)
    if tokens == 1:
        actual = attention_kernel.attention_step(q[:, 0], keys, values, positions + 1)
    else:
        actual = attention_kernel.attention_window(q, keys, values, positions + 1)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def convolution(channels: int, window: int, length: int) -> float:
    """Of the last tokens of a window that is part of a wider tensor, and of the states after 0 to all of its tokens."""
    rng = torch.Generator().manual_seed(1)
    batch, width = window + 1, 4
    state = torch.randn(batch, width - 1, channels, generator=rng)
    inputs = torch.randn(batch, window, channels + 3, generator=rng)[..., :channels]
    weight, bias = torch.randn(channels, width, generator=rng), torch.randn(channels, generator=rng)
    outs = [torch.full((batch, window, channels), torch.nan)[:, window - length :] for _ in range(2)]
    conv1d.causal_conv1d_window(state, inputs, weight, bias, outs[0])
    window_kernel.conv1d_window(state, inputs, weight, bias, outs[1])
    states = [state.clone(), state.clone()]
    conv1d.causal_conv1d_advance(states[0], inputs, torch.arange(batch))
    window_kernel.conv1d_advance(states[1], inputs, torch.arange(batch))
    assert torch.equal(*states)
    return relative(outs[1], outs[0])


def scan(heads: int, groups: int, head_dim: int, size: int, length: int) -> float:
    """Likewise, of the scan; step sizes of 1e-5 to 30."""
    rng = torch.Generator().manual_seed(2)
    window = 5
    batch = window + 1

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    state, x = values(batch, heads, head_dim, size), values(batch, window, heads, head_dim)
    B, C = values(batch, window, groups, size), values(batch, length, groups, size)
    dt, dt_bias = 8 * values(batch, window, heads + 2)[..., :heads], values(heads)
    A, D = -values(heads).exp() / 10, values(heads)
    expected = ssd_window.ssd_window(state, x, dt, A, B, C, D, dt_bias)
    actual = window_kernel.ssd_window(state, x, dt, A, B, C, D, dt_bias)
    states = [state.clone(), state.clone()]
    ssd_window.ssd_advance(states[0], x, dt, A, B, dt_bias, torch.arange(batch))
    window_kernel.ssd_advance(states[1], x, dt, A, B, dt_bias, torch.arange(batch))
    assert torch.equal(states[1][0], state[0])
    return max(relative(actual, expected), relative(states[1], states[0]))


def float8(rows: int, outputs: int, inputs: int, programs: int) -> float:
    """max |a - b| / max |b| of a few rows times a matrix in FP8, with inputs that float16 holds."""
    rng = torch.Generator().manual_seed(0)
    float8_kernel.OUTPUTS = float8_kernel.INPUTS = float8_kernel.LEAST_INPUTS = 32
    float8_kernel.PROGRAMS = programs
    matrix = float8_matrix.Float8Matrix.round(torch.randn(outputs, inputs, generator=rng))
    x = torch.randn(rows, inputs, generator=rng).half().float()
    expected = x.double() @ matrix.widened(torch.float64).T
    y = float8_kernel.few_rows(x, matrix.values, matrix.scales)
    return ((y - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "one sequence": difference([300], 2, 4, 16, 400),
        "ragged": difference([1, 64, 65, 200, 333], 2, 4, 32, 333),
        "one head a group": difference([70, 130], 3, 1, 16, 130),
        "many heads a group": difference([70, 130], 1, 20, 16, 130),
        "more stretches than blocks": difference([5, 700], 1, 2, 16, 1024),
        "a window": difference([5, 64, 66, 300], 2, 4, 16, 400, tokens=5),
        # of the second, a stretch begins behind the keys that the first tokens see
        "a window over many stretches": difference([9, 66, 130], 1, 3, 16, 1024, tokens=9),
        "convolution": convolution(300, 5, 5),
        "convolution of the last tokens": convolution(32, 6, 2),
        "scan": scan(4, 2, 32, 16, 5),
        "scan of the last tokens": scan(4, 4, 16, 8, 2),
        "scan of odd sizes": scan(3, 1, 20, 5, 1),
        "a row in FP8": float8(1, 48, 64, 1),
        "rows in FP8, inputs in parts": float8(3, 80, 208, 8),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
