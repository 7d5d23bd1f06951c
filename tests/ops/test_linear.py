"""The CPU's float32 product, and the bfloat16 one through it, against float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from nemotron_h.ops import linear as module
from nemotron_h.ops.linear import linear, takes

WIDE = (torch.float32, 1e-5)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, float]:
    """As on a processor that is slower in bfloat16; blocks of a few rows."""
    monkeypatch.setattr(module, "widens_bfloat16", lambda: True)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 16)
    return torch.bfloat16, 2.0**-8  # half of its last digit


@pytest.mark.parametrize("shape", [(1, 8, 3), (7, 64, 40), (300, 40, 64), (2, 5, 33, 17), (513, 256, 1296)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_against_float64(shape: tuple[int, ...], strided: bool, kind: str, widened: tuple[torch.dtype, float]) -> None:
    dtype, tolerance = WIDE if kind == "float32" else widened
    *rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inputs, generator=generator)
    if strided:
        x = torch.randn(*rows[::-1], inputs, generator=generator).permute(*range(len(rows) - 1, -1, -1), len(rows))
    weight = torch.randn(outputs, inputs, generator=generator)
    dy = torch.randn(*rows, outputs, generator=generator)
    x, weight, dy = (t.to(dtype) for t in (x, weight, dy))
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
        assert ours.dtype == dtype
        assert (ours.double() - oracle).abs().max() < tolerance * oracle.abs().max()
        if kind == "bfloat16":  # each is rounded once, from a float32 sum
            off = (ours.double() - oracle).abs() > tolerance * oracle.abs() + 1e-5 * oracle.abs().max()
            assert not off.any()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_widened_is_torchs_own_product(widened: tuple[torch.dtype, float]) -> None:
    x, weight = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16() for size in ((300, 40), (64, 40))
    )
    ours, torchs = linear(x, weight), torch.nn.functional.linear(x, weight)
    assert (ours != torchs).float().mean() < 0.01  # sums of another order round elsewhere now and then
    torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=1e-4)


def test_gradient_of_one_operand_only() -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))


def test_refuses_what_it_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "widens_bfloat16", lambda: False)
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert takes(x, weight)
    for dtype in (torch.float64, torch.bfloat16):
        assert not takes(x.to(dtype), weight.to(dtype))
    with pytest.raises(ValueError, match="float32"):
        linear(x.double(), weight.double())


@pytest.mark.parametrize(
    ("machine", "amx", "avx512_bf16", "name", "widens"),
    [
        ("x86_64", False, False, "Intel Core i7", True),
        ("AMD64", False, False, "AMD Ryzen 5", True),
        ("x86_64", False, True, "Intel Xeon", True),
        ("x86_64", True, True, "Intel Xeon", False),
        ("x86_64", False, True, "AMD EPYC", False),
        ("x86_64", False, True, None, False),  # a torch that does not know the name
        ("arm64", False, False, "Apple M3", False),
    ],
)
def test_which_processors_widen(
    machine: str, amx: bool, avx512_bf16: bool, name: str | None, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    if name is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert module.widens_bfloat16.__wrapped__() is widens


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_no_rows(kind: str, widened: tuple[torch.dtype, float]) -> None:
    """As an expert without tokens: nothing, and a gradient of zeros."""
    dtype = torch.float32 if kind == "float32" else widened[0]
    x, weight = (torch.ones(rows, 8, dtype=dtype, requires_grad=True) for rows in (0, 3))
    y = linear(x, weight)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(3, 8, dtype=dtype))
