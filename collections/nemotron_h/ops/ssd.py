"""Mamba-2's state-space scan (SSD) in plain PyTorch: chunked, with a hand-derived backward, and its one-token step.

Axes: b batch, l length, h heads (g groups of r: h = g * r), p channels of a head, n state, as in Dao and Gu 2024
(arXiv 2405.21060); s chunks of c tokens (the paper's Q). "Head layout" is [s, g, b, r, c, ...], "wide" is
[s, g, b, c, r, ...].

Per head, with ``a_t = dt_t * A`` (A < 0) and a state ``S`` [n, p]:

    S_t = exp(a_t) S_{t-1} + dt_t B_t x_t^T          y_t = C_t^T S_t + D x_t

The chunked form (section 6 there) splits the length into chunks and writes, inside one chunk, with ``cum`` the
running sum of ``a`` and ``u = dt x``; its ``L_ij`` is ``exp(cum_i - cum_j)``:

    y_i   = sum_{j<i} (C_i.B_j) exp(cum_i - cum_j) u_j  +  exp(cum_i) C_i^T S_in  +  (dt_i C_i.B_i + D) x_i
    S_out = exp(cum_end) S_in + sum_j exp(cum_end - cum_j) B_j u_j^T

so that everything but the chunk-to-chunk state is a matmul. Differences of ``cum`` are taken before the
exponential: every exponent is <= 0, so nothing overflows. The diagonal (j = i) is kept out of the matmuls: it needs
no decay, joins the skip term for free, and without it the backward's sums for ``cum`` subtract only numbers of their
own size.

Why it is laid out this way (CPU): the matmuls with the state take all heads of a group as the columns of one matrix,
C.B^T is shared by the heads of a group, and the work goes in segments whose [chunk, chunk] matrices stay in cache.
The backward keeps the inputs and the state at each segment's start, and recomputes the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# ours: measured on Zen 5 cores (heads 16 x 32, state 64): 32 takes 3/4 of the time of 64 and half that of 128. Work on
# [chunk, chunk] matrices grows with the chunk, the passes over the states shrink.
CPU_CHUNK = 32
# ours: [chunk, chunk] matrix elements per segment, measured likewise; its buffers stay in cache.
SEGMENT_ELEMENTS = 1 << 18


@dataclass
class _Segment:
    """Sizes and views that forward and backward need of one segment: ``s`` chunks of ``b`` sequences."""

    x: Tensor  # wide, [s, g, b, c, r, p]; a view of the input where its dtype allows
    raw: Tensor  # dt before softplus, [s, g, b, r, c]
    dt: Tensor  # [s, g, b, r, c]
    sums: Tensor | None  # [s, 1, b, c, c], 1 where token i adds up what token j <= i has: [j, i]; None is all
    decay_in: Tensor  # exp(cum_i) [s, g, b, r, c], 0 where the chunk's incoming state is of another document
    decay_out: Tensor  # exp(cum_end - cum_j), likewise; 0 where token j's document has ended before the chunk's end
    decay_chunk: Tensor  # exp(cum_end) [s, g, b, r], 0 where a document begins in the chunk
    B: Tensor  # [s, g, b, c, n]
    C: Tensor  # [s, g, b, c, n]
    gram: Tensor  # C_i . B_j [s, g, b, c, c]
    decay: Tensor  # exp(cum_i - cum_j) for j < i of the same document, else 0: [s, g, b, r, c, c]
    skip: Tensor  # dt_i C_i.B_i + D, [s, g, b, r, c]


class _Scratch:
    """Buffers that a segment's temporaries take again and again, and the matmuls between them.

    Memory that malloc returns to the system and fetches anew costs more in page faults than most operations here.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, matmul_dtype: torch.dtype) -> None:
        self.like, self.dtype, self.matmul_dtype = like, dtype, matmul_dtype
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor; it lives until the name is asked for again."""
        dtype = dtype or self.dtype
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name, dtype] = self.like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def cast(self, name: str, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``source`` in the compute dtype: itself where it is already, else a dense copy."""
        dtype = dtype or self.dtype
        return source if source.dtype == dtype else self(name, *source.shape, dtype=dtype).copy_(source)

    def bmm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Return ``a @ b`` over any number of leading dimensions, as one batched matmul into ``out`` (contiguous)."""
        a, b, result = a.flatten(0, -3), b.flatten(0, -3), out.flatten(0, -3)
        if self.matmul_dtype == self.dtype:
            torch.bmm(a, b, out=result)
        else:
            low = self("product", *result.shape, dtype=self.matmul_dtype)
            result.copy_(torch.bmm(self._operand("left", a), self._operand("right", b), out=low))
        return out

    def _operand(self, name: str, t: Tensor) -> Tensor:
        if t.stride(-1) == 1:
            return self.cast(name, t, self.matmul_dtype)
        return self.cast(name, t.transpose(1, 2), self.matmul_dtype).transpose(1, 2)


def _scale(t: Tensor, by: Tensor, out: Tensor) -> Tensor:
    """Return ``t * by[..., None]``."""
    return torch.mul(t, by.unsqueeze(-1), out=out)


def _wide(t: Tensor, c: int, groups: int | None) -> Tensor:
    """View [b, l, h, ...] as [s, g, b, c, r, ...]; with ``groups=None`` [b, l, g, ...] as [s, g, b, c, ...]."""
    t = t.unflatten(1, (-1, c))
    if groups is None:
        return t.permute(1, 3, 0, 2, *range(4, t.dim()))
    t = t.unflatten(3, (groups, -1))
    return t.permute(1, 3, 0, 2, *range(4, t.dim()))


def _segments(batch: int, length: int, heads: int, chunk: int) -> Iterator[tuple[slice, list[tuple[int, int, int]]]]:
    """Yield blocks of sequences, each with its (begin, end, chunk) list; the last segment may be one shorter chunk."""
    tokens = max(SEGMENT_ELEMENTS // (heads * chunk), chunk)
    block = max(1, tokens // max(length, 1))
    step = max(tokens // chunk, 1) * chunk
    whole = length - length % chunk
    spans = [(i, min(i + step, whole), chunk) for i in range(0, whole, step)]
    if whole < length:
        spans.append((whole, length, length - whole))
    for begin in range(0, batch, block):
        yield slice(begin, min(begin + block, batch)), spans


def _prepare(
    inputs: tuple[Tensor | None, ...], rows: slice, span: tuple[int, int, int], dt_softplus: bool, scratch: _Scratch
) -> _Segment:
    x, dt, A, B, C, D, dt_bias, seq_idx = inputs
    t0, t1, c = span
    groups = B.shape[2]
    dtype = scratch.dtype

    xw = scratch.cast("x", _wide(x[rows, t0:t1], c, groups))  # [s, g, b, c, r, p]
    s, g, b, _, r, _ = xw.shape
    Bk, Ck = (_wide(t[rows, t0:t1], c, None) for t in (B, C))  # [s, g, b, c, n]
    Bk, Ck = scratch("B", *Bk.shape).copy_(Bk), scratch("C", *Ck.shape).copy_(Ck)
    per_head = (1, groups, 1, -1, 1)
    raw = _wide(dt[rows, t0:t1], c, groups).transpose(3, 4).to(dtype)  # [s, g, b, r, c]
    if dt_bias is not None:
        raw = raw + dt_bias.view(per_head)
    dts = (F.softplus(raw) if dt_softplus else raw).contiguous()
    # In units of log 2: exp2 is several times faster than exp, most of all where it underflows or is given -inf.
    exponent = (dts * A.view(per_head)).mul_(1 / math.log(2))

    below, sums = torch.ones(c, c, dtype=torch.bool, device=x.device).tril_(-1), None
    if seq_idx is None:
        cum = exponent.cumsum(-1)  # [s, g, b, r, c]
        end = cum[..., -1:]  # [s, g, b, r, 1]
        decay_in, decay_out, decay_chunk = cum.exp2(), (end - cum).exp2_(), end.squeeze(-1).exp2()
    else:
        doc = seq_idx[rows, t0:t1].unflatten(1, (-1, c)).transpose(0, 1)[:, None, :, None]  # [s, 1, b, 1, c]
        last = doc[..., -1:]
        first = seq_idx[rows, max(t0 - 1, 0)][None, None, :, None, None]
        before = torch.cat([first, last[:-1]])  # [s, 1, b, 1, 1], the document of the token before each chunk
        same = doc.unsqueeze(-1) == doc.unsqueeze(-2)  # [s, 1, b, 1, c, c]
        # The sums begin anew with each document: what stands before it would show in how they are rounded
        sums = (same & ~below).squeeze(3).to(dtype)
        cum = exponent @ sums
        end = cum[..., -1:]
        decay_in = cum.exp2().mul_(doc == before)
        decay_out = (end - cum).masked_fill_(doc != last, -torch.inf).exp2_()
        decay_chunk = end.squeeze(-1).exp2().mul_((last == before).squeeze(-1))
        below = below & same
    mask = torch.zeros(below.shape, dtype=dtype, device=x.device).masked_fill_(~below, -torch.inf)
    decay = torch.sub(cum.unsqueeze(-1), cum.unsqueeze(-2), out=scratch("decay", s, g, b, r, c, c)).add_(mask).exp2_()

    gram = scratch.bmm(Ck, Bk.transpose(-1, -2), scratch("gram", s, g, b, c, c))
    skip = dts * gram.diagonal(dim1=-2, dim2=-1).unsqueeze(3)
    if D is not None:
        skip += D.view(per_head)
    return _Segment(xw, raw, dts, sums, decay_in, decay_out, decay_chunk, Bk, Ck, gram, decay, skip)


def _states(seg: _Segment, start: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Return the states [s + 1, g, b, n, r * p] at the chunk edges, and decay_out * u (wide) they were made of."""
    s, g, b, c, r, p = seg.x.shape
    # S_out = exp(cum_end) S_in + sum_j exp(cum_end - cum_j) B_j u_j^T: the sums of all chunks as one matmul
    wide_out = _scale(seg.x, (seg.dt * seg.decay_out).transpose(3, 4), scratch("wide_out", *seg.x.shape))
    edges = scratch("edges", s + 1, *start.shape)  # [s + 1, g, b, n, r * p]
    edges[0] = start
    scratch.bmm(seg.B.transpose(-1, -2), wide_out.view(s, g, b, c, r * p), edges[1:])
    by_head = edges.unflatten(-1, (r, p))  # [s + 1, g, b, n, r, p]
    decay = seg.decay_chunk[:, :, :, None, :, None]  # [s, g, b, 1, r, 1]
    for before, after, factor in zip(by_head[:-1], by_head[1:], decay, strict=True):
        after.addcmul_(before, factor)
    return edges, wide_out


