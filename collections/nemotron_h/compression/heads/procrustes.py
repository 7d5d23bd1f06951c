"""Rotate heads into agreement: orthogonal Procrustes for two of them, generalised Procrustes for a group.

All of it is computed of cross moments X_i^T X_j of what the heads compute, X_i [tokens, d], without the tokens. The
best rotation of X onto Y, and their agreement, are (Schoenemann 1966; U S V^T is the SVD of X^T Y)

    argmin_R |X R - Y|^2 = argmax_R tr(R^T X^T Y) = U V^T,    max = sum of S

Where positions rotate pairs of channels, only rotations of the same pairs commute with them, an angle for each.

Axes: m heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: ours: rounds of a group, and the gain of one, of the heads' energy, that ends them
_ROUNDS, _GAIN = 100, 1e-7


def best_rotation(cross: Tensor, rotary: int = 0) -> Tensor:
    """Return the orthogonal R [..., d, d] that brings X R nearest to Y.

    Args:
        cross: X^T Y, [..., d, d].
        rotary: first channels that positions rotate, channel n with n + rotary / 2; there R is a proper rotation of
            each pair, in the others any orthogonal matrix.
    """
    rotation = torch.zeros_like(cross)
    if rotary < cross.shape[-1]:
        u, _, vt = torch.linalg.svd(cross[..., rotary:, rotary:])
        rotation[..., rotary:, rotary:] = u @ vt
    half = rotary // 2
    aa, ab, ba, bb = (
        cross[..., rows, columns].diagonal(dim1=-2, dim2=-1)
        for rows in (slice(half), slice(half, rotary))
        for columns in (slice(half), slice(half, rotary))
    )
    # [a b] R = [a cos - b sin, a sin + b cos]: tr(R^T cross) = cos (aa + bb) + sin (ab - ba)
    angle = torch.atan2(ab - ba, aa + bb)
    cos, sin = angle.cos(), angle.sin()
    first = torch.arange(half, device=cross.device)
    second = first + half
    rotation[..., first, first], rotation[..., second, second] = cos, cos
    rotation[..., first, second], rotation[..., second, first] = sin, -sin
    return rotation


def agreement(rotation: Tensor, cross: Tensor) -> Tensor:
    """Return tr(R^T X^T Y), [...] of [..., d, d]."""
    return (rotation * cross).sum((-2, -1))


def group_rotations(cross: Tensor, rotary: int = 0) -> Tensor:
    """Return the rotations [m, d, d] that bring the heads of a group nearest to their mean.

    Each head in turn is rotated onto the sum of the others, which never lowers the sum of agreements (ten Berge 1977),
    until no round raises it. It starts from the head that agrees most with all others, whose own rotation is 1.

    Args:
        cross: X_i^T X_j, [m, m, d, d].
        rotary: as of `best_rotation`.
    """
    heads, dim = len(cross), cross.shape[-1]
    onto = best_rotation(cross, rotary)  # [m, m, d, d]
    first = int(agreement(onto, cross).sum(0).argmax())
    rotations = onto[:, first].clone()
    rotations[first] = torch.eye(dim, dtype=cross.dtype, device=cross.device)
    enough = _GAIN * energy(cross)
    total = shared_energy(cross, rotations)
    for _ in range(_ROUNDS if heads > 2 else 0):  # two are at the optimum
        for head in range(heads):
            others = [other for other in range(heads) if other != head]
            rotations[head] = best_rotation((cross[head, others] @ rotations[others]).sum(0), rotary)
        before, total = total, shared_energy(cross, rotations)
        if total - before <= enough:
            break
    return rotations @ rotations[first].mT.clone()


def energies(cross: Tensor) -> Tensor:
    """Return the sum of squares of what each head computes, [m], of [m, m, d, d]."""
    return cross.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum(1)


def energy(cross: Tensor) -> float:
    """Return the sum of squares of what the heads compute, of [m, m, d, d]."""
    return float(energies(cross).sum())


def shared_energy(cross: Tensor, rotations: Tensor) -> float:
    """Return the part of `energy` that stays when each rotated head becomes their mean: m |mean|^2."""
    # sum over i, j of tr(R_i^T X_i^T X_j R_j)
    return float(torch.einsum("iab,ijac,jcb->", rotations, cross, rotations)) / len(cross)
