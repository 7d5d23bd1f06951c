"""Token-by-token recurrences in float64, gradients by autograd: what every op is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def ssd(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, seq_idx=None, dt_softplus=True):
    """The recurrence S = exp(dt A) S + dt x B^T, y = S C + D x, one token after the other; returns y and the last S."""
    batch, length, heads, head_dim = x.shape
    groups, n = B.shape[2:]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    state = x.new_zeros(batch, heads, head_dim, n) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        if seq_idx is not None and t:
            same = (seq_idx[:, t] == seq_idx[:, t - 1]).to(x.dtype)
            state = state * same[:, None, None, None]
        b, c = (v[:, t].repeat_interleave(heads // groups, dim=1) for v in (B, C))
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None, :]
        y = (state * c[:, :, None, :]).sum(-1)
        ys.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(ys, dim=1), state


def conv(x, weight, bias=None, initial_state=None, seq_idx=None, activation="silu"):
    """Each output from the inputs its window may see, one token and one tap after the other."""
    _, length, channels = x.shape
    width = weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, channels) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        total = x.new_zeros(x.shape[0], channels) if bias is None else bias.expand(x.shape[0], -1)
        for k in range(width):
            s = t - (width - 1) + k
            tap = x[:, s] if s >= 0 else before[:, width - 1 + s]
            if seq_idx is not None:
                tap = tap * (seq_idx[:, max(s, 0)] == seq_idx[:, t]).to(x.dtype)[:, None]
            total = total + weight[:, k] * tap
        ys.append(total)
    y = torch.stack(ys, dim=1)
    return F.silu(y) if activation == "silu" else y


def gated_rms_norm(y, z, weight, group_size, eps=1e-5):
    h = y * F.silu(z) if z is not None else y
    parts = [p / torch.sqrt((p * p).mean(-1, keepdim=True) + eps) for p in h.split(group_size, dim=-1)]
    return torch.cat(parts, dim=-1) * weight
