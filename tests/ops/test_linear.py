"""The CPU's float32 product against float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from nemotron_h.ops.linear import linear, takes


@pytest.mark.parametrize("shape", [(1, 8, 3), (7, 64, 40), (300, 40, 64), (2, 5, 33, 17), (513, 256, 1296)])
@pytest.mark.parametrize("strided", [False, True])
def test_against_float64(shape: tuple[int, ...], strided: bool) -> None:
    *rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator)
    if strided:
        x = torch.randn(*rows[::-1], inputs, generator=generator).permute(*range(len(rows) - 1, -1, -1), len(rows))
    weight = torch.randn(outputs, inputs, generator=generator)
    dy = torch.randn(*rows, outputs, generator=generator)
    x.requires_grad_()
    weight.requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    y = linear(x, weight)
    expected = torch.einsum("...i,oi->...o", *wide)
    for ours, oracle in zip(
        (y, *torch.autograd.grad(y, (x, weight), dy)),
        (expected, *torch.autograd.grad(expected, wide, dy.double())),
        strict=True,
    ):
        assert ours.shape == oracle.shape
        assert ours.dtype == torch.float32
        assert (ours.double() - oracle).abs().max() < 1e-5 * oracle.abs().max()


def test_gradient_of_one_operand_only() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))


def test_refuses_what_it_cannot_multiply() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert takes(x, weight)
    for dtype in (torch.float64, torch.bfloat16):
        assert not takes(x.to(dtype), weight.to(dtype))
    with pytest.raises(ValueError, match="float32"):
        linear(x.double(), weight.double())
