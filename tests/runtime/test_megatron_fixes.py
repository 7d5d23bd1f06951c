"""megatron-core's corrections that no other test would miss."""

from __future__ import annotations

import pytest
import torch


def test_checkpoints_are_read_by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import msc_utils

    from nemotron_h.platform import megatron_fixes

    monkeypatch.setattr(msc_utils, "msc", object())
    monkeypatch.setattr(msc_utils.MultiStorageClientFeature, "_enabled", True)
    assert msc_utils.MultiStorageClientFeature.is_enabled()
    megatron_fixes.install()
    assert not msc_utils.MultiStorageClientFeature.is_enabled()


def test_gradients_of_two_dtypes_have_a_norm_and_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer import clip_grads

    from nemotron_h.platform import megatron_fixes

    def one_dtype(lists: list[list[torch.Tensor]]) -> None:
        assert len({tensor.dtype for of in lists for tensor in of}) == 1, "the kernel would misread these"

    def norm(chunk: int, flag: object, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
        one_dtype(lists)
        return torch.stack([t.double().square().sum() for t in lists[0]]).sum().sqrt()[None], None

    def scale(chunk: int, flag: object, lists: list[list[torch.Tensor]], factor: float) -> None:
        one_dtype(lists)
        for source, target in zip(*lists, strict=True):
            target.copy_(source * factor)

    monkeypatch.setattr(clip_grads, "l2_norm_impl", norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", scale)
    megatron_fixes.install()
    kinds = (torch.bfloat16, torch.float32, torch.bfloat16)
    gradients = [torch.randn(size).to(kind) for size, kind in zip((5, 40, 7), kinds, strict=True)]
    expected = torch.cat([g.double() for g in gradients]).norm()
    found, none = clip_grads.l2_norm_impl(1, None, [gradients], False)
    assert none is None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.shape == (1,)
    before = [g.clone() for g in gradients]
    clip_grads.multi_tensor_scale_impl(1, None, [gradients, gradients], 0.5)
    assert all(torch.equal(g, 0.5 * old) for g, old in zip(gradients, before, strict=True))
    same = [g for g in gradients if g.dtype == torch.bfloat16]
    assert clip_grads.l2_norm_impl(1, None, [same], False)[0] == torch.cat(same).double().norm()


def test_a_checkpoint_of_several_ranks_is_written_with_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy
    from megatron.core.dist_checkpointing import ShardedTensor, exchange_utils

    from nemotron_h.platform import megatron_fixes

    monkeypatch.delattr(numpy, "product", raising=False)  # as there
    megatron_fixes.install()
    shard = ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3))
    assert exchange_utils._shard_size(shard) == 24
