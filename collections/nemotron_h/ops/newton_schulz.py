"""Orthogonalize matrices by Newton-Schulz steps, as Muon does to its momentum (arXiv 2502.16982, 2.1).

    X <- M / |M|_F;   per step  A = X X^T,  X <- a X + (b A + c A^2) X

With M = U S V^T every step maps the singular values S by a s + b s^3 + c s^5 and leaves U and V: the result is near
U V^T. X is bfloat16, sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: name of a set -> (a, b, c) of every step
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Keller Jordan's, of Moonlight: singular values end in 0.7 to 1.2
    "simple": ((3.4445, -4.7750, 2.0315),) * 5,
    # Jiacheng You's: one per step
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # arXiv 2505.16932, the first five, for singular values up to 1.01
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
        )
    ),
}
#: of a norm, so that a matrix of zeros stays one
EPSILON = 1e-7


def orthogonalize(matrix: Tensor, coefficients: str = "simple") -> Tensor:
    """Return the matrix with all singular values near 1, [rows, columns] in bfloat16.

    Args:
        matrix: [rows, columns] of any dtype.
        coefficients: a key of `COEFFICIENTS`.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # X X^T of the shorter side
    norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).clamp(min=EPSILON)
    x = (x / norm).bfloat16()
    for a, b, c in COEFFICIENTS[coefficients]:
        squares = _addmm(None, x, x.T, 0, 1)
        x = _addmm(x, _addmm(squares, squares, squares, b, c), x, a, 1)
    return (x.T if tall else x).contiguous()


def _addmm(added: Tensor | None, x: Tensor, y: Tensor, beta: float, alpha: float) -> Tensor:
    """Return beta * added + alpha * x y, summed in float32 and rounded once."""
    if x.device.type == "cpu":  # many have no bfloat16 units; widening is exact
        x, y, added = x.float(), y.float(), None if added is None else added.float()
    if added is None:
        return (x @ y).bfloat16()
    return torch.addmm(added, x, y, beta=beta, alpha=alpha).bfloat16()


def scale(rows: int, columns: int) -> float:
    """Return the factor that gives an orthogonal matrix the RMS of AdamW's updates, 0.2: 0.2 sqrt(max(rows, columns)).

    A full-rank [rows, columns] with singular values 1 has RMS 1 / sqrt(max(rows, columns)).
    """
    return 0.2 * max(rows, columns) ** 0.5
