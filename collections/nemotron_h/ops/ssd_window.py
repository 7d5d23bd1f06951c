"""Mamba-2's scan over a few tokens after a state that stays where it is, and the state's way over the first of them.

So tokens can be read on trial, and some of them be taken back: no state is copied, and none is written until it is
known how many tokens stay (the replay of 2408.15237, section 4; for Mamba-2 as one chunk of its scan).

Axes: b batch, w tokens of the window, l the last of them, h heads (g groups of r: h = g * r), p channels of a head,
n state.

With `a_t = dt_t A`, `cum` its running sum from the window's start and `S` the state before it,

    y_i = exp(cum_i) C_i^T S + sum_{j<=i} (C_i.B_j) exp(cum_i - cum_j) dt_j x_j + D x_i
    S_k = exp(cum_k) S + sum_{j<=k} exp(cum_k - cum_j) dt_j B_j x_j^T

Sums of `a` are taken as they are, not as differences of `cum`: these would lose what large decays round away, and a
window is short.

A state is advanced by a number of tokens of its own per sequence, k: later ones get dt = 0, which leaves it as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_window(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """Return the outputs of the window's last tokens; `state` stays. Not differentiable.

    Args:
        state: [batch, heads, head_dim, state] before the window, float32 (or float64).
        x: [batch, window, heads, head_dim].
        dt: [batch, window, heads]; the step sizes are softplus(dt + dt_bias).
        A, D, dt_bias: [heads].
        B: [batch, window, groups, state].
        C: [batch, length, groups, state], of the last tokens alone.

    Returns:
        y [batch, length, heads, head_dim] in ``x``'s dtype.
    """
    dtype = state.dtype
    batch, window, heads, head_dim = x.shape
    length, groups = C.shape[1:3]
    first = window - length
    xf, Bf, Cf = (t.to(dtype) for t in (x, B, C))
    dt = _step_sizes(dt, dt_bias, dtype).transpose(1, 2)  # [b, h, w]
    a = dt * A.to(dtype)[:, None]
    cum = a.cumsum(-1)
    up_to = torch.ones(window, window, dtype=torch.bool, device=x.device).triu_()  # token j is i or later: [i, j]
    exponent = a.unsqueeze(-1).masked_fill(up_to, 0).cumsum(-2)  # from j to i, [b, h, i, j]
    exponent = exponent.masked_fill_(up_to.triu(1), -torch.inf)[..., first:, :]  # [b, h, l, w]
    weights = exponent.exp_().mul_(dt.unsqueeze(2))
    gram = Cf.transpose(1, 2) @ Bf.permute(0, 2, 3, 1)  # C_i.B_j, [b, g, l, w]
    weights = weights.unflatten(1, (groups, -1)).mul_(gram.unsqueeze(2))  # [b, g, r, l, w]
    y = weights.flatten(1, 2) @ xf.transpose(1, 2)  # [b, h, l, p]
    # all heads of a group are columns of one matrix
    by_group = state.view(batch, groups, heads // groups * head_dim, -1)  # [b, g, r * p, n]
    from_state = (Cf.transpose(1, 2) @ by_group.mT).unflatten(-1, (-1, head_dim))  # [b, g, l, r, p]
    from_state = from_state.transpose(2, 3).flatten(1, 2)  # [b, h, l, p]
    y.addcmul_(from_state, cum[..., first:, None].exp()).addcmul_(
        xf[:, first:].transpose(1, 2), D.to(dtype)[:, None, None]
    )
    return y.transpose(1, 2).to(x.dtype)


def ssd_advance(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, counts: Tensor) -> None:
    """Advance each sequence's state over the first tokens of its window, IN PLACE.

    Args:
        state, x, dt, A, B, dt_bias: as `ssd_window`'s.
        counts: int64 [batch], tokens of each sequence, 0 to the window.
    """
    dtype = state.dtype
    batch, window, heads, head_dim = x.shape
    groups = B.shape[2]
    stay = torch.arange(window, device=x.device) < counts[:, None]  # [b, w]
    dt = _step_sizes(dt, dt_bias, dtype) * stay.unsqueeze(-1)
    a = dt * A.to(dtype)
    total = a.sum(1)  # [b, h]
    behind = F.pad(a[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # of the tokens after each, [b, w, h]
    weights = behind.exp_().mul_(dt)
    u = (x.to(dtype) * weights.unsqueeze(-1)).flatten(2).unflatten(2, (groups, -1))  # [b, w, g, r * p]
    state.mul_(total.exp_()[..., None, None])
    by_group = state.view(batch * groups, heads // groups * head_dim, -1)
    by_group.baddbmm_(u.permute(0, 2, 3, 1).flatten(0, 1), B.to(dtype).transpose(1, 2).flatten(0, 1))


def _step_sizes(dt: Tensor, dt_bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.softplus(dt.to(dtype) + dt_bias.to(dtype))
