"""Cross entropy over a split vocabulary against torch's in float64; the ranks are threads of one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import Ranks

from nemotron_h.ops import cross_entropy
from nemotron_h.ops.cross_entropy import vocabulary_cross_entropy


def case(
    tokens: tuple[int, ...], vocabulary: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and a gradient for each token's loss."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(*tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, tokens, generator=generator)
    return logits, labels, torch.randn(tokens, generator=generator)


def oracle(logits: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the logits' gradient in float64."""
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    return loss.detach(), torch.autograd.grad(loss, wide, dloss.double())[0]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_against_float64(monkeypatch, dtype: torch.dtype, bound: float, scale: float, block: int) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", block)
    logits, labels, dloss = case((5, 3), 37, scale)
    logits = logits.to(dtype)
    loss, gradient = oracle(logits, labels, dloss)
    leaf = logits.clone().requires_grad_()
    ours = vocabulary_cross_entropy(leaf * 1, labels.t().contiguous().t(), None)
    (own,) = torch.autograd.grad(ours, leaf, dloss.to(ours.dtype))
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert own.dtype == dtype
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-5)
    assert (own.double() - gradient).abs().max() < bound * gradient.abs().max()


def test_confident_predictions_keep_their_gradient_in_bfloat16() -> None:
    logits = torch.zeros(4, 8, dtype=torch.bfloat16)
    logits[:, 3] = torch.tensor([4.0, 8.0, 10.0, 12.0])
    labels = torch.full((4,), 3)
    _, gradient = oracle(logits, labels, torch.ones(4))
    leaf = logits.clone().requires_grad_()
    vocabulary_cross_entropy(leaf * 1, labels).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=2**-7, atol=0)


def test_a_second_backward_is_refused() -> None:
    logits, labels, _ = case((4,), 8)
    loss = vocabulary_cross_entropy(logits.requires_grad_() * 1, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refuses_strided_logits() -> None:
    logits, labels, _ = case((4, 3), 8)
    with pytest.raises(ValueError, match="contiguous"):
        vocabulary_cross_entropy(logits.transpose(0, 1), labels.t())


@pytest.mark.parametrize("size", [2, 4])
def test_split_vocabulary(monkeypatch, size: int) -> None:
    logits, labels, dloss = case((6, 2), 64)
    loss, gradient = oracle(logits, labels, dloss)
    ranks = Ranks(size)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.chunk(size, -1)[rank].clone().requires_grad_()
        own = vocabulary_cross_entropy(leaf * 1, labels, ranks)
        return own.detach(), torch.autograd.grad(own, leaf, dloss)[0]

    results = ranks.run(work)
    for own, _ in results:
        torch.testing.assert_close(own.double(), loss, rtol=1e-5, atol=1e-5)
    whole = torch.cat([part for _, part in results], -1)
    torch.testing.assert_close(whole.double(), gradient, rtol=1e-5, atol=1e-6)
