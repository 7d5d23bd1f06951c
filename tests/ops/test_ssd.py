"""The chunked scan and its backward against the token-by-token recurrence in float64."""

from __future__ import annotations

import ops_oracle as oracle
import pytest
import torch
from ops_oracle import relative_error

from nemotron_h.ops import ssd as module
from nemotron_h.ops.ssd import ssd_chunk_scan, ssd_step

CHUNK = 16
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def make(batch, length, *, heads=8, head_dim=4, groups=2, n=6, speed=1.0, without=()):
    """Scale-1 inputs in float64; ``speed`` sets the mean log-decay per token."""
    values = {
        "x": torch.randn(batch, length, heads, head_dim),
        "dt": torch.randn(batch, length, heads),
        "A": -speed * (0.5 + torch.rand(heads)),
        "B": torch.randn(batch, length, groups, n),
        "C": torch.randn(batch, length, groups, n),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads),
        "initial_state": torch.randn(batch, heads, head_dim, n),
    }
    return {k: None if k in without else v.double() for k, v in values.items()}


def run(function, values, dtype, *, seq_idx=None, weights=None, **options):
    """y, final state, and the gradients of their weighted sum, by name."""
    inputs = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in values.items()}
    y, final = function(**inputs, seq_idx=seq_idx, **options)
    wy, wf = weights
    loss = (y * wy.to(y.dtype)).sum() + (final * wf.to(final.dtype)).sum()
    wanted = {k: v for k, v in inputs.items() if v is not None}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"y": y, "final": final, **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def ours(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, seq_idx=None, chunk_size=CHUNK, **options):
    return ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        chunk_size=chunk_size,
        initial_state=initial_state,
        seq_idx=seq_idx,
        return_final_state=True,
        **options,
    )


