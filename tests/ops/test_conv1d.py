"""The causal convolution and its backward against one token and one tap at a time in float64."""

from __future__ import annotations

import ops_oracle as oracle
import pytest
import torch
from ops_oracle import relative_error

from nemotron_h.ops import conv1d as module
from nemotron_h.ops.conv1d import causal_conv1d, causal_conv1d_step

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks per call, so that the halo between them is at work."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)


def make(batch, length, channels=12, width=4, without=()):
    values = {
        "x": torch.randn(batch, length, channels),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(batch, width - 1, channels),
    }
    return {k: None if k in without else v.double() for k, v in values.items()}


def run(function, values, dtype, weights, **options):
    inputs = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in values.items()}
    y = function(**inputs, **options)
    wanted = {k: v for k, v in inputs.items() if v is not None}
    grads = torch.autograd.grad((y * weights.to(y.dtype)).sum(), list(wanted.values()))
    return {"y": y, **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def compare(values, dtype, **options):
    weights = torch.randn(values["x"].shape).double()
    expected = run(oracle.conv, values, torch.float64, weights, **options)
    actual = run(causal_conv1d, values, dtype, weights, **options)
    errors = {k: relative_error(actual[k], v) for k, v in expected.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11, 12, 13, 29])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths(length, dtype):
    compare(make(2, length), dtype)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widths(width, dtype):
    compare(make(2, 17, width=width, without=("initial_state",) if width == 1 else ()), dtype)


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")])
@pytest.mark.parametrize("activation", ["silu", None])
def test_optional_inputs(without, activation):
    compare(make(2, 17, without=without), torch.float64, activation=activation)


def documents(cuts, length):
    seq_idx = torch.zeros(1, length, dtype=torch.int32)
    for i, begin in enumerate(cuts):
        seq_idx[:, begin:] = 5 + i
    return seq_idx


@pytest.mark.parametrize("cuts", [[0, 1], [0, 1, 2, 3], [0, 11, 12, 13], [0, 12, 24], [0, 5, 6, 20]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_equal_separate_calls(cuts, dtype):
    length = 30
    values = make(1, length)
    weights = torch.randn(values["x"].shape).double()
    packed = run(causal_conv1d, values, dtype, weights, seq_idx=documents(cuts, length))
    total: dict[str, torch.Tensor] = {}
    for begin, end in zip(cuts, [*cuts[1:], length], strict=True):
        part = {**values, "x": values["x"][:, begin:end]}
        if begin:
            part["initial_state"] = None
        for name, value in run(oracle.conv, part, torch.float64, weights[:, begin:end]).items():
            if name in ("y", "dx"):
                total[name] = torch.cat([total[name], value], dim=1) if name in total else value
            else:
                total[name] = total.get(name, 0) + value
    errors = {k: relative_error(packed[k], v) for k, v in total.items()}
    assert set(errors) == set(packed)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_documents_differ_between_sequences():
    seq_idx = torch.cat([documents(cuts, 30) for cuts in ([0], [0, 3, 14], [0, 29])])
    compare(make(3, 30), torch.float64, seq_idx=seq_idx)
    compare(make(3, 30), torch.float32, seq_idx=seq_idx)


def test_nothing_leaks_from_another_document():
    """Not even what multiplying by zero would let through."""
    values = make(1, 10)
    seq_idx = documents([0, 6], 10)
    clean = causal_conv1d(**values, seq_idx=seq_idx)
    values["x"][:, :6] = torch.nan
    assert torch.equal(causal_conv1d(**values, seq_idx=seq_idx)[:, 6:], clean[:, 6:])


@pytest.mark.parametrize("prefill", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prefill_and_steps_equal_the_whole(prefill, dtype):
    values = {k: v.to(dtype) for k, v in make(2, 17).items()}
    expected = oracle.conv(**{k: v.double() for k, v in values.items()})
    first, state = causal_conv1d(**{**values, "x": values["x"][:, :prefill]}, return_final_state=True)
    ys = [first]
    for t in range(prefill, 17):
        ys.append(causal_conv1d_step(state, values["x"][:, t], values["weight"], values["bias"]).unsqueeze(1))
    assert relative_error(torch.cat(ys, dim=1), expected) < TOLERANCE[dtype]
    assert torch.equal(state, values["x"][:, -3:])


def test_calls_chained_by_the_final_state():
    values = make(2, 17)
    weights = torch.randn(2, 17, 12).double()

    def chained(x, initial_state, **rest):
        a, state = causal_conv1d(x[:, :2], initial_state=initial_state, return_final_state=True, **rest)
        return torch.cat([a, causal_conv1d(x[:, 2:], initial_state=state, **rest)], dim=1)

    expected = run(oracle.conv, values, torch.float64, weights)
    actual = run(chained, values, torch.float64, weights)
    assert max(relative_error(actual[k], v) for k, v in expected.items()) < 1e-12


def test_final_state_holds_the_last_document_only():
    values = make(1, 10)
    _, state = causal_conv1d(**values, seq_idx=documents([0, 9], 10), return_final_state=True)
    assert state[:, :2].abs().max() == 0
    assert torch.equal(state[:, 2], values["x"][:, 9])
    short = {**values, "x": values["x"][:, :2]}
    _, state = causal_conv1d(**short, seq_idx=documents([0, 1], 2), return_final_state=True)
    assert state[:, :2].abs().max() == 0
    _, state = causal_conv1d(**short, seq_idx=documents([0], 2), return_final_state=True)
    assert torch.equal(state[:, 0], values["initial_state"][:, 2])


def test_strided_input_and_memory_order():
    values = make(3, 20)
    wide = torch.randn(20, 3, 40).double().requires_grad_()
    x = wide.transpose(0, 1)[..., 5:17]
    y = causal_conv1d(x, values["weight"], values["bias"])
    assert y.stride(0) < y.stride(1)
    copy = x.detach().clone().requires_grad_()
    expected = oracle.conv(copy, values["weight"], values["bias"])
    assert relative_error(y, expected) < 1e-12
    dy = torch.randn(3, 20, 12).double()
    (grad,) = torch.autograd.grad(y, wide, dy)
    (reference,) = torch.autograd.grad(expected, copy, dy)
    assert relative_error(grad.transpose(0, 1)[..., 5:17], reference) < 1e-12


@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_state"])
def test_gradients_go_only_where_they_are_asked_for(name):
    values = make(1, 20)
    values[name].requires_grad_()
    causal_conv1d(**values).sum().backward()
    assert [k for k, v in values.items() if v.grad is not None] == [name]


def test_bfloat16_input_computes_in_float32():
    values = make(2, 40)
    x = values["x"].bfloat16().requires_grad_()
    y = causal_conv1d(x, values["weight"].float(), values["bias"].float())
    exact = x.detach().double().requires_grad_()
    expected = oracle.conv(exact, values["weight"].float().double(), values["bias"].float().double())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2**-8
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, dy)
    (reference,) = torch.autograd.grad(expected, exact, dy.double())
    assert relative_error(grad, reference) < 2**-8


def test_second_order_is_refused():
    x = make(1, 5)["x"].requires_grad_()
    (grad,) = torch.autograd.grad(causal_conv1d(x, make(1, 5)["weight"]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input_names_the_argument():
    values = make(2, 8)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(values["x"], values["weight"], activation="gelu")
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(values["x"], values["weight"][:-1])
    with pytest.raises(ValueError, match="initial_state must have shape"):
        causal_conv1d(values["x"], values["weight"], initial_state=values["initial_state"][:, 1:])
