"""RMSNorm, plain and gated over groups, against float64."""

from __future__ import annotations

import ops_oracle as oracle
import pytest
import torch
from ops_oracle import relative_error

from nemotron_h.ops import norm as module
from nemotron_h.ops.norm import gated_rms_norm, rms_norm

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.fixture(autouse=True, params=[1, 1 << 18], ids=["blocks", "one block"])
def _blocks(monkeypatch, request):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param)


def compare(y, z, weight, group_size, dtype):
    names = ("y", "z", "weight") if z is not None else ("y", "weight")
    values = dict(zip(("y", "z", "weight"), (y, z, weight), strict=True))
    exact = {k: values[k].detach().double().clone().requires_grad_() for k in names}
    cast = {k: values[k].detach().to(dtype).requires_grad_() for k in names}
    dout = torch.randn(y.shape).double()
    expected = oracle.gated_rms_norm(exact["y"], exact.get("z"), exact["weight"], group_size)
    if z is None:
        actual = rms_norm(cast["y"], cast["weight"])
    else:
        actual = gated_rms_norm(cast["y"], cast["z"], cast["weight"], group_size=group_size)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    grads = torch.autograd.grad(actual, list(cast.values()), dout.to(dtype))
    references = torch.autograd.grad(expected, list(exact.values()), dout)
    for name, grad, reference in zip(names, grads, references, strict=True):
        assert relative_error(grad, reference) < TOLERANCE[dtype], name


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated(groups, dtype):
    y, z, weight = torch.randn(3, 5, 64), torch.randn(3, 5, 64), torch.randn(64)
    compare(y.double(), z.double(), weight.double(), 64 // groups, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain(dtype):
    compare(torch.randn(3, 5, 64).double(), None, torch.randn(64).double(), 64, dtype)


def test_strided_input_and_memory_order():
    y = torch.randn(5, 3, 32).double().transpose(0, 1)
    z = torch.randn(5, 3, 80).double().transpose(0, 1)[..., 3:35]
    compare(y, z, torch.randn(32).double(), 16, torch.float64)
    assert gated_rms_norm(y, z, torch.ones(32), group_size=16).stride() == y.stride()


def test_two_dimensions_and_no_rows():
    weight = torch.randn(8).double()
    compare(torch.randn(4, 8).double(), torch.randn(4, 8).double(), weight, 4, torch.float64)
    assert rms_norm(torch.randn(0, 8).double(), weight).shape == (0, 8)


def test_small_rows_feel_eps():
    compare(1e-3 * torch.randn(4, 8).double(), None, torch.randn(8).double(), 8, torch.float64)


def test_bfloat16_computes_in_float32():
    y, z, weight = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16(), torch.randn(64)
    y.requires_grad_()
    out = gated_rms_norm(y, z, weight, group_size=32)
    exact = y.detach().double().requires_grad_()
    expected = oracle.gated_rms_norm(exact, z.double(), weight.double(), 32)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < 2**-8
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, y, dout)
    (reference,) = torch.autograd.grad(expected, exact, dout.double())
    assert relative_error(grad, reference) < 2**-8


def test_gradients_go_only_where_they_are_asked_for():
    y, z, weight = torch.randn(2, 8), torch.randn(2, 8, requires_grad=True), torch.randn(8)
    gated_rms_norm(y, z, weight, group_size=4).sum().backward()
    assert z.grad is not None
    assert y.grad is None
    assert weight.grad is None


def test_bad_input_names_the_problem():
    with pytest.raises(ValueError, match="groups of 3"):
        gated_rms_norm(torch.randn(2, 8), torch.randn(2, 8), torch.randn(8), group_size=3)
    with pytest.raises(ValueError, match="one shape"):
        gated_rms_norm(torch.randn(2, 8), torch.randn(2, 4), torch.randn(8), group_size=4)
    with pytest.raises(ValueError, match="weight must have shape"):
        rms_norm(torch.randn(2, 8), torch.randn(4))
