"""Matrices in FP8: what is rounded, how `F.linear` multiplies them, and a model of each kind of layer in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemotron_h.ops.float8_matrix import FEW, Float8Matrix, takes


def test_values_are_within_half_a_step_of_e4m3() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 32)[:, None]
    weight[3] = 0
    rounded = Float8Matrix.round(weight).widened(torch.float32)
    # three bits behind the point: half a step is 1/16 of a value, and 2^-10 of the largest below the normal numbers
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((rounded - weight).abs() <= torch.maximum(weight.abs() / 16, largest * 2**-10 / 448 * 1.001)).all()
    assert torch.allclose(rounded.abs().amax(dim=1), largest[:, 0], rtol=1e-6)


def test_linear_multiplies_them_and_slices_of_them() -> None:
    rng = torch.Generator().manual_seed(0)
    matrix, x = Float8Matrix.round(torch.randn(32, 16, generator=rng)), torch.randn(2, 3, 16, generator=rng)
    expected = x.double() @ matrix.widened(torch.float64).T
    assert torch.allclose(F.linear(x, matrix).double(), expected, atol=1e-6)
    assert torch.allclose(F.linear(x, matrix[16:]).double(), expected[..., 16:], atol=1e-6)
    many = torch.randn(FEW + 1, 16, generator=rng)
    exact = Float8Matrix.round(many).widened(torch.float64) @ matrix.widened(torch.float64).T
    assert torch.allclose(F.linear(many, matrix).double(), exact, atol=1e-6)
    with pytest.raises(TypeError):
        torch.add(x, matrix)
    with pytest.raises(TypeError):
        F.linear(x, matrix, x[0, 0])  # a bias would be dropped


def test_sizes_that_fp8_matmuls_take() -> None:
    assert takes(torch.empty(32, 16))
    assert not any(takes(torch.empty(size)) for size in ((32, 4), (24, 16), (16,)))
