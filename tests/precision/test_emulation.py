"""Emulated FP8 against an oracle in numpy: formats, scales, and the three products of a linear layer."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from nemotron_h.precision import scaling
from nemotron_h.precision.emulation import fp8_linear
from nemotron_h.precision.scaling import E4M3, E5M2, quantize_blocks, quantize_tensor

DTYPES = {"e4m3": E4M3, "e5m2": E5M2}
RECIPES = ("fp8_current_scaling", "fp8_blockwise")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Scale 1, a few of them 30 times that."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng)
    return torch.where(torch.rand(shape, generator=rng) < 0.002, 30 * x, x).to(dtype)


def relative(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", DTYPES)
def test_every_value_of_a_format_and_every_tie(name: str) -> None:
    grid = oracle.magnitudes(name)
    between = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, between, np.nextafter(between, 0), -between, [grid[-1] * 1.2, -1e9, np.inf]])
    actual = scaling.cast(torch.from_numpy(x).float(), DTYPES[name])
    np.testing.assert_array_equal(scaling.decode(actual).numpy(), oracle.round_to(x.astype(np.float32), name))
    assert torch.isnan(scaling.decode(scaling.cast(torch.tensor([torch.nan]), DTYPES[name]))).all()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.3, 7.7, 3e-20, 7e20])
def test_tensor_scale(name: str, factor: float) -> None:
    x = normal(48, 80) * factor
    values, inverse = oracle.quantized(x.float().numpy(), name)
    actual = quantize_tensor(x, DTYPES[name])
    assert actual.scale_inv.item() == inverse.item()
    assert relative(actual.dequantize(), values) < 1e-6
    assert actual.values.dtype == DTYPES[name]
    assert scaling.decode(actual.values).abs().max() == oracle.FORMATS[name][3], "the largest value fills the format"


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)])
def test_block_scales(block: tuple[int, int]) -> None:
    x = normal(272, 400)
    x[:128, 128:256] = 0  # a block of nothing
    values, inverse = oracle.quantized(x.float().numpy(), "e4m3", block, power_of_2=True)
    actual = quantize_blocks(x, E4M3, block)
    np.testing.assert_array_equal(actual.scale_inv.numpy(), inverse)
    np.testing.assert_array_equal(actual.dequantize().numpy(), values)


def test_float32_block_scales_as_transformer_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scaling.BLOCK_FP32, "1")
    x = normal(16, 128)
    np.testing.assert_array_equal(
        quantize_blocks(x, E4M3, (1, 128)).scale_inv.numpy(), oracle.quantized(x.float().numpy(), "e4m3", (1, 128))[1]
    )


@pytest.mark.parametrize(("amax", "scale"), [(0.0, 1.0), (torch.inf, 1.0), (torch.nan, 1.0), (1e-45, 3.4028235e38)])
def test_amax_that_gives_no_scale(amax: float, scale: float) -> None:
    largest = torch.finfo(torch.float32).max
    assert scaling.scale_from_amax(torch.tensor(amax), E4M3, largest, False).item() == pytest.approx(scale)
    power = scaling.scale_from_amax(torch.tensor(amax), E4M3, largest, True).item()
    assert power == (1 if scale == 1 else 2.0**127)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(32, 64, 48), (272, 400, 144)], ids=["one block", "several"])
def test_products(recipe: str, shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    x = normal(2, tokens // 2, inputs, seed=1).float().requires_grad_()
    weight = normal(outputs, inputs, seed=2).float().requires_grad_()
    dy = normal(2, tokens // 2, outputs, seed=3).float()
    y = fp8_linear(x, weight, recipe)
    y.backward(dy)
    flat = [t.detach().reshape(-1, t.shape[-1]).numpy() for t in (x, weight, dy)]
    expected = oracle.linear(recipe, *flat)
    for name, actual in (("y", y), ("dx", x.grad), ("dw", weight.grad)):
        assert relative(actual.reshape(expected[name].shape), expected[name]) < 2e-6, name
    exact = {"y": flat[0] @ flat[1].T, "dx": flat[2] @ flat[1], "dw": flat[2].T @ flat[0]}
    for name, product in exact.items():  # FP8 shows, or the comparison above would be easy
        assert 1e-3 < np.abs(expected[name] - product).max() / np.abs(product).max() < 0.1, name


def test_gradients_are_e5m2_in_current_scaling_and_e4m3_in_blockwise() -> None:
    """A gradient that E4M3 holds exactly and E5M2 does not."""
    eye = torch.eye(16)
    dy = torch.full((16, 16), 448.0)
    dy[0, 0] = 416.0  # 1.625 * 2^8: three bits of mantissa
    for recipe, kept in (("fp8_current_scaling", False), ("fp8_blockwise", True)):
        x, weight = eye.clone().requires_grad_(), eye.clone().requires_grad_()
        fp8_linear(x, weight, recipe).backward(dy)
        assert torch.equal(x.grad, dy) is kept
        assert torch.equal(weight.grad, dy) is kept


def test_zeros_stay_zeros() -> None:
    for recipe in RECIPES:
        x, weight = torch.zeros(32, 16, requires_grad=True), torch.zeros(48, 16, requires_grad=True)
        y = fp8_linear(x, weight, recipe)
        y.backward(torch.zeros_like(y))
        assert not y.any()
        assert not x.grad.any()
        assert not weight.grad.any()


def test_the_output_has_the_inputs_dtype_and_a_frozen_weight_no_gradient() -> None:
    x, weight = normal(16, 32).requires_grad_(), normal(16, 32)
    y = fp8_linear(x, weight, "fp8_current_scaling")
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad) == (torch.bfloat16, torch.bfloat16, None)
