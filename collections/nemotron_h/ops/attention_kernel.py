"""Attention of one or a few new tokens per sequence on a GPU: keys are read once for all of them and all heads of a
group, in parallel splits.

With one query per head there is too little to do per sequence and head to fill a GPU, so each program takes a stretch
of the keys (the "split-KV" of flash decoding) and a second kernel joins the stretches. How many keys a sequence has is
read on the device: ragged batches need no mask, and a CUDA graph of the step stays right as sequences grow.

Axes: b batch, l new tokens, g groups, r heads of a group, d channels of a head, t keys of a block (KEYS), n splits;
rows are the l * r queries of a group, padded to ROWS.

The softmax of a stretch is taken block by block (Dao et al. 2022, arXiv 2205.14135): with the largest score m, the sum
Z and the weighted values a so far, and a block's scores s,

    m' = max(m, max_j s_j)
    Z' = Z exp(m - m') + sum_j exp(s_j - m')      a' = a exp(m - m') + sum_j exp(s_j - m') v_j

and the stretches i are joined likewise: out = sum_i exp(m_i - m) a_i / sum_i exp(m_i - m) Z_i, m = max_i m_i.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: ours: keys that a program loads at a time; with three stages in flight, 96 KiB of bfloat16 keys and values
BLOCK = 64
#: ours: programs per multiprocessor that keep its memory pipe full
PROGRAMS_PER_PROCESSOR = 6
MAX_SPLITS = 64


@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    partial_ptr,
    stats_ptr,
    scale,
    groups,
    splits,
    q_batch,
    q_token,
    q_group,
    kv_batch,
    kv_group,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    # int64: a cache has more elements than an int32 counts
    batch = (pair // groups).to(tl.int64)
    group = (pair % groups).to(tl.int64)
    length = tl.load(lengths_ptr + batch).to(tl.int32)  # keys that the first new token sees
    whole = length + TOKENS - 1
    stretch = tl.cdiv(tl.cdiv(whole, splits), KEYS) * KEYS
    begin = split * stretch
    end = tl.minimum(begin + stretch, whole)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    keys = tl.arange(0, KEYS)
    token = rows // HEADS
    # rows beyond the group's queries pad the matmul to the least that tensor cores take
    q_row = token * q_token + rows % HEADS * DIM
    q_at = q_ptr + batch * q_batch + group * q_group + q_row[:, None] + dims[None, :]
    q = tl.load(q_at, mask=rows[:, None] < TOKENS * HEADS, other=0.0)  # [l * r, d]
    base = batch * kv_batch + group * kv_group

    largest = tl.full([ROWS], float("-inf"), tl.float32)  # m
    total = tl.zeros([ROWS], tl.float32)  # Z
    acc = tl.zeros([ROWS, DIM], tl.float32)  # a
    for first in range(begin, end, KEYS):
        at = base + (first + keys).to(tl.int64)[:, None] * DIM + dims[None, :]
        inside = first + keys < end
        k = tl.load(k_ptr + at, mask=inside[:, None], other=0.0)  # [t, d]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [l * r, t]
        seen = inside[None, :] & ((first + keys)[None, :] < length + token[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        # an early token may see no key of a stretch: -inf less -inf is NaN
        base_score = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp2(largest - base_score)
        weights = tl.exp2(scores - base_score[:, None])
        v = tl.load(v_ptr + at, mask=inside[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = larger

    at = (pair.to(tl.int64) * splits + split) * (TOKENS * HEADS) + rows
    tl.store(partial_ptr + at[:, None] * DIM + dims[None, :], acc, mask=rows[:, None] < TOKENS * HEADS)
    tl.store(stats_ptr + at * 2, largest, mask=rows < TOKENS * HEADS)
    tl.store(stats_ptr + at * 2 + 1, total, mask=rows < TOKENS * HEADS)


@triton.jit
def _join_kernel(
    partial_ptr, stats_ptr, out_ptr, splits, QUERIES: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr
):
    """Compute one of a group's l * r queries; an empty stretch has the largest score -inf and weighs nothing."""
    row = tl.program_id(0)
    pair = (row // QUERIES).to(tl.int64)
    query = row % QUERIES
    stretches = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    present = stretches < splits
    at = (pair * splits + stretches) * QUERIES + query
    largest = tl.load(stats_ptr + at * 2, mask=present, other=float("-inf"))  # [n]
    total = tl.load(stats_ptr + at * 2 + 1, mask=present, other=0.0)
    weights = tl.exp2(largest - tl.max(largest, 0))
    acc = tl.load(partial_ptr + at[:, None] * DIM + dims[None, :], mask=present[:, None], other=0.0)  # [n, d]
    out = tl.sum(acc * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out_ptr + row.to(tl.int64) * DIM + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _append_kernel(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    groups,
    key_batch,
    key_token,
    key_group,
    value_batch,
    value_token,
    value_group,
    kv_batch,
    kv_group,
    DIM: tl.constexpr,
):
    pair = tl.program_id(0)
    token = tl.program_id(1)
    batch = (pair // groups).to(tl.int64)
    group = (pair % groups).to(tl.int64)
    dims = tl.arange(0, DIM)
    at = batch * kv_batch + group * kv_group + (tl.load(positions_ptr + batch) + token) * DIM + dims
    key = tl.load(key_ptr + batch * key_batch + token * key_token + group * key_group + dims)
    value = tl.load(value_ptr + batch * value_batch + token * value_token + group * value_group + dims)
    tl.store(keys_ptr + at, key)
    tl.store(values_ptr + at, value)


def splits_for(pairs: int, capacity: int, processors: int) -> int:
    """Return the splits of the keys of each sequence and group: enough to fill the GPU, none without a block."""
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * processors / pairs)
    return max(1, min(wanted, math.ceil(capacity / BLOCK), MAX_SPLITS))


def takes(q: Tensor, keys: Tensor) -> bool:
    """Return True if the kernels can read these: a power of two channels, dense within a sequence and group."""
    dim = keys.shape[-1]
    return dim >= 16 and dim & (dim - 1) == 0 and keys.stride()[-2:] == (dim, 1) and q.dtype != torch.float64


def attention_step(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *_: object) -> Tensor:
    """Attend as `ops.attention.attention_step`, for tensors that `takes` accepts; `values` lies as `keys` does."""
    return attention_window(q.unsqueeze(1), keys, values, lengths)[:, 0]


def attention_window(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *_: object) -> Tensor:
    """Attend as `ops.attention.attention_window`, likewise."""
    batch, tokens, groups, heads, dim = q.shape
    queries = tokens * heads
    q = q if q.stride()[-2:] == (dim, 1) else q.contiguous()
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = splits_for(batch * groups, keys.shape[2], processors)
    partial = torch.empty(batch * groups, splits, queries, dim, dtype=torch.float32, device=q.device)  # a
    stats = torch.empty(batch * groups, splits, queries, 2, dtype=torch.float32, device=q.device)  # m, Z
    out = torch.empty(batch, groups, tokens, heads * dim, dtype=q.dtype, device=q.device)
    _split_kernel[(batch * groups, splits)](
        q,
        keys,
        values,
        lengths,
        partial,
        stats,
        1 / (math.sqrt(dim) * math.log(2)),  # scores in units of log 2, for exp2
        groups,
        splits,
        *q.stride()[:3],
        *keys.stride()[:2],
        TOKENS=tokens,
        HEADS=heads,
        ROWS=max(16, triton.next_power_of_2(queries)),
        DIM=dim,
        KEYS=BLOCK,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    _join_kernel[(batch * groups * queries,)](
        partial, stats, out, splits, QUERIES=queries, DIM=dim, SPLITS=triton.next_power_of_2(splits), num_warps=2
    )
    return out.transpose(1, 2).flatten(2)


def cache_append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Append as `nemotron_h.ops.attention.cache_append`, for tensors that `takes` accepts."""
    batch, tokens, groups, dim = key.shape
    _append_kernel[(batch * groups, tokens)](
        key,
        value,
        keys,
        values,
        positions,
        groups,
        *key.stride()[:3],
        *value.stride()[:3],
        *keys.stride()[:2],
        DIM=dim,
        num_warps=1,
    )
