"""Mamba-2's scan over whole sequences on a GPU, forward and backward, as four Triton kernels.

Axes: b batch, l length in s chunks of c tokens, h heads (g groups of r), p channels of a head, n state. i and j are
tokens of a chunk.

Per head and chunk, with `cum` the running sum of `dt A`, `E` its last value, `G = C B^T` of the group, and `S` the
state before the chunk (`nemotron_h.ops.ssd` has the recurrence that this comes from):

    y_i = sum_{j<=i} G_ij exp(cum_i - cum_j) dt_j x_j + exp(cum_i) C_i S + D x_i
    S'  = exp(E) S + sum_j exp(E - cum_j) dt_j B_j x_j^T

One pass over the chunks writes S of each in the dtype of x; the same kernel writes their gradients from the last chunk
to the first. All else knows one chunk alone: a program takes some heads of a group, so that G and the gradients of B
and C, which they share, stay on the chip. mamba-ssm does the same in fifteen kernels, which write G, its gradient and
float32 states to memory in between. Sums have a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: ours: tokens of a chunk, forward and backward
CHUNK = 64
#: ours, the fastest of those tried on an H200: warps and stages, for heads of up to 64 channels, and of more
NARROW = {"states": (4, 3), "outputs": (4, 3), "head gradients": (4, 2), "shared gradients": (8, 3)}
WIDE = {"states": (8, 3), "outputs": (8, 3), "head gradients": (8, 1), "shared gradients": (8, 1)}
#: bytes of shared memory that a program of these may take; an A100 has 163 KiB, an H100 227
SHARED_MEMORY = 170 * 1024
#: the most channels of a head, and sizes of a state, that fit on the chip
WIDEST = 128
#: ours: programs that keep an H200's 132 multiprocessors busy
PROGRAMS = 256


@triton.jit
def _sums_kernel(
    dt, bias, A, seq_idx, steps, sums, dt_b, dt_l, dt_h, seq_b, length, heads, chunks,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Write dt, and the running sums of dt A that begin anew with each chunk and document, float32 [b, h, s * c]."""
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, head = tl.arange(0, TOKENS), tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    rows = (chunk * TOKENS + token).to(tl.int64)
    there = (rows[:, None] < length) & (head[None, :] < heads)
    value = tl.load(dt + batch * dt_b + rows[:, None] * dt_l + head[None, :] * dt_h, mask=there, other=0.0)
    value = value.to(tl.float32)
    if BIAS:
        value += tl.load(bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:  # log(1 + e) with the digits of a small e
        e = tl.exp(tl.minimum(value, 20.0))
        one = 1.0 + e
        small = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
        value = tl.where(value > 20.0, value, small)
    value = tl.where(there, value, 0.0)
    exponents = value * tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    if DOCUMENTS:
        documents, _, _ = _documents(seq_idx + batch * seq_b, chunk * TOKENS, length, TOKENS)
        adds = (documents[:, None] == documents[None, :]) & (token[None, :] <= token[:, None])
        total = tl.dot(adds.to(tl.float32), exponents, input_precision="ieee")
    else:
        total = tl.cumsum(exponents, axis=0)
    at = (batch * heads + head[None, :]) * chunks * TOKENS + rows[:, None]
    tl.store(steps + at, value, mask=head[None, :] < heads)
    tl.store(sums + at, total, mask=head[None, :] < heads)


@triton.jit
def _documents(seq_idx, first, length, TOKENS: tl.constexpr):
    """Return the documents of a chunk's tokens, [c], of its last token, and of the token before it."""
    rows = tl.minimum(first + tl.arange(0, TOKENS), length - 1)
    last = tl.load(seq_idx + tl.minimum(first + TOKENS, length) - 1)
    return tl.load(seq_idx + rows), last, tl.load(seq_idx + tl.maximum(first - 1, 0))


@triton.jit
def _states_kernel(
    left, right, steps, sums, seq_idx, initial, states, final,
    left_b, left_l, left_g, right_b, right_l, right_h, seq_b,
    length, heads, chunks, HEADS_OF_GROUP, P, N,
    DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
    REVERSE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the state before each chunk, of B and x; or reversed the gradient of that behind it, of C and y's."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    token = tl.arange(0, TOKENS)
    left += batch.to(tl.int64) * left_b + (head // HEADS_OF_GROUP) * left_g
    right += batch.to(tl.int64) * right_b + head * right_h
    line = (batch.to(tl.int64) * heads + head) * chunks * TOKENS
    place = n[:, None] * P + p[None, :]
    inside = (n[:, None] < N) & (p[None, :] < P)
    own = (batch.to(tl.int64) * chunks * heads + head) * N * P
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if INITIAL:  # [p, n], as the recurrence has it
        at = (batch.to(tl.int64) * heads + head) * N * P + p[None, :] * N + n[:, None]
        state = tl.load(initial + at, mask=inside, other=0.0).to(tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step if REVERSE else step
        first = chunk * TOKENS
        tl.store(states + own + chunk.to(tl.int64) * heads * N * P + place, state.to(states.dtype.element_ty), inside)
        total, end = tl.load(sums + line + first + token), tl.load(sums + line + first + TOKENS - 1)
        documents, last, before = token, 0, 0
        if DOCUMENTS:
            documents, last, before = _documents(seq_idx + batch.to(tl.int64) * seq_b, first, length, TOKENS)
        weights = tl.exp(total) if REVERSE else tl.load(steps + line + first + token) * tl.exp(end - total)
        factor = tl.exp(end)
        if DOCUMENTS:
            weights = tl.where(documents == (before if REVERSE else last), weights, 0.0)
            factor = tl.where(last == before, factor, 0.0)
        rows = (first + token).to(tl.int64)
        there = rows[:, None] < length
        of_state = tl.load(left + rows[:, None] * left_l + n[None, :], mask=there & (n[None, :] < N), other=0.0)
        of_head = tl.load(right + rows[:, None] * right_l + p[None, :], mask=there & (p[None, :] < P), other=0.0)
        scaled = (of_head.to(tl.float32) * weights[:, None]).to(of_state.dtype)
        state = state * factor + tl.dot(tl.trans(of_state), scaled, input_precision="ieee")  # [n, c] @ [c, p]
    if FINAL:
        at = (batch.to(tl.int64) * heads + head) * N * P + p[None, :] * N + n[:, None]
        tl.store(final + at, state, inside)


@triton.jit
def _outputs_kernel(
    x, steps, sums, B, C, D, seq_idx, states, y,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, seq_b,
    length, heads, chunks, P, N, HEADS_OF_GROUP, SPLITS,
    SKIP: tl.constexpr, DOCUMENTS: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write y of a chunk and some heads of a group."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group = tl.program_id(1) // SPLITS
    begin = group * HEADS_OF_GROUP + (tl.program_id(1) % SPLITS) * HEADS
    token, n, p = tl.arange(0, TOKENS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    first = chunk * TOKENS
    rows = (first + token).to(tl.int64)
    there = rows[:, None] < length
    wide = there & (n[None, :] < N)
    keys = tl.load(B + batch * B_b + group * B_g + rows[:, None] * B_l + n[None, :], mask=wide, other=0.0)
    queries = tl.load(C + batch * C_b + group * C_g + rows[:, None] * C_l + n[None, :], mask=wide, other=0.0)
    gram = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [i, j]
    mask = token[None, :] <= token[:, None]
    documents, _last, before = token, 0, 0
    if DOCUMENTS:
        documents, _last, before = _documents(seq_idx + batch * seq_b, first, length, TOKENS)
        mask = mask & (documents[:, None] == documents[None, :])
    place = n[:, None] * P + p[None, :]
    for k in range(HEADS):
        head = begin + k
        line = (batch * heads + head) * chunks * TOKENS + first + token
        dts, total = tl.load(steps + line), tl.load(sums + line)
        decay = tl.exp(tl.where(mask, total[:, None] - total[None, :], -float("inf")))
        of_head = tl.load(
            x + batch * x_b + head * x_h + rows[:, None] * x_l + p[None, :], mask=there & (p[None, :] < P), other=0.0
        )
        scores = (gram * decay * dts[None, :]).to(of_head.dtype)
        own = ((batch * chunks + chunk) * heads + head) * N * P
        state = tl.load(states + own + place, mask=(n[:, None] < N) & (p[None, :] < P), other=0.0)
        into = tl.exp(total)
        if DOCUMENTS:
            into = tl.where(documents == before, into, 0.0)
        out = tl.dot(queries, state, input_precision="ieee") * into[:, None]
        out = tl.dot(scores, of_head, out, input_precision="ieee")
        if SKIP:
            out += tl.load(D + head).to(tl.float32) * of_head.to(tl.float32)
        tl.store(
            y + ((batch * length + rows[:, None]) * heads + head) * P + p[None, :],
            out.to(y.dtype.element_ty),
            mask=there & (p[None, :] < P),
        )


@triton.jit
def _head_gradients_kernel(
    dy, x, steps, sums, A, B, C, D, seq_idx, states, dstates, dx, ddt, sums_out,
    dy_b, dy_l, dy_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, seq_b,
    dx_b, dx_l, dx_h, ddt_b, ddt_l, ddt_h,
    length, heads, chunks, P, N, HEADS_OF_GROUP, SPLITS, sums_k,
    SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, DOCUMENTS: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradients of x and dt, and the sums of those of A, the bias and D, of a chunk and some heads."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    begin = group * HEADS_OF_GROUP + split * HEADS
    token, n, p = tl.arange(0, TOKENS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    first = chunk * TOKENS
    rows = first.to(tl.int64)  # offsets within a chunk fit in 32 bits
    there = first + token < length
    wide, narrow = there[:, None] & (n[None, :] < N), there[:, None] & (p[None, :] < P)
    column = token[:, None]
    keys = tl.load(B + batch * B_b + group * B_g + rows * B_l + (column * B_l + n[None, :]), mask=wide, other=0.0)
    queries = tl.load(C + batch * C_b + group * C_g + rows * C_l + (column * C_l + n[None, :]), mask=wide, other=0.0)
    gram = tl.dot(keys, tl.trans(queries), input_precision="ieee")  # [j, i], as all matrices of pairs here
    mask = token[None, :] >= token[:, None]
    documents, last, before = token, 0, 0
    if DOCUMENTS:
        documents, last, before = _documents(seq_idx + batch * seq_b, first, length, TOKENS)
        mask = mask & (documents[:, None] == documents[None, :])
    place = n[:, None] * P + p[None, :]
    whole = (n[:, None] < N) & (p[None, :] < P)
    for k in range(HEADS):
        head = begin + k
        line = (batch * heads + head) * chunks * TOKENS + first
        dts, total = tl.load(steps + line + token), tl.load(sums + line + token)
        end = tl.load(sums + line + TOKENS - 1)
        into, out_of, through = tl.exp(total), tl.exp(end - total), tl.exp(end)
        if DOCUMENTS:
            into = tl.where(documents == before, into, 0.0)
            out_of = tl.where(documents == last, out_of, 0.0)
            through = tl.where(last == before, through, 0.0)
        at = x + batch * x_b + head * x_h + rows * x_l
        of_head = tl.load(at + (column * x_l + p[None, :]), mask=narrow, other=0.0)
        at = dy + batch * dy_b + head * dy_h + rows * dy_l
        of_output = tl.load(at + (column * dy_l + p[None, :]), mask=narrow, other=0.0)
        own = ((batch * chunks + chunk) * heads + head) * N * P

        decay = tl.exp(tl.where(mask, total[None, :] - total[:, None], -float("inf")))
        weighted = decay * dts[:, None] * tl.dot(of_head, tl.trans(of_output), input_precision="ieee")
        pairs = tl.where(token[None, :] > token[:, None], gram * weighted, 0.0)  # what cum_i - cum_j is worth
        of_sums = tl.sum(pairs, axis=0) - tl.sum(pairs, axis=1)
        du = tl.dot((gram * decay).to(of_output.dtype), of_output, input_precision="ieee")  # gradient of dt x, [j, p]

        dstate = tl.load(dstates + own + place, mask=whole, other=0.0)
        passed = tl.dot(keys, dstate, input_precision="ieee") * out_of[:, None]  # [j, p]
        left = tl.sum(passed * of_head.to(tl.float32), axis=1) * dts  # of exp(E - cum_j), [j]
        du += passed
        of_steps = tl.sum(du * of_head.to(tl.float32), axis=1)
        dhead = du * dts[:, None]
        if SKIP:
            dhead += tl.load(D + head).to(tl.float32) * of_output.to(tl.float32)
        at = dx + batch * dx_b + head * dx_h + rows * dx_l
        tl.store(at + (column * dx_l + p[None, :]), dhead.to(dx.dtype.element_ty), narrow)

        state = tl.load(states + own + place, mask=whole, other=0.0)
        of_through = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1), axis=0) * through
        entered = tl.dot(queries, state, input_precision="ieee") * of_output.to(tl.float32)  # [i, p]
        of_sums += tl.sum(entered, axis=1) * into

        if DOCUMENTS:  # another document's sums are zero, but not their rounding
            later = tl.where(mask, of_sums[None, :], 0.0)  # [k, i]
            dexponents = tl.sum(later, axis=1)
        else:
            dexponents = tl.cumsum(of_sums, axis=0, reverse=True)
        dexponents += tl.cumsum(left, axis=0) - left + of_through
        draw = of_steps + tl.load(A + head).to(tl.float32) * dexponents
        if SOFTPLUS:  # 1 - exp(-dt) with the digits of a small dt
            e = tl.exp(-dts)
            draw *= tl.where(e == 1.0, dts, (1.0 - e) * (dts / tl.where(e == 1.0, 1.0, -tl.log(e))))
        draw = tl.where(there, draw, 0.0)
        at = ddt + batch * ddt_b + head * ddt_h + rows * ddt_l
        tl.store(at + token * ddt_l, draw.to(ddt.dtype.element_ty), mask=there)
        at = sums_out + (batch * chunks + chunk) * heads + head
        tl.store(at, tl.sum(dexponents * dts, axis=0))
        tl.store(at + sums_k, tl.sum(draw, axis=0))
        if SKIP:
            tl.store(at + 2 * sums_k, tl.sum(tl.sum(of_output.to(tl.float32) * of_head.to(tl.float32), axis=1), axis=0))


@triton.jit
def _shared_gradients_kernel(
    dy, x, steps, sums, B, C, seq_idx, states, dstates, dB, dC,
    dy_b, dy_l, dy_h, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, seq_b,
    dB_s, dB_b, dB_l, dB_g, dC_s, dC_b, dC_l, dC_g,
    length, heads, chunks, P, N, HEADS_OF_GROUP, SPLITS,
    DOCUMENTS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradients of B and C of a chunk, summed over some heads of a group."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    group, split = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    begin = group * HEADS_OF_GROUP + split * HEADS
    token, n, p = tl.arange(0, TOKENS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    first = chunk * TOKENS
    rows = first.to(tl.int64)  # offsets within a chunk fit in 32 bits
    there = first + token < length
    wide, narrow = there[:, None] & (n[None, :] < N), there[:, None] & (p[None, :] < P)
    column = token[:, None]
    keys = tl.load(B + batch * B_b + group * B_g + rows * B_l + (column * B_l + n[None, :]), mask=wide, other=0.0)
    queries = tl.load(C + batch * C_b + group * C_g + rows * C_l + (column * C_l + n[None, :]), mask=wide, other=0.0)
    mask = token[None, :] >= token[:, None]
    documents, last, before = token, 0, 0
    if DOCUMENTS:
        documents, last, before = _documents(seq_idx + batch * seq_b, first, length, TOKENS)
        mask = mask & (documents[:, None] == documents[None, :])
    place = n[:, None] * P + p[None, :]
    whole = (n[:, None] < N) & (p[None, :] < P)
    dgram = tl.zeros((TOKENS, TOKENS), tl.float32)  # [j, i]
    dqueries = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    dkeys = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for k in range(HEADS):
        head = begin + k
        line = (batch * heads + head) * chunks * TOKENS + first
        dts, total = tl.load(steps + line + token), tl.load(sums + line + token)
        end = tl.load(sums + line + TOKENS - 1)
        into, out_of = tl.exp(total), tl.exp(end - total)
        if DOCUMENTS:
            into = tl.where(documents == before, into, 0.0)
            out_of = tl.where(documents == last, out_of, 0.0)
        at = x + batch * x_b + head * x_h + rows * x_l
        of_head = tl.load(at + (column * x_l + p[None, :]), mask=narrow, other=0.0)
        at = dy + batch * dy_b + head * dy_h + rows * dy_l
        of_output = tl.load(at + (column * dy_l + p[None, :]), mask=narrow, other=0.0)
        own = ((batch * chunks + chunk) * heads + head) * N * P

        decay = tl.exp(tl.where(mask, total[None, :] - total[:, None], -float("inf")))
        dgram += decay * dts[:, None] * tl.dot(of_head, tl.trans(of_output), input_precision="ieee")
        dstate = tl.load(dstates + own + place, mask=whole, other=0.0)
        scaled = (of_head.to(tl.float32) * (dts * out_of)[:, None]).to(of_head.dtype)
        dkeys = tl.dot(scaled, tl.trans(dstate), dkeys, input_precision="ieee")
        state = tl.load(states + own + place, mask=whole, other=0.0)
        scaled = (of_output.to(tl.float32) * into[:, None]).to(of_output.dtype)
        dqueries = tl.dot(scaled, tl.trans(state), dqueries, input_precision="ieee")

    shared = dgram.to(keys.dtype)
    dqueries = tl.dot(tl.trans(shared), keys, dqueries, input_precision="ieee")
    dkeys = tl.dot(shared, queries, dkeys, input_precision="ieee")
    at = dC + split * dC_s + batch * dC_b + group * dC_g + rows * dC_l
    tl.store(at + (column * dC_l + n[None, :]), dqueries.to(dC.dtype.element_ty), wide)
    at = dB + split * dB_s + batch * dB_b + group * dB_g + rows * dB_l
    tl.store(at + (column * dB_l + n[None, :]), dkeys.to(dB.dtype.element_ty), wide)


def refusal(x: Tensor, B: Tensor, D: Tensor | None) -> str | None:
    """Return why the kernels cannot scan these, or None where they can: widths, dtypes and the GPU's shared memory."""
    channels, state = x.shape[3], B.shape[3]
    if max(channels, state) > WIDEST:
        return f"heads of {channels} channels and states of {state}, the widest are {WIDEST}"
    if D is not None and D.dim() != 1:
        return "a skip connection per channel"
    if not x.is_cuda:  # Triton's interpreter
        return None
    if x.element_size() != 2 or x.dtype != B.dtype:
        return f"x in {x.dtype} and B in {B.dtype}, not both in one dtype of 16 bits"
    memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return None if memory >= SHARED_MEMORY else f"{memory:,} bytes of shared memory, {SHARED_MEMORY:,} are needed"


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, *,
    dt_softplus: bool, initial_state: Tensor | None = None, seq_idx: Tensor | None = None, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan sequences; arguments as of `nemotron_h.ops.ssd.ssd_chunk_scan`, without a backward.

    Returns:
        y, [b, l, h, p] in the dtype of x, and the last state, float32 [b, h, p, n].
    """
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    s = triton.cdiv(length, chunk)
    states = x.new_empty(b, s, h, n, p)
    final = torch.empty(b, h, p, n, dtype=torch.float32, device=x.device)
    y = torch.empty(b, length, h, p, dtype=x.dtype, device=x.device)
    x, B, C = (_dense(t) for t in (x, B, C))
    documents = _dense(seq_idx) if seq_idx is not None else None
    initial = initial_state.contiguous() if initial_state is not None else None
    steps, sums = _running_sums(dt, dt_bias, A, documents, dt_softplus, s, chunk)
    _pass_states(B, x, steps, sums, documents, states, chunk, initial=initial, final=final)
    splits = _splits(b * s * g, h // g)
    _outputs_kernel[(s, g * splits, b)](
        x, steps, sums, B, C, D, documents, states, y,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], _row(documents),
        length, h, s, p, n, h // g, splits,
        SKIP=D is not None, DOCUMENTS=documents is not None, HEADS=h // g // splits,
        TOKENS=chunk, BLOCK_N=_block(n), BLOCK_P=_block(p), **_launch("outputs", p),
    )  # fmt: skip
    return y, final


def ssd_scan_gradients(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
    seq_idx: Tensor | None = None,
    dx: Tensor | None = None,
    ddt: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, dt, A, B, C, D and dt_bias of a scan that began without a state.

    Args:
        dy: gradient of y, [b, l, h, p].
        dx, ddt, dB, dC: where to write, in any strides; None makes them.
    """
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    s, r = triton.cdiv(length, chunk), h // g
    dy, x, B, C = (_dense(t) for t in (dy, x, B, C))
    documents = None if seq_idx is None else _dense(seq_idx)
    dx = torch.empty_like(x) if dx is None else dx
    ddt = torch.empty_like(dt) if ddt is None else ddt
    dB = torch.empty_like(B) if dB is None else dB
    dC = torch.empty_like(C) if dC is None else dC
    states, dstates = x.new_empty(2, b, s, h, n, p)
    steps, sums = _running_sums(dt, dt_bias, A, documents, dt_softplus, s, chunk)
    _pass_states(B, x, steps, sums, documents, states, chunk)
    _pass_states(C, dy, steps, sums, documents, dstates, chunk, reverse=True)
    splits = _splits(b * s * g, r)
    shared = (dB, dC)
    if splits > 1:  # each writes its own, to be summed in a fixed order
        shared = tuple(torch.empty(splits, b, length, g, n, dtype=torch.float32, device=x.device) for _ in range(2))
    strides = [(0, *t.stride())[-5:-1] for t in shared]
    parts = torch.empty(3, b, s, h, dtype=torch.float32, device=x.device)
    grid = s, g * splits, b
    inputs = (*dy.stride()[:3], *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], _row(documents))
    options = {"HEADS": r // splits, "TOKENS": chunk, "BLOCK_N": _block(n), "BLOCK_P": _block(p)}
    options["DOCUMENTS"] = documents is not None
    _head_gradients_kernel[grid](
        dy, x, steps, sums, A, B, C, D, documents, states, dstates, dx, ddt, parts,
        *inputs, *dx.stride()[:3], *ddt.stride(), length, h, s, p, n, r, splits, b * s * h,
        SOFTPLUS=dt_softplus, SKIP=D is not None, **options, **_launch("head gradients", p),
    )  # fmt: skip
    _shared_gradients_kernel[grid](
        dy, x, steps, sums, B, C, documents, states, dstates, *shared,
        *inputs, *strides[0], *strides[1], length, h, s, p, n, r, splits,
        **options, **_launch("shared gradients", p),
    )  # fmt: skip
    if splits > 1:
        for whole, each in zip((dB, dC), shared, strict=True):
            whole.copy_(each.sum(0))
    dA, dbias, dD = parts.sum((1, 2))
    return dx, ddt, dA, dB, dC, dD if D is not None else None, dbias if dt_bias is not None else None


def _running_sums(
    dt: Tensor, bias: Tensor | None, A: Tensor, documents: Tensor | None, softplus: bool, chunks: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return dt and the running sums of dt A within chunks and documents, float32 [b, h, s * c]."""
    b, length, h = dt.shape
    steps, sums = torch.empty(2, b, h, chunks * chunk, dtype=torch.float32, device=dt.device)
    _sums_kernel[(chunks, b, triton.cdiv(h, 16))](
        dt, bias, A, documents, steps, sums, *dt.stride(), _row(documents), length, h, chunks,
        SOFTPLUS=softplus, BIAS=bias is not None, DOCUMENTS=documents is not None, TOKENS=chunk, HEADS=16,
    )  # fmt: skip
    return steps, sums


def _pass_states(
    left: Tensor, right: Tensor, steps: Tensor, sums: Tensor, documents: Tensor | None, states: Tensor, chunk: int,
    *, initial: Tensor | None = None, final: Tensor | None = None, reverse: bool = False,
) -> None:  # fmt: skip
    """Write the state before each chunk, [b, s, h, n, p]; `final` is that behind the last. See `_states_kernel`."""
    b, s, h, n, p = states.shape
    block_n = _block(n)
    while block_n > 32 and b * h * (_block(n) // block_n) < PROGRAMS:  # the passes are as long as the sequence
        block_n //= 2
    _states_kernel[(b * h, triton.cdiv(n, block_n), 1)](
        left, right, steps, sums, documents, initial, states, final,
        *left.stride()[:3], *right.stride()[:3], _row(documents),
        right.shape[1], h, s, h // left.shape[2], p, n,
        DOCUMENTS=documents is not None, INITIAL=initial is not None, FINAL=final is not None, REVERSE=reverse,
        TOKENS=chunk, BLOCK_N=block_n, BLOCK_P=_block(p), **_launch("states", p),
    )  # fmt: skip


def _dense(t: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _row(documents: Tensor | None) -> int:
    """Return the stride of a batch's rows of documents."""
    return 0 if documents is None else documents.stride(0)


def _launch(kernel: str, channels: int) -> dict[str, int]:
    """Return warps and stages of a kernel for heads of some channels."""
    warps, stages = (NARROW if channels <= 64 else WIDE)[kernel]
    return {"num_warps": warps, "num_stages": stages}


def _block(size: int) -> int:
    """Return a power of two that holds a dimension of a matmul."""
    return max(triton.next_power_of_2(size), 16)


def _splits(programs: int, heads: int) -> int:
    """Return into how many parts the heads of a group are split, so that the GPU is busy."""
    wanted = math.ceil(PROGRAMS / programs)
    return next(parts for parts in range(1, heads + 1) if heads % parts == 0 and (parts >= wanted or parts == heads))
