"""The CPU runtime answers for `torch.cuda` inside its block and leaves nothing behind."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn

import pytest
import torch

from nemotron_h.platform import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime is off where a GPU is visible")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's optimizers where Transformer Engine is installed, whose kernels refuse tensors of a CPU."""

    def kernel(*args: Any) -> NoReturn:
        raise RuntimeError("no CUDA-capable device is detected")

    cpu.uninstall()
    for module, name, _ in cpu._MULTI_TENSOR:
        monkeypatch.setattr(import_module(f"megatron.core.optimizer.{module}"), name, kernel)


def snapshot() -> list[tuple[str, str, object]]:
    """What every patched name is now."""
    return [(p.owner, p.name, getattr(cpu._resolve(p.owner), p.name)) for p in cpu.PATCHES]


def test_everything_is_undone(engine: None) -> None:
    before = snapshot()
    with cpu.megatron_on_cpu():
        changed = [b[:2] for b, now in zip(before, snapshot(), strict=True) if b[2] is not now[2]]
        assert len(changed) == len(before)
    after = snapshot()
    assert [b[2] is a[2] for b, a in zip(before, after, strict=True)] == [True] * len(before)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_what_is_asked_of_cuda_happens_on_the_cpu() -> None:
    with cpu.megatron_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
        assert torch.tensor(1, pin_memory=True).cuda().device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).type(torch.float64).dtype == torch.float64
        assert torch.nn.Linear(2, 2).cuda(torch.cuda.current_device()).weight.device.type == "cpu"
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
        assert not torch.cuda.is_available(), "the patches must not pretend that there is a GPU"


def test_a_pytorch_built_for_cuda_sees_no_gpu_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers `is_available` by counting devices, and `device_count` is one of the patched names."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch.cuda.device_count() > 0)
    with cpu.megatron_on_cpu():
        assert torch.cuda.device_count() == 1
        assert not torch.cuda.is_available()
        assert not cpu.gpu_visible()
    assert not torch.cuda.is_available()


def test_gradients_are_clipped_where_transformer_engine_is_installed(engine: None) -> None:
    from megatron.core.optimizer import clip_grads

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(RuntimeError, match="no CUDA-capable device"):
        clip_grads.l2_norm_impl(2048 * 32, torch.zeros(1), [[weight.grad]], False)
    with cpu.megatron_on_cpu():
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [[weight.grad]], False)
        clip_grads.clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=norm.item())
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
