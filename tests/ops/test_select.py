"""Which ops are taken, and that the choice is said once and refused clearly."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from nemotron_h.ops import select
from nemotron_h.ops.conv1d import causal_conv1d
from nemotron_h.ops.ssd import ssd_chunk_scan


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(select.VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    select._select.cache_clear()
    yield
    select._select.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_ours_without_a_gpu():
    ops = select.select_ops()
    assert ops.ssd is ssd_chunk_scan
    assert ops.fused_mixer is None
    assert "no GPU" in ops.origin


@pytest.mark.usefixtures("no_gpu")
def test_said_once_by_the_first_rank(caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger=select.__name__):
        select.select_ops()
        select.select_ops()
        assert len(caplog.records) == 1
        select._select.cache_clear()
        monkeypatch.setenv("RANK", "1")
        select.select_ops()
        assert len(caplog.records) == 1


@pytest.mark.usefixtures("gpu")
def test_ours_on_a_gpu_without_kernels_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.layernorm_gated", None)
    ops = select.select_ops()
    assert ops.ssd is ssd_chunk_scan
    assert "mamba_ssm does not import" in ops.origin


@pytest.mark.usefixtures("gpu")
def test_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(select, "_mamba_ssm_kernels", lambda: "kernels")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    ops = select.select_ops()
    assert ops.ssd.func is select._kernel_ssd
    assert ops.conv1d is causal_conv1d
    assert ops.fused_mixer is None
    assert "convolution in torch" in ops.origin
    select._select.cache_clear()
    monkeypatch.setattr(select, "_causal_conv1d_kernels", lambda: "conv")
    ops = select.select_ops()
    assert ops.conv1d.func is select._kernel_conv1d
    assert ops.fused_mixer.func is select._kernel_fused_mixer


@pytest.mark.usefixtures("gpu")
def test_tensors_on_the_cpu_beside_a_gpu_have_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select.select_ops(torch.device("cpu")) == select.Ops(origin="torch (on the CPU)")


def test_forced_torch(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "torch")
    monkeypatch.setattr(select, "_mamba_ssm_kernels", lambda: "kernels")
    assert select.select_ops().ssd is ssd_chunk_scan


@pytest.mark.usefixtures("no_gpu")
def test_forced_kernels_without_a_gpu(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "mamba_ssm")
    with pytest.raises(RuntimeError, match="needs a GPU"):
        select.select_ops()


@pytest.mark.usefixtures("gpu")
def test_forced_kernels_that_do_not_import(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.layernorm_gated", None)
    with pytest.raises(RuntimeError, match="mamba_ssm does not import"):
        select.select_ops()


def test_unknown_choice(monkeypatch):
    monkeypatch.setenv(select.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="torch, mamba_ssm"):
        select.select_ops()


class FakeConv:
    """The interface of causal-conv1d's functions, computed by ours, with the refusals of the CUDA kernel."""

    @staticmethod
    def conv(x, weight, bias, seq_idx, initial_states, return_final_states, activation):
        assert x.stride(1) == 1
        assert x.stride(2) % 8 == 0
        assert x.stride(0) % 8 == 0
        assert seq_idx is None or (initial_states is None and not return_final_states)
        out = causal_conv1d(
            x.transpose(1, 2),
            weight,
            bias,
            activation=activation,
            seq_idx=seq_idx,
            initial_state=None if initial_states is None else initial_states.transpose(1, 2),
            return_final_state=return_final_states,
        )
        return tuple(t.transpose(1, 2) for t in out) if return_final_states else out.transpose(1, 2)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("size", "offset"), [((2, 9, 24), 0), ((2, 9, 24), 3), ((1, 1, 21), 3)])
def test_convolution_adapter(documents, state, size, offset):
    x = torch.randn(size)[..., offset : offset + 16]
    batch, length = size[:2]
    weight, bias = torch.randn(16, 4), torch.randn(16)
    options = {
        "seq_idx": torch.arange(length).div(4, rounding_mode="floor").expand(batch, -1) if documents else None,
        "initial_state": torch.randn(batch, 3, 16) if state else None,
        "return_final_state": state,
    }
    expected = causal_conv1d(x, weight, bias, **options)
    actual = select._kernel_conv1d(FakeConv, x, weight, bias, **options)
    for a, e in zip(*((t,) if torch.is_tensor(t) else t for t in (actual, expected)), strict=True):
        assert torch.equal(a, e)
