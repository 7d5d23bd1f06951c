"""What a cache keeps of a teacher: the loss from it is the loss from the teacher, bit for bit."""

from __future__ import annotations

import pytest
import torch
from thread_ranks import Ranks

from nemotron_h.ops import output_matmul as ops
from nemotron_h.ops.distillation_loss import HiddenTeacher, Objective, TeacherLogits, TopLogits, distillation_loss
from nemotron_h.ops.teacher_logits import kept_logits

TOKENS, VOCABULARY = 23, 64


def teacher(dtype: torch.dtype) -> HiddenTeacher:
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, 24, generator=rng, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 24, generator=rng, dtype=torch.float64)
    return HiddenTeacher(hidden.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_largest_and_the_sum_over_all(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.setitem(ops.CHUNK_ELEMENTS, "cpu", 9 * VOCABULARY)
    given = teacher(torch.float32)
    kept = kept_logits(given, k)
    logits = given.hidden.double() @ given.weight.double().t()
    expected = logits.topk(k, dim=1)
    assert torch.equal(kept.ids, expected.indices)
    torch.testing.assert_close(kept.values.double(), expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.logsumexp.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-5)
    probability = (kept.values - kept.logsumexp.unsqueeze(1)).exp().sum(1)
    torch.testing.assert_close(probability.double(), logits.softmax(1).topk(k, dim=1).values.sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [5, VOCABULARY, None])
def test_the_loss_and_gradients_are_those_of_the_teacher_at_hand(dtype: torch.dtype, k: int | None) -> None:
    rng = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, 16, generator=rng).to(dtype)
    weight = torch.randn(VOCABULARY, 16, generator=rng).to(dtype)
    labels, weights = torch.randint(VOCABULARY, (TOKENS,), generator=rng), torch.rand(TOKENS, generator=rng)
    objective = Objective(temperature=1.5, lm_weight=0.2, top_k=k)

    def found(side: object) -> tuple[torch.Tensor, ...]:
        own, head = (t.clone().requires_grad_() for t in (hidden, weight))
        loss = distillation_loss(own, head, side, labels, weights, objective)
        return (loss.total.detach(), loss.kl, *torch.autograd.grad(loss.total, (own, head)))

    at_hand = teacher(dtype)
    kept = kept_logits(at_hand, k)
    stored = TeacherLogits(kept.values) if k is None else TopLogits(kept.values, kept.ids)
    for ours, theirs in zip(found(stored), found(at_hand), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [5, None])
def test_a_split_vocabulary_is_one_rank(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    whole = teacher(torch.float32)
    expected = kept_logits(whole, k)
    ranks = Ranks(2)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    parts = whole.weight.chunk(2)
    for kept in ranks.run(lambda rank: kept_logits(HiddenTeacher(whole.hidden, parts[rank]), k, ranks)):
        torch.testing.assert_close(kept.values, expected.values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept.logsumexp, expected.logsumexp, rtol=1e-5, atol=1e-5)
        assert k is None or torch.equal(kept.ids, expected.ids)
