"""Mamba-2 over a window of a few tokens on a GPU: one kernel for the convolution, one for the scan, and as many to
advance the states.

The signatures are those of `ops.ssd_window` and of the window's convolution in `ops.conv1d`, which are some twenty
kernels each: with so few tokens starting them is all that takes time. How many tokens stay is read on the device, so a
CUDA graph of an advance serves any number.

Axes: b batch, w tokens of the window, l the last of them, h heads (g groups), p channels of a head (P at a time),
n state (padded to N), c channels of the convolution (BLOCK at a time), k its taps (WIDTH).

The scan goes token by token with the state in registers, as a step does:

    S_i = exp(dt_i A) S_{i-1} + dt_i x_i B_i^T      y_i = S_i C_i + D x_i      dt_i = softplus(dt'_i + dt_bias)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: ours: channels that a program of the convolution takes
CHANNELS = 256
#: ours: rows of a head's state that a program takes; with 128 columns, 16 numbers in each of 128 threads
ROWS = 16


@triton.jit(do_not_specialize=["first"])
def _conv_kernel(
    state_ptr,
    inputs_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    first,
    channels,
    state_batch,
    inputs_batch,
    inputs_token,
    weight_channel,
    weight_tap,
    out_batch,
    out_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    z = tl.load(bias_ptr + c, mask=inside, other=0.0).to(EXACT)
    for k in tl.static_range(WIDTH):
        place = first + token + k - (WIDTH - 1)  # in the window; before it, in the state
        old = tl.load(
            state_ptr + batch * state_batch + (place + WIDTH - 1) * channels + c, mask=inside & (place < 0), other=0.0
        )
        new = tl.load(
            inputs_ptr + batch * inputs_batch + place * inputs_token + c, mask=inside & (place >= 0), other=0.0
        )
        tap = tl.load(weight_ptr + c * weight_channel + k * weight_tap, mask=inside, other=0.0)
        z += tl.where(place < 0, old, new).to(EXACT) * tap.to(EXACT)
    y = z / (1 + tl.exp(-z))
    tl.store(out_ptr + batch * out_batch + token * out_token + c, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _shift_kernel(
    state_ptr,
    inputs_ptr,
    counts_ptr,
    channels,
    state_batch,
    inputs_batch,
    inputs_token,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    count = tl.load(counts_ptr + batch).to(tl.int32)
    own = state_ptr + batch * state_batch + c
    for k in tl.static_range(WIDTH - 1):  # a row is written when only later ones are still to be read
        place = count + k - (WIDTH - 1)
        old = tl.load(own + (place + WIDTH - 1) * channels, mask=inside & (place < 0), other=0.0)
        new = tl.load(
            inputs_ptr + batch * inputs_batch + place * inputs_token + c, mask=inside & (place >= 0), other=0.0
        )
        tl.store(own + k * channels, tl.where(place < 0, old, new), mask=inside)


@triton.jit(do_not_specialize=["first", "window"])
def _scan_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    bias_ptr,
    counts_ptr,
    out_ptr,
    first,
    window,
    head_dim,
    states,
    heads_of_group,
    state_batch,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    b_batch,
    b_token,
    c_batch,
    c_token,
    out_batch,
    out_token,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    group = head // heads_of_group
    p = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    exact = state_ptr.dtype.element_ty
    end = window
    if ADVANCE:
        end = tl.load(counts_ptr + batch).to(tl.int32)

    at = state_ptr + batch * state_batch + (head * head_dim + p)[:, None] * states + n[None, :]
    inside = (p < head_dim)[:, None] & (n < states)[None, :]
    state = tl.load(at, mask=inside, other=0.0)  # [p, n]
    a = tl.load(a_ptr + head).to(exact)
    bias = tl.load(bias_ptr + head).to(exact)
    d = tl.load(d_ptr + head).to(exact)
    for i in range(end):
        raw = tl.load(dt_ptr + batch * dt_batch + i * dt_token + head).to(exact) + bias
        # log(1 + e) of a small e by what rounding leaves of it
        e = tl.exp(tl.minimum(raw, 20.0))
        near = 1 + e
        dt = tl.where(raw > 20.0, raw, tl.where(near == 1, e, tl.log(near) * (e / tl.where(near == 1, 1.0, near - 1))))
        x_at = x_ptr + batch * x_batch + i * x_token + head * head_dim + p
        x = tl.load(x_at, mask=p < head_dim, other=0.0).to(exact)
        b = tl.load(b_ptr + batch * b_batch + i * b_token + group * states + n, mask=n < states, other=0.0).to(exact)
        state = state * tl.exp(dt * a) + (dt * x)[:, None] * b[None, :]
        if not ADVANCE:  # noqa: SIM102 -- known when the kernel is compiled, the other is not
            if i >= first:
                c_at = c_ptr + batch * c_batch + (i - first) * c_token + group * states + n
                c = tl.load(c_at, mask=n < states, other=0.0).to(exact)
                y = tl.sum(state * c[None, :], 1) + d * x
                out_at = out_ptr + batch * out_batch + (i - first) * out_token + head * head_dim + p
                tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=p < head_dim)
    if ADVANCE:
        tl.store(at, state, mask=inside)


def conv1d_window(state: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Convolve as `ops.conv1d.causal_conv1d_window`; channels lie side by side in all of them."""
    batch, length, channels = out.shape
    _conv_kernel[(batch, length, triton.cdiv(channels, CHANNELS))](
        state,
        inputs,
        weight,
        bias,
        out,
        inputs.shape[1] - length,
        channels,
        state.stride(0),
        *inputs.stride()[:2],
        *weight.stride(),
        *out.stride()[:2],
        WIDTH=weight.shape[1],
        BLOCK=CHANNELS,
        EXACT=tl.float64 if inputs.dtype == torch.float64 else tl.float32,
    )


def conv1d_advance(state: Tensor, inputs: Tensor, counts: Tensor) -> None:
    """Advance as `ops.conv1d.causal_conv1d_advance`, likewise."""
    batch, halo, channels = state.shape
    _shift_kernel[(batch, triton.cdiv(channels, CHANNELS))](
        state,
        inputs,
        counts,
        channels,
        state.stride(0),
        *inputs.stride()[:2],
        WIDTH=halo + 1,
        BLOCK=CHANNELS,
    )


def ssd_window(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """Scan as `ops.ssd_window.ssd_window`; a token's heads lie side by side in all of them, as its groups do."""
    out = torch.empty(x.shape[0], C.shape[1], *x.shape[2:], dtype=x.dtype, device=x.device)
    _scan(state, x, dt, A, B, C, D, dt_bias, None, out)
    return out


def ssd_advance(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, counts: Tensor) -> None:
    """Advance as `ops.ssd_window.ssd_advance`, likewise."""
    _scan(state, x, dt, A, B, B, A, dt_bias, counts, None)


def _scan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    out: Tensor | None,
) -> None:
    """Run the scan for the outputs of the tokens that C is of, or over `counts` tokens of the state."""
    batch, window, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    target = x if out is None else out
    _scan_kernel[(batch, heads, triton.cdiv(head_dim, ROWS))](
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        counts,
        target,
        window - C.shape[1],
        window,
        head_dim,
        states,
        heads // groups,
        state.stride(0),
        *x.stride()[:2],
        *dt.stride()[:2],
        *B.stride()[:2],
        *C.stride()[:2],
        *target.stride()[:2],
        ROWS=ROWS,
        COLUMNS=triton.next_power_of_2(states),
        ADVANCE=counts is not None,
    )
