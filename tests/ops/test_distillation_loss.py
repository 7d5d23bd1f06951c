"""The chunked distillation loss against the plain formula on full logits in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import Ranks

from nemotron_h.ops import distillation_loss as ops
from nemotron_h.ops.distillation_loss import (
    HiddenTeacher,
    Objective,
    TeacherLogits,
    distillation_loss,
    top_logits,
)

TOKENS, VOCABULARY = 23, 64
OBJECTIVES = {
    "forward": Objective(),
    "temperature": Objective(temperature=2.5),
    "reverse": Objective(reverse=True),
    "reverse, cold": Objective(reverse=True, temperature=0.7),
    "lm": Objective(lm_weight=0.3),
    "lm, temperature": Objective(kl_weight=0.7, lm_weight=0.3, temperature=3.0),
    "lm, reverse": Objective(lm_weight=2.0, reverse=True),
    "lm, reverse, temperature": Objective(lm_weight=2.0, reverse=True, temperature=2.0),
    "lm alone": Objective(kl_weight=0.0, lm_weight=1.0),
    "top": Objective(top_k=5),
    "top, lm, temperature": Objective(top_k=7, lm_weight=0.5, temperature=2.0),
    "top, all": Objective(top_k=VOCABULARY),
}


def case(scale: float = 1.0, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> SimpleNamespace:
    """Both models' states and output layers, of different widths, with logits of about this scale."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mask = (torch.rand(tokens, generator=rng) < 0.7).double()
    return SimpleNamespace(
        hidden=normal(tokens, 16).to(dtype),
        weight=(scale / 4 * normal(VOCABULARY, 16)).to(dtype),
        teacher=HiddenTeacher(normal(tokens, 24).to(dtype), (scale / 24**0.5 * normal(VOCABULARY, 24)).to(dtype)),
        labels=torch.randint(VOCABULARY, (tokens,), generator=rng),
        weights=mask * torch.rand(tokens, generator=rng, dtype=torch.float64),
    )


