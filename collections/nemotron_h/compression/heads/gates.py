"""Gates that lead a layer from its key-value heads to shared ones while it trains (arXiv 2412.20677).

Each key-value head i of the parent has a gate z_i in [0, 1], hard concrete (Louizos et al. 2018, arXiv 1712.01312, 10
to 12), with log_alpha a_i, temperature T and a stretch to [GAMMA, ZETA]:

    s = sigmoid((logit u + a) / T),    u ~ U(0.5 - noise, 0.5 + noise)
    z = min(1, max(0, s (ZETA - GAMMA) + GAMMA)),    P(z = 0) = sigmoid(T log(-GAMMA / ZETA) - a)

The expected sparsity e, the mean of P(z = 0), follows a target t that rises from its first value to 1:

    penalty = m1 (t - e) + m2 (t - e)^2,    multipliers m, 1 at first, by gradient ascent; or |t - e| + (t - e)^2

The schedule, of the share of steps that are done, is that of the paper's code (fpcsong/mha2gqa) up to `_QUIET`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: how the penalty is weighed: by multipliers that are trained, which the paper's code defines and does not use; or by 1
MULTIPLIERS = ("trained", "fixed")
#: as there: temperature, stretch of 1.005, log_alpha at first (its mean, as gates open to 1; its deviation) and at most
_T = 1 / 3
_GAMMA, _ZETA = -0.0025, 1.0025
_FIRST, _DEVIATION, _MOST = 6 * _T, 0.1, 8.0
#: as there: shares of the steps at which the target has risen to 1, and the noise has fallen to 0
_WARM, _QUIET = 0.3, 0.8
#: ours: share at which a ceiling, which falls from 1 at `_QUIET`, has closed every gate whatever was learnt
_CLOSED = 0.9
#: ours: learning rate of log_alpha and multipliers, times the number of steps (there 1e-2, in 11,530 steps or more)
_TRAVEL = 40.0


class Gates:
    """Gates of a layer.

    Args:
        heads: key-value heads of the parent, a gate each.
        multipliers: of `MULTIPLIERS`.
        seed: of first values and noise.
    Attributes:
        log_alpha: [heads].
        multipliers: m1 and m2, [2]; None are fixed.
        largest: gate at the moment at which the noise is gone; what a ceiling has to close.
    """

    def __init__(self, heads: int, multipliers: str = MULTIPLIERS[0], seed: int = 0) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self.log_alpha = torch.normal(_FIRST, _DEVIATION, (heads,), generator=self._rng)
        self.multipliers = torch.ones(2) if multipliers == MULTIPLIERS[0] else None
        self.largest = 1.0
        self._start = self._target = float(self.sparsity())

    def parameter_groups(self, steps: int) -> list[dict[str, Any]]:
        """Return what trains in so many steps, as an optimizer's groups."""
        lr = _TRAVEL / steps
        groups: list[dict[str, Any]] = [{"params": [self.log_alpha], "lr": lr}]
        if self.multipliers is not None:
            groups.append({"params": [self.multipliers], "lr": lr, "maximize": True})
        return groups

    def begin(self, done: float) -> Tensor:
        """Return the gates [heads] of a step, through which gradients pass as if nothing were clamped.

        Args:
            done: share of the steps before it.
        """
        with torch.no_grad():
            self.log_alpha.clamp_(-_MOST, _MOST)
        self._target = self._start + (1 - self._start) * min(1.0, done / _WARM)
        noise = 0.5 * max(0.0, 1 - done / _QUIET)
        u = 0.5 + noise * (2 * torch.rand(self.log_alpha.shape, generator=self._rng) - 1)
        s = ((torch.logit(u, eps=1e-6) + self.log_alpha) / _T).sigmoid() * (_ZETA - _GAMMA) + _GAMMA
        if noise:
            self.largest = float(s.detach().max().clamp(0, 1))
        ceiling = min(1.0, max(0.0, (_CLOSED - done) / (_CLOSED - _QUIET)))
        return s + (s.clamp(0, ceiling) - s).detach()

    def sparsity(self) -> Tensor:
        """Return the expected share of gates that are 0, a scalar."""
        return (_T * math.log(-_GAMMA / _ZETA) - self.log_alpha).sigmoid().mean()

    def penalty(self) -> Tensor:
        """Return what is added to the loss of the step that has begun, a scalar."""
        apart = self._target - self.sparsity()
        if self.multipliers is None:
            return apart.abs() + apart.square()
        return (self.multipliers * torch.stack([apart, apart.square()])).sum()
