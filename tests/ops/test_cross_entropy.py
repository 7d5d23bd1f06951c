"""Cross entropy over a split vocabulary against torch's in float64; the ranks are threads of one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import Ranks

from nemotron_h.ops import cross_entropy
from nemotron_h.ops.cross_entropy import chunked_cross_entropy, mask_padding, vocabulary_cross_entropy


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


def states(dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, an output matrix whose last 5 rows pad it, labels, and a gradient of each loss; some are 0."""
    rng = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(23, 16, generator=rng), scale * torch.randn(64, 16, generator=rng)
    labels, dloss = torch.randint(59, (23,), generator=rng), torch.randn(23, generator=rng)
    dloss[::4] = 0  # a loss mask
    return hidden.to(dtype), weight.to(dtype), labels, dloss


def differentiated(function, hidden: torch.Tensor, weight: torch.Tensor, dloss: torch.Tensor) -> tuple:
    """Losses and the gradients of states and matrix."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_chunks_against_float64(dtype: torch.dtype, bound: float, chunk: int, scale: float) -> None:
    hidden, weight, labels, dloss = states(dtype, scale)

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((h @ w.t())[:, :59], labels, reduction="none")

    expected = differentiated(whole, hidden.double(), weight.double(), dloss)
    found = differentiated(
        lambda h, w: chunked_cross_entropy(h, w, labels, words=59, chunk_tokens=chunk), hidden, weight, dloss
    )
    for name, a, b in zip(("loss", "dhidden", "dweight"), found, expected, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < bound, (name, float(error))
    assert not found[2][59:].any(), "padding has a gradient"
    assert not found[1][::4].any(), "masked tokens have one"


def test_chunks_are_whole_logits_bit_for_bit() -> None:
    """Losses and states' gradients; in one chunk the matrix's too. Columns of the matmul are powers of two apart."""
    hidden, weight, labels, dloss = states(torch.float64)

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return vocabulary_cross_entropy(mask_padding(h @ w.t(), 59), labels)

    expected = differentiated(whole, hidden, weight, dloss)
    found = differentiated(lambda h, w: chunked_cross_entropy(h, w, labels, words=59), hidden, weight, dloss)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_of_a_split_vocabulary_add_to_megatrons_buffer(monkeypatch, size: int) -> None:
    hidden, weight, labels, dloss = states(torch.float32)
    wanted = differentiated(lambda h, w: chunked_cross_entropy(h, w, labels, words=59), hidden, weight, dloss)
    ranks = Ranks(size)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)

    def work(rank: int) -> tuple[torch.Tensor, ...]:
        own = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        own[1].main_grad, own[1].grad_added_to_main_grad = torch.ones_like(own[1]), False
        words = min(max(59 - rank * len(own[1]), 0), len(own[1]))
        loss = chunked_cross_entropy(own[0], own[1], labels, ranks, words, chunk_tokens=5)
        loss.backward(dloss)
        assert own[1].grad_added_to_main_grad
        return loss.detach(), own[0].grad, own[1].main_grad - 1

    results = ranks.run(work)
    for loss, _, _ in results:
        torch.testing.assert_close(loss, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(part for _, part, _ in results), wanted[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for *_, part in results]), wanted[2], rtol=1e-4, atol=1e-5)


def test_chunks_refuse_shapes_that_do_not_fit() -> None:
    hidden, weight, labels, _ = states(torch.float32)
    with pytest.raises(ValueError, match=r"hidden \[tokens, width\].*\(23, 16\), \(64, 15\) and \(23,\)"):
        chunked_cross_entropy(hidden, weight[:, 1:], labels)