def oracle(c: SimpleNamespace, o: Objective, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Total, KL, cross entropy, and `scale` times the total's gradients, in float64 by torch's own functions."""
    hidden, weight = (t.double().requires_grad_() for t in (c.hidden, c.weight))
    student, teacher = hidden @ weight.t(), c.teacher.hidden.double() @ c.teacher.weight.double().t()
    if o.top_k is not None:
        cut = teacher.topk(o.top_k, dim=1)
        teacher = torch.full_like(teacher, -float("inf")).scatter(1, cut.indices, cut.values)
    log_s, log_t = ((t / o.temperature).log_softmax(1) for t in (student, teacher))
    if o.reverse:
        kl = (log_s.exp() * (log_s - log_t)).sum(1)
    else:
        kl = (log_t.exp() * (log_t.clamp_min(-1e9) - log_s)).sum(1)
    lm = F.cross_entropy(student, c.labels, reduction="none")
    total = (c.weights * (o.kl_weight * o.temperature**2 * kl + o.lm_weight * lm)).sum()
    return total.detach(), kl.detach(), lm.detach(), *torch.autograd.grad(scale * total, (hidden, weight))


def ours(c: SimpleNamespace, o: Objective, scale: float = 1.0, **options: object) -> tuple[torch.Tensor, ...]:
    """The same of the function that is tested."""
    hidden, weight = (t.clone().requires_grad_() for t in (c.hidden, c.weight))
    out = distillation_loss(hidden, weight, c.teacher, c.labels, c.weights, o, **options)
    return out.total.detach(), out.kl, out.lm, *torch.autograd.grad(scale * out.total, (hidden, weight))


def close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], bound: float) -> None:
    for name, a, b in zip(("total", "kl", "lm", "dhidden", "dweight"), found, expected, strict=True):
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
        assert error < bound, (name, error)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_against_full_logits_in_float64(monkeypatch, name: str, dtype: torch.dtype, scale: float) -> None:
    monkeypatch.setitem(ops.BLOCK_ELEMENTS, "cpu", 3 * VOCABULARY)
    c = case(scale, dtype)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    close(ours(c, OBJECTIVES[name], scale=1.7, chunk_tokens=8), oracle(c, OBJECTIVES[name], scale=1.7), bound)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_is_as_good_as_its_logits(name: str) -> None:
    c = case(dtype=torch.bfloat16)
    found, expected = ours(c, OBJECTIVES[name], chunk_tokens=5), oracle(c, OBJECTIVES[name])
    assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.bfloat16] * 2
    close(found, expected, 0.04)


def test_bfloat16_sums_the_weight_gradient_in_float32() -> None:
    """Of 512 chunks, each a thousandth of the sum: sums in bfloat16 would stop growing."""
    c = case(dtype=torch.bfloat16, tokens=1)
    many = SimpleNamespace(**vars(c))
    many.hidden, many.labels, many.weights = c.hidden.repeat(512, 1), c.labels.repeat(512), torch.ones(512)
    many.teacher = HiddenTeacher(c.teacher.hidden.repeat(512, 1), c.teacher.weight)
    c.weights = torch.ones(1)
    one, sum_of_all = ours(c, Objective()), ours(many, Objective(), chunk_tokens=1)
    torch.testing.assert_close(sum_of_all[4].double(), 512 * one[4].double(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_do_not_change_it(name: str) -> None:
    c = case(10.0, torch.float64)
    whole = ours(c, OBJECTIVES[name], chunk_tokens=TOKENS)
    for chunk in (1, 7, 1000):
        close(ours(c, OBJECTIVES[name], chunk_tokens=chunk), whole, 1e-12)


@pytest.mark.parametrize(("size", "words"), [(2, VOCABULARY), (4, VOCABULARY), (1, 41), (4, 41)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_split_vocabulary_is_one_rank(monkeypatch, name: str, size: int, words: int) -> None:
    """With padding behind the words too, of which the last of four ranks has nothing else."""
    c = case(10.0, torch.float64)
    c.labels %= words
    only = SimpleNamespace(**vars(c))
    only.weight, only.teacher = c.weight[:words], HiddenTeacher(c.teacher.hidden, c.teacher.weight[:words])
    *expected, dweight = ours(only, OBJECTIVES[name])
    expected = *expected, F.pad(dweight, (0, 0, 0, VOCABULARY - words))
    ranks = Ranks(size)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)

    def work(rank: int) -> tuple[torch.Tensor, ...]:
        part = SimpleNamespace(**vars(c))
        part.weight = c.weight.chunk(size)[rank]
        part.teacher = HiddenTeacher(c.teacher.hidden, c.teacher.weight.chunk(size)[rank])
        rows = len(part.weight)
        own = min(max(words - rank * rows, 0), rows)
        return ours(part, OBJECTIVES[name], group=ranks, chunk_tokens=9, words=own)

    found = ranks.run(work)
    dhidden = torch.stack([part[3] for part in found]).sum(0)
    dweight = torch.cat([part[4] for part in found])
    assert not dweight[words:].any()
    for part in found:
        # a column-parallel layer's input gradient is the ranks' sum
        close((*part[:3], dhidden, dweight), expected, 1e-6 if OBJECTIVES[name].top_k else 1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stored_logits_are_the_teacher(name: str) -> None:
    c = case(10.0, torch.float64)
    expected = ours(c, OBJECTIVES[name])
    logits = c.teacher.hidden @ c.teacher.weight.t()
    stored = SimpleNamespace(**vars(c))
    stored.teacher = TeacherLogits(logits)
    kept = logits.clone()
    close(ours(stored, OBJECTIVES[name], chunk_tokens=4), expected, 1e-12)
    assert torch.equal(logits, kept)  # used again by the next epoch
    if OBJECTIVES[name].top_k:
        stored.teacher = top_logits(logits, VOCABULARY // 2 if OBJECTIVES[name].top_k < 10 else VOCABULARY)
        close(ours(stored, OBJECTIVES[name], chunk_tokens=4), expected, 1e-12)


def test_a_model_equal_to_its_teacher_has_nothing_to_learn() -> None:
    c = case(10.0, torch.float64)
    c.teacher = HiddenTeacher(c.hidden, c.weight)
    for objective in (Objective(), Objective(reverse=True), Objective(temperature=3.0)):
        total, kl, _, dhidden, dweight = ours(c, objective)
        assert max(float(t.abs().max()) for t in (total, kl, dhidden, dweight)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatrons_gradient_buffer(dtype: torch.dtype) -> None:
    c = case(dtype=dtype)
    expected = oracle(c, Objective(), scale=0.5)[4]
    weight = torch.nn.Parameter(c.weight)
    before = torch.randn(weight.shape)
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    out = distillation_loss(c.hidden, weight, c.teacher, c.labels, c.weights, Objective(), chunk_tokens=6)
    (0.5 * out.total).backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None  # the hook of an overlapped reduction wants one
    error = (weight.main_grad - before - expected.float()).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.04)


def test_no_gradients_without_need() -> None:
    c = case()
    expected = oracle(c, Objective())
    with torch.no_grad():
        out = distillation_loss(c.hidden, c.weight.requires_grad_(), c.teacher, c.labels, c.weights, Objective())
    assert not out.total.requires_grad
    torch.testing.assert_close(out.total.double(), expected[0], rtol=1e-5, atol=1e-5)
    # a frozen output layer, as a parameter-efficient student has
    hidden = c.hidden.clone().requires_grad_()
    out = distillation_loss(hidden, c.weight.detach(), c.teacher, c.labels, c.weights, Objective())
    out.total.backward()
    torch.testing.assert_close(hidden.grad.double(), expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "temperature = 0 is not positive"),
        ({"temperature": float("nan")}, "not positive"),
        ({"kl_weight": 0}, "none positive"),
        ({"lm_weight": -1}, "negative"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_k": 3, "reverse": True}, "infinite"),
    ],
)
def test_impossible_objectives(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**values)


def test_vocabularies_that_differ() -> None:
    c = case()
    teacher = HiddenTeacher(c.teacher.hidden, c.teacher.weight[:-1])
    with pytest.raises(ValueError, match="64 words of the student"):
        distillation_loss(c.hidden, c.weight, teacher, c.labels, c.weights, Objective())
