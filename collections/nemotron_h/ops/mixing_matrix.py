"""Matrices by which a sequence mixer mixes tokens, head by head: y = M x over the tokens of a window.

    attention   M[t, s] = softmax over s <= t of q_t . k_s / sqrt(d)
    Mamba-2     M[t, s] = (C_t . B_s) exp(a_{s+1} + ... + a_t) dt_s for s <= t,  and D more where s = t;  a = dt A

They cost l^2 elements a head: for training one mixer to mix as another (MOHAWK, arXiv 2408.10189), not for running one.

Axes: m rows (heads of every sequence), l tokens, d channels of a head of attention, n state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor

#: ours: elements of matrices that are made at once (float32: 128 MiB)
ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Mixing:
    """Matrices of every head of every sequence, as what they are made of.

    Attributes:
        matrix: makes [m, l, l] of the factors.
        factors: tensors [m, ...].
    """

    matrix: Callable[..., Tensor]
    factors: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Mixing:
        """Return them in another dtype."""
        return Mixing(self.matrix, tuple(factor.to(dtype) for factor in self.factors))

    def parts(self, rows: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the factors of so many rows at a time."""
        return zip(*(factor.split(rows) for factor in self.factors), strict=True)


def attention_matrix(q: Tensor, k: Tensor) -> Tensor:
    """Return the matrices [m, l, l] of queries and keys [m, l, d]."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(_after(scores), -torch.inf).softmax(-1)


def ssd_matrix(dt: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Return the matrices [m, l, l] of a scan.

    Args:
        dt: step sizes, [m, l].
        a: logarithm of each step's decay, dt A, [m, l].
        B, C: [m, l, n].
        D: of the skip, [m].
    """
    total = a.cumsum(-1)
    decay = total.unsqueeze(-1) - total.unsqueeze(-2)  # [m, l, l]
    decay = decay.masked_fill(_after(decay), -torch.inf).exp()
    return torch.diag_embed(D.unsqueeze(-1).expand_as(dt)) + (C @ B.mT) * decay * dt.unsqueeze(-2)


def distance(one: Mixing, other: Mixing) -> Tensor:
    """Return the sum over rows of the Frobenius norm of the difference of two matrices. What is made of the factors is
    made again in the backward pass.
    """
    rows = _rows(one)
    pairs = zip(one.parts(rows), other.parts(rows), strict=True)

    def norms(*factors: Tensor) -> Tensor:
        split = len(one.factors)
        apart = one.matrix(*factors[:split]) - other.matrix(*factors[split:])
        return torch.linalg.matrix_norm(apart).sum()

    checkpoint = torch.utils.checkpoint.checkpoint
    return torch.stack([checkpoint(norms, *mine, *theirs, use_reentrant=False) for mine, theirs in pairs]).sum()


def size(mixing: Mixing) -> Tensor:
    """Return the sum over rows of the matrices' Frobenius norms."""
    norms = [torch.linalg.matrix_norm(mixing.matrix(*part)).sum() for part in mixing.parts(_rows(mixing))]
    return torch.stack(norms).sum()


def _rows(mixing: Mixing) -> int:
    return max(1, ELEMENTS // mixing.factors[0].shape[1] ** 2)


def _after(matrix: Tensor) -> Tensor:
    """Return where a token would read one after it, [l, l]."""
    return torch.ones(matrix.shape[-2:], dtype=torch.bool, device=matrix.device).triu(1)
