"""Operations over a few tokens after a state equal those of one token at a time; a state goes on over some of them."""

from __future__ import annotations

import pytest
import torch
from ops_oracle import relative_error

from nemotron_h.ops.attention import attention_step, attention_window, cache_append
from nemotron_h.ops.conv1d import causal_conv1d_advance, causal_conv1d_step, causal_conv1d_window
from nemotron_h.ops.ssd import ssd_step
from nemotron_h.ops.ssd_window import ssd_advance, ssd_window

WINDOW = 6
COUNTS = [0, 1, 4, WINDOW]
BATCH = len(COUNTS)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("speed", [1.0, 300.0])  # decays that leave something of the state, and none
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_scan(groups: int, speed: float, dtype: torch.dtype) -> None:
    heads, head_dim, size = 4, 8, 5
    rng = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=rng)

    state, x = values(BATCH, heads, head_dim, size), values(BATCH, WINDOW, heads, head_dim)
    B, C = (values(BATCH, WINDOW, groups, size) for _ in range(2))
    dt, A, D, dt_bias = values(BATCH, WINDOW, heads), -speed * values(heads).exp(), values(heads), values(heads)
    first = state.clone()
    expected, after = [], [state.clone()]
    for i in range(WINDOW):
        stepped = after[-1].clone()
        expected.append(ssd_step(stepped, x[:, i], dt[:, i], A, B[:, i], C[:, i], D, dt_bias))
        after.append(stepped)
    for begin, end in ((0, WINDOW), (0, 2), (2, 3), (3, WINDOW)):
        actual = ssd_window(state, x[:, :end], dt[:, :end], A, B[:, :end], C[:, begin:end], D, dt_bias)
        assert relative_error(actual, torch.stack(expected[begin:end], 1)) < EXACT[dtype]
    assert torch.equal(state, first)
    ssd_advance(state, x, dt, A, B, dt_bias, torch.tensor(COUNTS))
    for row, count in enumerate(COUNTS):
        assert relative_error(state[row], after[count][row]) < EXACT[dtype], count
    assert torch.equal(state[0], first[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_convolution(dtype: torch.dtype) -> None:
    channels, width = 7, 4
    rng = torch.Generator().manual_seed(0)
    taps = torch.randn(BATCH, width - 1 + WINDOW, channels, generator=rng).to(dtype)
    weight, bias = torch.randn(channels, width, generator=rng).to(dtype), torch.randn(channels, generator=rng).to(dtype)
    first, inputs = taps[:, : width - 1].clone(), taps[:, width - 1 :]
    state, expected, after = first.clone(), [], [first.clone()]
    for i in range(WINDOW):
        expected.append(causal_conv1d_step(state, inputs[:, i], weight, bias))
        after.append(state.clone())
    for length in (WINDOW, 2):
        actual = torch.empty_like(inputs[:, :length])
        causal_conv1d_window(first, inputs, weight, bias, actual)
        error = relative_error(actual, torch.stack(expected[WINDOW - length :], 1))
        assert error < (1e-12 if dtype == torch.float64 else 1e-2)
    causal_conv1d_advance(first, inputs, torch.tensor(COUNTS))
    for row, count in enumerate(COUNTS):
        assert torch.equal(first[row], after[count][row])


@pytest.mark.parametrize("heads", [1, 3])
def test_attention(heads: int) -> None:
    groups, dim, capacity = 2, 8, 40
    rng = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    q, key, value = values(BATCH, WINDOW, groups, heads, dim), *(values(BATCH, WINDOW, groups, dim) for _ in "kv")
    keys, values_ = (values(BATCH, groups, capacity, dim) for _ in "kv")
    positions = torch.tensor([0, 3, 20, 34])
    one_by_one, expected = [keys.clone(), values_.clone()], []
    for i in range(WINDOW):
        cache_append(*one_by_one, key[:, i : i + 1], value[:, i : i + 1], positions + i)
        lengths = positions + i + 1
        expected.append(attention_step(q[:, i], *one_by_one, lengths, int(lengths.max()), True))
    cache_append(keys, values_, key, value, positions)
    assert torch.equal(keys, one_by_one[0])
    assert torch.equal(values_, one_by_one[1])
    actual = attention_window(q, keys, values_, positions + 1, int(positions.max()) + WINDOW)
    assert relative_error(actual, torch.stack(expected, 1)) < 1e-12
