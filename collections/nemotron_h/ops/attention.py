"""Attention of generation: new tokens over a cache of keys and values that groups of heads share. Not differentiable.

A run of tokens (`attention_chunk`) needs no mask and no expanded copy of keys, so its memory grows with the run and
not with what was read before. A single token (`attention_step`), or a few of every sequence at its own position
(`attention_window`), reads the filled part of the cache alone.

Axes: b batch, l new tokens, g groups, r heads of a group, h = g * r heads, d channels of a head, t positions of the
cache. Per head, with the keys and values of its group (Ainslie et al. 2023, arXiv 2305.13245):

    out_i = sum_j p_ij v_j      p_ij = exp(q_i.k_j / sqrt(d)) / sum_j exp(q_i.k_j / sqrt(d))      j up to i's position
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def attention_chunk(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attend from a run of new tokens at one position of every sequence: each sees what came before it, and
    itself.

    Args:
        q: [batch, length, groups, heads per group, head_dim].
        keys, values: [batch, groups, capacity, head_dim], those of the new tokens included.
        start: position of the first new token.

    Returns:
        [batch, length, groups * heads per group * head_dim].
    """
    end = start + q.shape[1]
    q = q.flatten(2, 3).transpose(1, 2)  # [b, h, l, d]
    keys, values = keys[:, :, :end], values[:, :, :end]  # [b, g, start + l, d]
    if q.device.type == "cpu":
        out = _on_cpu(q, keys, values, start)
    else:
        gqa = q.shape[1] != keys.shape[1]
        if gqa and q.dtype not in (torch.bfloat16, torch.float16):
            # only the flash kernel shares keys between heads, and it has these two dtypes
            keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (keys, values))
            gqa = False
        mask = causal_lower_right(q.shape[2], end) if start else None
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(2)


def _on_cpu(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attend among the new tokens and over those before, joined by their sums: so neither part needs a mask.

    With Z the sum of exponentials of a part, out = (Z_own own + Z_before before) / (Z_own + Z_before), and the share of
    the second is sigmoid(log Z_before - log Z_own).

    Args:
        q: [b, h, l, d].
        keys, values: [b, g, start + l, d].

    Returns:
        [b, h, l, d].
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_sum = flash(q, keys[:, :, start:], values[:, :, start:], 0.0, True)
    if not start:
        return own
    before, before_sum = flash(q, keys[:, :, :start], values[:, :, :start])
    share = torch.sigmoid(before_sum - own_sum)  # of log Z, [b, h, l]
    return torch.lerp(own, before, share.unsqueeze(-1).to(own.dtype))


def attention_step(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int, ragged: bool) -> Tensor:
    """Attend from one token of every sequence, each over its own number of keys.

    Args:
        q: [batch, groups, heads per group, head_dim].
        keys, values: [batch, groups, capacity, head_dim], finite beyond the lengths too.
        lengths: int [batch], the keys of each sequence, its new token's included.
        longest: the largest of `lengths`, on the host.
        ragged: whether the lengths differ.

    Returns:
        [batch, groups * heads per group * head_dim].
    """
    mask = None
    if ragged:
        mask = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]  # [b, 1, 1, longest]
    # the heads of a group take the place of query positions: all of them read the same keys
    out = F.scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
    return out.flatten(1)


def attention_window(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Attend from a few tokens of every sequence, each to its own sequence's keys up to itself.

    Args:
        q: [batch, length, groups, heads per group, head_dim].
        keys, values: [batch, groups, capacity, head_dim], those of the new tokens included, finite beyond them too.
        lengths: int [batch], the keys of each sequence, its first new token's included.
        longest: the largest number of keys of a sequence, all of its new tokens' included, on the host.

    Returns:
        [batch, length, groups * heads per group * head_dim].
    """
    batch, length, groups, heads, dim = q.shape
    seen = lengths[:, None] + torch.arange(length, device=q.device)  # [b, l], the keys of each new token
    mask = torch.arange(longest, device=q.device) < seen[..., None]  # [b, l, t]
    mask = mask.repeat_interleave(heads, dim=1)[:, None]  # [b, 1, l * r, t]
    # tokens and heads of a group take the place of query positions: all of them read the same keys
    q = q.transpose(1, 2).reshape(batch, groups, length * heads, dim)
    out = F.scaled_dot_product_attention(q, keys[:, :, :longest], values[:, :, :longest], attn_mask=mask)
    return out.unflatten(2, (length, heads)).transpose(1, 2).flatten(2)


def cache_append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Write new tokens of every sequence into their places.

    Args:
        keys, values: [batch, groups, capacity, head_dim].
        key, value: [batch, length, groups, head_dim].
        positions: int64 [batch], of the first.
    """
    rows = torch.arange(len(key), device=key.device)[:, None]
    places = positions[:, None] + torch.arange(key.shape[1], device=key.device)  # [b, l]
    keys[rows, :, places] = key
    values[rows, :, places] = value