def compare(values, dtype, *, seq_idx=None, **options):
    b, length, h, p = values["x"].shape
    weights = (torch.randn(b, length, h, p).double(), torch.randn(b, h, p, values["B"].shape[-1]).double())
    oracle_options = {k: v for k, v in options.items() if k == "dt_softplus"}
    expected = run(oracle.ssd, values, torch.float64, seq_idx=seq_idx, weights=weights, **oracle_options)
    actual = run(ours, values, dtype, seq_idx=seq_idx, weights=weights, **options)
    errors = {k: relative_error(actual[k], v) for k, v in expected.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_around_chunk_edges(length, dtype):
    compare(make(2, length), dtype)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups(groups, dtype):
    compare(make(2, 40, groups=groups), dtype)


def test_the_widths_of_the_family():
    """Heads of 64 and 80 channels, a state of 128."""
    for head_dim in (64, 80):
        compare(make(1, 40, heads=4, head_dim=head_dim, n=128), torch.float32)


@pytest.mark.parametrize("speed", [1e-3, 0.05, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slow_and_fast_decay(speed, dtype):
    compare(make(2, 70, speed=speed), dtype, chunk_size=None)


@pytest.mark.parametrize("without", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_optional_inputs(without):
    compare(make(2, 2 * CHUNK + 3, without=without), torch.float64)


def test_dt_without_softplus():
    values = make(2, 2 * CHUNK + 3)
    values["dt"], values["dt_bias"] = values["dt"].abs(), values["dt_bias"].abs()
    compare(values, torch.float64, dt_softplus=False)


@pytest.mark.parametrize("chunk", [1, 3, 32, 64, 128, 1000])
def test_chunk_size_changes_rounding_only(chunk):
    compare(make(1, 131), torch.float64, chunk_size=chunk)


@pytest.mark.parametrize("elements", [1, 8 * CHUNK * CHUNK * 3])
def test_segments_and_blocks_of_sequences(monkeypatch, elements):
    """Small segments: the state crosses them; large ones: several sequences share one."""
    monkeypatch.setattr(module, "SEGMENT_ELEMENTS", elements)
    compare(make(5, 4 * CHUNK + 3), torch.float64)
    compare(make(5, CHUNK), torch.float64)


def test_no_overflow_where_decays_are_extreme():
    values = make(1, 64, speed=1e4)
    y = ssd_chunk_scan(*(values[k].float() for k in NAMES[:5]), chunk_size=64)
    assert y.isfinite().all()


# document boundaries: at a chunk edge, around it, and documents of one token
CUTS = {
    "inside chunks": [0, 5, 20, 37],
    "at chunk edges": [0, CHUNK, 2 * CHUNK],
    "around chunk edges": [0, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 1],
    "single tokens": [0, 1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1],
    "longer than a chunk": [0, 7],
}


def documents(cuts, length, number_from=0):
    seq_idx = torch.zeros(1, length, dtype=torch.int32)
    for i, begin in enumerate(cuts):
        seq_idx[:, begin:] = number_from + 2 * i  # numbers need not be consecutive
    return seq_idx


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_documents_equal_separate_calls(cuts, dtype):
    """Forward and every gradient of packed documents are those of the documents one by one."""
    length = 3 * CHUNK + 5
    values = make(1, length)
    seq_idx = documents(cuts, length, number_from=3)
    wy = torch.randn(values["x"].shape).double()
    wf = torch.randn(values["initial_state"].shape).double()
    packed = run(ours, values, dtype, seq_idx=seq_idx, weights=(wy, wf))

    total: dict[str, torch.Tensor] = {}
    ends = [*cuts[1:], length]
    for begin, end in zip(cuts, ends, strict=True):
        part = {k: v[:, begin:end] if k in ("x", "dt", "B", "C") else v for k, v in values.items()}
        if begin:
            part["initial_state"] = None
        wf_part = wf if end == length else torch.zeros_like(wf)
        alone = run(oracle.ssd, part, torch.float64, weights=(wy[:, begin:end], wf_part))
        for name, value in alone.items():
            if name in ("y", "dx", "ddt", "dB", "dC"):
                total[name] = torch.cat([total[name], value], dim=1) if name in total else value
            elif name == "final":
                total[name] = value
            else:
                total[name] = total.get(name, 0) + value
    errors = {k: relative_error(packed[k], v) for k, v in total.items() if v.abs().max() > 0}
    assert set(errors) == set(packed)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_documents_differ_between_sequences():
    values = make(3, 2 * CHUNK + 5)
    seq_idx = torch.cat([documents(cuts, 2 * CHUNK + 5) for cuts in ([0], [0, 3, CHUNK], [0, 2 * CHUNK + 4])])
    compare(values, torch.float64, seq_idx=seq_idx)
    compare(values, torch.float32, seq_idx=seq_idx)


def test_no_gradient_crosses_a_boundary():
    values = {k: v.requires_grad_() for k, v in make(1, 20).items()}
    y, _ = ours(**values, seq_idx=documents([0, 9], 20))
    y[:, 9:].sum().backward()
    assert values["x"].grad[:, :9].abs().max() == 0
    assert values["initial_state"].grad.abs().max() == 0
    assert values["x"].grad[:, 9:].abs().min() > 0


def step_all(values, state, begin, end):
    ys = []
    for t in range(begin, end):
        token = {k: values[k][:, t] for k in ("x", "dt", "B", "C")}
        ys.append(
            ssd_step(
                state, token["x"], token["dt"], values["A"], token["B"], token["C"], values["D"], values["dt_bias"]
            )
        )
    return torch.stack(ys, dim=1)


@pytest.mark.parametrize("prefill", [0, 1, CHUNK, CHUNK + 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_prefill_and_steps_equal_the_whole(prefill, dtype, tolerance):
    values = {k: v.to(dtype) for k, v in make(2, 2 * CHUNK + 3, groups=4).items()}
    y, final = oracle.ssd(**{k: v.double() for k, v in values.items()})
    state = values["initial_state"].clone()
    parts = []
    if prefill:
        head = {k: v[:, :prefill] if k in ("x", "dt", "B", "C") else v for k, v in values.items()}
        first, state = ours(**head)
        parts.append(first)
    address = state.data_ptr()
    parts.append(step_all(values, state, prefill, y.shape[1]))
    assert state.data_ptr() == address
    assert relative_error(torch.cat(parts, dim=1), y) < tolerance
    assert relative_error(state, final) < tolerance


def test_step_without_optional_inputs():
    values = make(2, 1, without=("D", "dt_bias"))
    y, final = oracle.ssd(**values)
    state = values["initial_state"].clone()
    out = ssd_step(state, values["x"][:, 0], values["dt"][:, 0], values["A"], values["B"][:, 0], values["C"][:, 0])
    assert relative_error(out, y[:, 0]) < 1e-12
    assert relative_error(state, final) < 1e-12


def test_strided_inputs_and_memory_order():
    """Views of [length, batch, channels] activations, as the mixer passes them, work and come back as such views."""
    values = make(2, 37)
    heads, head_dim, groups, n = 8, 4, 2, 6
    parts = [values["x"].flatten(2), values["B"].flatten(2), values["C"].flatten(2), values["dt"]]
    merged = torch.cat(parts, dim=-1).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    x, B, C, dt = merged.split([heads * head_dim, groups * n, groups * n, heads], dim=-1)
    views = {
        "x": x.unflatten(-1, (heads, head_dim)),
        "B": B.unflatten(-1, (groups, n)),
        "C": C.unflatten(-1, (groups, n)),
    }
    assert not views["x"].is_contiguous()
    y, _ = ours(**{**values, **views, "dt": dt})
    assert y.stride(0) < y.stride(1)
    assert relative_error(y, oracle.ssd(**values)[0]) < 1e-12
    dy = torch.randn_like(y)[:, :, :, torch.arange(head_dim)]
    (grad,) = torch.autograd.grad(y, merged, dy)
    clean = {k: v.clone().requires_grad_() for k, v in values.items()}
    expected = torch.autograd.grad(oracle.ssd(**clean)[0], [clean[k] for k in ("x", "B", "C", "dt")], dy)
    assert relative_error(grad, torch.cat([expected[i].flatten(2) for i in range(4)], dim=-1)) < 1e-12


def test_expanded_gradient():
    values = {k: v.requires_grad_() for k, v in make(2, 20).items()}
    ours(**values)[0].sum().backward()
    clean = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
    oracle.ssd(**clean)[0].sum().backward()
    assert relative_error(values["x"].grad, clean["x"].grad) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_only_where_they_are_asked_for(name):
    values = make(1, 20)
    clean = {k: v.clone() for k, v in values.items()}
    values[name].requires_grad_()
    clean[name].requires_grad_()
    ours(**values)[0].square().sum().backward()
    oracle.ssd(**clean)[0].square().sum().backward()
    assert [k for k, v in values.items() if v.grad is not None] == [name]
    assert relative_error(values[name].grad, clean[name].grad) < 1e-10


def test_gradient_of_the_final_state_alone():
    values = {k: v.requires_grad_() for k, v in make(1, 20).items()}
    clean = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
    ours(**values)[1].square().sum().backward()
    oracle.ssd(**clean)[1].square().sum().backward()
    for name in ("x", "dt", "A", "B", "dt_bias", "initial_state"):
        assert relative_error(values[name].grad, clean[name].grad) < 1e-10


def test_second_order_is_refused():
    values = {k: v.requires_grad_() for k, v in make(1, 5).items()}
    (grad,) = torch.autograd.grad(ours(**values)[0].square().sum(), values["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bfloat16_inputs_compute_in_float32():
    """With inputs that bfloat16 holds exactly, only the outputs' own rounding (2^-9) is left."""
    values = make(2, 3 * CHUNK + 5)
    low = {k: v.bfloat16().requires_grad_() for k, v in values.items() if k in ("x", "dt", "B", "C")}
    rest = {k: v.float().requires_grad_() for k, v in values.items() if k not in low}
    exact = {k: v.detach().double().requires_grad_() for k, v in {**low, **rest}.items()}
    y, final = ours(**low, **rest)
    expected, expected_final = oracle.ssd(**exact)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert relative_error(y, expected) < 2**-8
    assert relative_error(final, expected_final) < 1e-5
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, [*low.values(), *rest.values()], dy)
    wanted = torch.autograd.grad(expected, [exact[k] for k in (*low, *rest)], dy.double())
    for tensor, grad, reference in zip([*low.values(), *rest.values()], actual, wanted, strict=True):
        assert grad.dtype == tensor.dtype
        assert relative_error(grad, reference) < (2**-8 if grad.dtype == torch.bfloat16 else 1e-5)


def test_bfloat16_products():
    """What is claimed of their error, at the tiny model's widths and bfloat16 activations."""
    values = make(1, 300, heads=16, head_dim=32, groups=2, n=64, without=("initial_state",))
    values = {k: None if v is None else v.bfloat16().double() for k, v in values.items()}
    weights = (torch.randn(1, 300, 16, 32).double(), torch.zeros(1, 16, 32, 64).double())
    expected = run(oracle.ssd, values, torch.float64, weights=weights)
    actual = run(ours, values, torch.float32, weights=weights, chunk_size=None, matmul_dtype=torch.bfloat16)
    errors = {k: relative_error(actual[k], v) for k, v in expected.items()}
    assert max(errors.values()) < 2e-2, errors
    assert errors["y"] > 1e-5  # it is on


def test_autocast_leaves_the_scan_in_float32():
    values = {k: v.float().requires_grad_() for k, v in make(1, 40).items()}
    plain = torch.autograd.grad(ours(**values)[0].square().sum(), values["B"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(**values)[0].square().sum()
        cast = torch.autograd.grad(loss, values["B"])[0]
    assert torch.equal(plain, cast)


def test_bad_input_names_the_argument():
    values = {k: v for k, v in make(2, 8).items() if k in NAMES[:5]}
    with pytest.raises(ValueError, match="dt must have shape"):
        ssd_chunk_scan(**{**values, "dt": values["dt"][:, :-1]})
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        ssd_chunk_scan(**{**values, "B": torch.randn(2, 8, 3, 6), "C": torch.randn(2, 8, 3, 6)})
    with pytest.raises(ValueError, match="integer"):
        ssd_chunk_scan(**values, seq_idx=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="matmul_dtype"):
        ssd_chunk_scan(**values, matmul_dtype=torch.float16)
    with pytest.raises(ValueError, match="chunk_size"):
        ssd_chunk_scan(**values, chunk_size=0)
    with pytest.raises(ValueError, match="no tokens"):
        ssd_chunk_scan(**{k: v[:, :0] if k != "A" else v for k, v in values.items()})