def _to_internal(state: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Permute [b, h, p, n] to [g, b, n, r * p]."""
    return state.to(dtype).unflatten(1, (groups, -1)).permute(1, 0, 4, 2, 3).flatten(3).contiguous()


def _to_external(state: Tensor, heads: int) -> Tensor:
    """Permute [g, b, n, r * p] to [b, h, p, n]."""
    g = state.shape[0]
    return state.unflatten(-1, (heads // g, -1)).permute(1, 0, 3, 4, 2).flatten(1, 2).contiguous()


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, chunk, dt_softplus, matmul_dtype):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, length, heads, head_dim = x.shape
        groups, n = B.shape[2], B.shape[3]
        vectors = [None if v is None else v.to(dtype) for v in (A, D, dt_bias)]
        inputs = (x, dt, vectors[0], B, C, vectors[1], vectors[2], seq_idx)
        y = torch.empty_like(x)
        final = torch.empty(batch, heads, head_dim, n, dtype=dtype, device=x.device)
        starts = []
        scratch = _Scratch(x, dtype, matmul_dtype or dtype)
        with torch.autocast(x.device.type, enabled=False):
            for rows, spans in _segments(batch, length, heads, chunk):
                b = rows.stop - rows.start
                if initial_state is None:
                    state = x.new_zeros(groups, b, n, heads // groups * head_dim, dtype=dtype)
                else:
                    state = _to_internal(initial_state[rows], groups, dtype)
                for span in spans:
                    starts.append(state)
                    seg = _prepare(inputs, rows, span, dt_softplus, scratch)
                    edges, _ = _states(seg, state, scratch)
                    state = edges[-1].clone()
                    out = _wide(y[rows, span[0] : span[1]], span[2], groups)
                    _segment_forward(seg, edges[:-1], out, scratch)
                final[rows] = _to_external(state, heads)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, *starts)
        ctx.chunk, ctx.dt_softplus, ctx.matmul_dtype = chunk, dt_softplus, matmul_dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, *starts = ctx.saved_tensors
        chunk, dt_softplus = ctx.chunk, ctx.dt_softplus
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch, length, heads, head_dim = x.shape
        groups, n = B.shape[2], B.shape[3]
        vectors = [None if v is None else v.to(dtype) for v in (A, D, dt_bias)]
        inputs = (x, dt, vectors[0], B, C, vectors[1], vectors[2], seq_idx)
        if dy is None:
            dy = torch.zeros_like(x)
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        dA, dD, ddt_bias = (x.new_zeros(heads, dtype=dtype) for _ in range(3))
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        starts = iter(starts)
        scratch = _Scratch(x, dtype, ctx.matmul_dtype or dtype)
        with torch.autocast(x.device.type, enabled=False):
            for rows, spans in _segments(batch, length, heads, chunk):
                b = rows.stop - rows.start
                if dfinal is None:
                    dstate = x.new_zeros(groups, b, n, heads // groups * head_dim, dtype=dtype)
                else:
                    dstate = _to_internal(dfinal[rows], groups, dtype)
                block = [next(starts) for _ in spans]
                for span, start in zip(reversed(spans), reversed(block), strict=True):
                    cut = slice(span[0], span[1])
                    seg = _prepare(inputs, rows, span, dt_softplus, scratch)
                    dyw = scratch.cast("dy", _wide(dy[rows, cut], span[2], groups))
                    per_head = vectors[0].view(1, groups, 1, -1, 1)
                    grads, dstate = _segment_backward(seg, start, dyw, dstate, per_head, scratch)
                    gx, gdt, gB, gC, gA, gD = grads  # gx wide; gB, gC [s, g, b, c, n]; gdt, gA, gD [s, g, b, r, c]
                    _wide(dx[rows, cut], span[2], groups).copy_(gx)
                    _wide(dB[rows, cut], span[2], None).copy_(gB)
                    _wide(dC[rows, cut], span[2], None).copy_(gC)
                    if dt_softplus:
                        gdt *= torch.sigmoid(seg.raw)
                    _wide(ddt[rows, cut], span[2], groups).copy_(gdt.transpose(3, 4))
                    dA += gA.sum((0, 2, 4)).flatten()
                    dD += gD.sum((0, 2, 4)).flatten()
                    ddt_bias += gdt.sum((0, 2, 4)).flatten()
                if dinitial is not None:
                    dinitial[rows] = _to_external(dstate, heads).to(dinitial.dtype)
        grads = (dx, ddt, dA.to(A.dtype), dB, dC, dD if D is None else dD.to(D.dtype))
        grads += (ddt_bias if dt_bias is None else ddt_bias.to(dt_bias.dtype), dinitial)
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None)


def _segment_forward(seg: _Segment, incoming: Tensor, out: Tensor, scratch: _Scratch) -> None:
    """Write y of one segment into ``out`` (wide), from the states [s, g, b, n, r * p] its chunks start with."""
    s, g, b, c, r, p = seg.x.shape
    # y_i = sum_{j<i} (C_i.B_j) exp(cum_i - cum_j) u_j + exp(cum_i) C_i^T S_in + (dt_i C_i.B_i + D) x_i
    across = scratch.bmm(seg.C, incoming, scratch("across", s, g, b, c, r * p)).view(seg.x.shape)
    u = _scale(seg.x.transpose(3, 4), seg.dt, scratch("u", s, g, b, r, c, p))  # [s, g, b, r, c, p]
    inside = scratch.bmm(seg.decay.mul_(seg.gram.unsqueeze(3)), u, scratch("inside", s, g, b, r, c, p)).transpose(3, 4)
    torch.addcmul(inside, across, seg.decay_in.transpose(3, 4).unsqueeze(-1), out=across)
    skip = seg.skip.transpose(3, 4).unsqueeze(-1)  # [s, g, b, c, r, 1]
    if out.dtype == across.dtype:
        torch.addcmul(across, seg.x, skip, out=out)
    else:
        out.copy_(across.addcmul_(seg.x, skip))


def _segment_backward(seg: _Segment, start: Tensor, dy: Tensor, dstate: Tensor, A: Tensor, scratch: _Scratch):
    """Return the gradients of one segment; ``dy`` wide, ``dstate`` the gradient of the segment's last state.

    With W_ij = dM_ij M_ij (M the [chunk, chunk] weights), a_t of this chunk gets the sum of W over i >= t > j: rows
    i >= t less columns j >= t, as what lies in both cancels. It also gets what the states carry across it: from the
    chunk's start to y_i (i >= t), from u_j (j < t) to the chunk's end, and from start to end. Only sums of one and the
    same W are subtracted, so little is lost where the decay is fast or the matmuls are rounded.
    """
    s, g, b, c, r, p = seg.x.shape
    n = seg.B.shape[-1]
    edges, wide_out = _states(seg, start, scratch)

    # through the states: y_i += decay_in_i C_i^T S_in, S_out = decay_chunk S_in + sum_j decay_out_j B_j u_j^T
    # dS_in = decay_chunk dS_out + sum_i decay_in_i C_i dy_i^T, dC_i += decay_in_i S_in dy_i,
    # dB_j += decay_out_j dS_out u_j, du_j += decay_out_j dS_out^T B_j
    product = scratch("product", *seg.x.shape)
    wide_in = _scale(dy, seg.decay_in.transpose(3, 4), scratch("wide_in", *seg.x.shape))
    wide_in_flat = wide_in.view(s, g, b, c, r * p)
    dedges = scratch("dedges", *edges.shape)  # gradient of the state at each chunk edge, dS_in and dS_out
    dedges[-1] = dstate
    scratch.bmm(seg.C.transpose(-1, -2), wide_in_flat, dedges[:-1])
    by_head = dedges.unflatten(-1, (r, p)).unbind()
    decay = seg.decay_chunk[:, :, :, None, :, None]
    for i in reversed(range(s)):
        by_head[i].addcmul_(by_head[i + 1], decay[i])
    scratch.bmm(seg.C, edges[:-1], product.view(wide_in_flat.shape))
    row = product.mul_(wide_in).sum(-1).transpose(3, 4).contiguous()  # [s, g, b, r, c]
    dC = scratch.bmm(wide_in_flat, edges[:-1].transpose(-1, -2), scratch("dC", s, g, b, c, n))
    dB = scratch.bmm(wide_out.view(s, g, b, c, r * p), dedges[1:].transpose(-1, -2), scratch("dB", s, g, b, c, n))
    through = scratch.bmm(seg.B, dedges[1:], scratch("through", *wide_in_flat.shape)).view(seg.x.shape)
    # parts of da: exp(cum_end) S_in . dS_out [s, g, b, r], and decay_out_j u_j . (dS_out^T B_j) [s, g, b, r, c]
    passed = edges[:-1].mul_(dedges[1:]).sum(3).unflatten(-1, (r, p)).sum(-1).mul_(seg.decay_chunk)  # edges are spent
    column_state = wide_out.mul_(through).sum(-1).transpose(3, 4)  # wide_out is spent

    # inside the chunk: y_i += sum_{j<i} M_ij u_j, M_ij = decay_ij C_i.B_j; du_j += sum_i M_ij dy_i, dM_ij = dy_i.u_j
    dy_head = scratch("dy_head", s, g, b, r, c, p).copy_(dy.transpose(3, 4))
    u = _scale(seg.x.transpose(3, 4), seg.dt, scratch("u", s, g, b, r, c, p))
    weights = torch.mul(seg.decay, seg.gram.unsqueeze(3), out=scratch("weights", *seg.decay.shape))
    inside = scratch.bmm(weights.transpose(-1, -2), dy_head, scratch("inside", s, g, b, r, c, p)).transpose(3, 4)
    du = torch.addcmul(inside, through, seg.decay_out.transpose(3, 4).unsqueeze(-1), out=through)
    dweights = scratch.bmm(dy_head, u.transpose(-1, -2), scratch("dweights", *seg.decay.shape))  # dM
    weights.mul_(dweights)
    row += weights.sum(-1).sub_(weights.sum(-2))
    dgram = dweights.mul_(seg.decay).sum(3)  # [s, g, b, c, c]

    # the diagonal and the skip: y_i += skip_i x_i; then dC_i += sum_j dgram_ij B_j, dB_j += sum_i dgram_ij C_i
    dskip = torch.mul(dy, seg.x, out=product).sum(-1).transpose(3, 4)
    dgram.diagonal(dim1=-2, dim2=-1).copy_((dskip * seg.dt).sum(3))
    dC += scratch.bmm(dgram, seg.B, scratch("dstate", *dC.shape))
    dB += scratch.bmm(dgram.transpose(-1, -2), seg.C, scratch("dstate", *dB.shape))

    # u = dt x, a = dt A, skip = dt C.B + D: ddt = x.du + dskip C.B + da A, dx = dt du + skip dy
    direct = torch.mul(seg.x, du, out=product).sum(-1).transpose(3, 4)
    before = column_state.cumsum(-1).sub_(column_state)
    after = row.flip(-1).cumsum(-1).flip(-1) if seg.sums is None else row @ seg.sums.transpose(-1, -2)
    da = after.add_(before).add_(passed.unsqueeze(-1))
    ddt = direct + dskip * seg.gram.diagonal(dim1=-2, dim2=-1).unsqueeze(3) + da * A
    dx = _scale(du, seg.dt.transpose(3, 4), du).addcmul_(dy, seg.skip.transpose(3, 4).unsqueeze(-1))
    return (dx, ddt, dB, dC, da * seg.dt, dskip), dedges[0].clone()


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    matmul_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the whole scan, differentiable once in every floating-point argument.

    Any strides will do; the output follows the memory order of ``x`` (a [batch, length, ...] view of [length, batch,
    ...] activations gives such a view back, so no transposing copy is made on either side).

    Args:
        x: [batch, length, heads, head_dim].
        dt: [batch, length, heads], step sizes; ``softplus(dt + dt_bias)`` with ``dt_softplus`` (default), else used
            as is.
        A: [heads], negative. The decay of one step is ``exp(dt * A)``.
        B, C: [batch, length, groups, state]; head ``h`` uses group ``h // (heads // groups)``.
        D: [heads], the skip ``D * x``, or None.
        dt_bias: [heads] or None.
        chunk_size: tokens per chunk, any length >= 1 (it changes rounding only); None takes the one tuned for the CPU.
        initial_state: [batch, heads, head_dim, state] before the first token, or None for zeros.
        seq_idx: integer [batch, length], the document of each token, non-decreasing along the length. The state is
            zeroed where it changes; ``initial_state`` belongs to the first document, the final state to the last.
        return_final_state: also return the state after the last token.
        matmul_dtype: torch.bfloat16 multiplies (and stores each result) in bfloat16, the rest as before; 1.3 times as
            fast where the processor has such instructions. Outputs and gradients are then off by about 1e-2 of their
            largest value. None multiplies in the compute dtype.

    Returns:
        y [batch, length, heads, head_dim] in ``x``'s dtype, and with ``return_final_state`` the state
        [batch, heads, head_dim, state]. All is computed in float32 (the state's dtype), in float64 where ``x`` is
        float64.

    Errors:
        ValueError: shapes that do not fit together, or another ``matmul_dtype``.
    """
    if matmul_dtype not in (None, torch.bfloat16):
        raise ValueError(f"ssd_chunk_scan: matmul_dtype must be torch.bfloat16 or None, got {matmul_dtype}")
    _check(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    chunk = CPU_CHUNK if chunk_size is None else chunk_size
    if chunk < 1:
        raise ValueError(f"ssd_chunk_scan: chunk_size must be at least 1, got {chunk}")
    chunk = min(chunk, x.shape[1])
    arguments = (x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, chunk, dt_softplus, matmul_dtype)
    y, final = _ChunkScan.apply(*arguments)
    return (y, final) if return_final_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
) -> Tensor:
    """Run one token of the scan, for generation: updates ``state`` IN PLACE and returns y. Not differentiable.

    Args:
        state: [batch, heads, head_dim, state], float32 (or float64).
        x: [batch, heads, head_dim].
        dt: [batch, heads].
        A, D, dt_bias: [heads].
        B, C: [batch, groups, state].

    Returns:
        y [batch, heads, head_dim] in ``x``'s dtype.
    """
    dtype = state.dtype
    groups = B.shape[1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        # S = exp(dt A) S + dt B x^T, y = C^T S + D x
        dt = dt.to(dtype)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        xf = x.to(dtype)
        u = (xf * dt.unsqueeze(-1)).unflatten(1, (groups, -1))  # [b, g, r, p]
        by_group = state.unflatten(1, (groups, -1))  # [b, g, r, p, n], a view
        by_group.mul_((dt * A.to(dtype)).exp_().unflatten(1, (groups, -1))[..., None, None])
        by_group.addcmul_(u.unsqueeze(-1), B.to(dtype)[:, :, None, None])
        y = (by_group @ C.to(dtype)[:, :, None, :, None]).squeeze(-1).flatten(1, 2)
        if D is not None:
            y.addcmul_(xf, D.to(dtype).unsqueeze(-1))
        return y.to(x.dtype)


def _check(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(
            "ssd_chunk_scan: x must be [batch, length, heads, head_dim] and B, C [batch, length, groups, state], got "
            f"{tuple(x.shape)} and {tuple(B.shape)}"
        )
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    if length == 0 or b == 0:
        raise ValueError(f"ssd_chunk_scan: no tokens in x of shape {tuple(x.shape)}")
    if h % g:
        raise ValueError(f"ssd_chunk_scan: {h} heads do not divide into {g} groups")
    expected = {
        "dt": (dt, (b, length, h)),
        "A": (A, (h,)),
        "B": (B, (b, length, g, n)),
        "C": (C, (b, length, g, n)),
        "D": (D, (h,)),
        "dt_bias": (dt_bias, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "seq_idx": (seq_idx, (b, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd_chunk_scan: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.dtype == torch.bool):
        raise ValueError(f"ssd_chunk_scan: seq_idx must be an integer tensor, got {seq_idx.dtype}")
