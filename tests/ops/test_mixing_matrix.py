"""Matrices of heads against the operations that they stand for, in float64; distances in parts and as one."""

from __future__ import annotations

import math

import pytest
import torch
from ops_oracle import relative_error

from nemotron_h.ops import mixing_matrix
from nemotron_h.ops.mixing_matrix import Mixing, attention_matrix, distance, size, ssd_matrix
from nemotron_h.ops.ssd import ssd_chunk_scan


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_matrix_of_a_scan_is_the_scan() -> None:
    """Four heads, each with a B and C of its own; 70 tokens are more than a chunk of the scan."""
    b, length, heads, p, n = 2, 70, 4, 3, 5
    x, dt, A = _randn(b, length, heads, p), _randn(b, length, heads).abs(), -_randn(heads).abs()
    B, C, D = _randn(b, length, heads, n), _randn(b, length, heads, n) * 1.5, _randn(heads) + 2
    expected = ssd_chunk_scan(x, dt, A, B, C, D=D, dt_softplus=False, chunk_size=16)
    rows = [each.transpose(1, 2).flatten(0, 1) for each in (dt, dt * A, B, C)]
    matrix = ssd_matrix(*rows, D.repeat(b))  # [b x heads, l, l]
    actual = (matrix @ x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, heads)).transpose(1, 2)
    assert relative_error(actual, expected) < 1e-10
    assert (matrix.triu(1) == 0).all()


def test_the_matrix_of_attention_is_softmax() -> None:
    q, k = _randn(3, 9, 4), 2 * _randn(3, 9, 4) + 1
    matrix = attention_matrix(q, k)
    for head in range(3):
        for t in range(9):
            weights = [math.exp(float(q[head, t] @ k[head, s]) / 2) for s in range(t + 1)]
            expected = torch.tensor([weight / sum(weights) for weight in weights] + [0.0] * (8 - t))
            assert (matrix[head, t] - expected).abs().max() < 1e-7
    assert torch.allclose(matrix.sum(-1), torch.ones(3, 9, dtype=torch.float64), rtol=0, atol=1e-12)


def test_distances_and_their_gradients_are_those_of_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two rows of seven."""
    wanted = Mixing(attention_matrix, (_randn(7, 6, 4), _randn(7, 6, 4) + 1))
    factors = [_randn(7, 6).abs(), -_randn(7, 6).abs(), _randn(7, 6, 3), _randn(7, 6, 3) - 1, _randn(7)]
    found = []
    for elements in (1 << 20, 2 * 36):
        monkeypatch.setattr(mixing_matrix, "ELEMENTS", elements)
        leaves = [each.clone().requires_grad_() for each in factors]
        apart = distance(wanted, Mixing(ssd_matrix, tuple(leaves)))
        apart.backward()
        found.append([apart, size(wanted), *(leaf.grad for leaf in leaves)])
    for whole, parts in zip(*found, strict=True):
        assert relative_error(parts, whole) < 1e-12
    matrices = attention_matrix(*wanted.factors) - ssd_matrix(*factors)
    assert float(found[0][0].detach()) == pytest.approx(sum(matrix.square().sum().sqrt() for matrix in matrices))
