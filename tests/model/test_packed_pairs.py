"""Packed pairs are separate conversations, in every loss and gradient; and what the losses are."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_model import adapted_config, adapted_model, randomize_adapters
from small_model import VOCABULARY, relative_error, small_config, small_model

pytestmark = pytest.mark.usefixtures("megatron")

SEQ = 96
#: tokens of (chosen, rejected) of the pairs of each window; the scan's chunk is 32
WINDOWS = ([(20, 33), (17, 12)], [(34, 30)], [(49, 49)], [(5, 4), (31, 30), (2, 3)])
KINDS = ("dpo", "dpo_norm", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
BETA, SCALE = 0.2, 1.7


def pairs(seed: int = 0) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
    """Of each window: pairs of (token ids, whether each is learnt); the prompt is common, the answer is learnt."""
    rng = np.random.default_rng(seed)
    windows = []
    for lengths in WINDOWS:
        windows.append([])
        for both in lengths:
            prompt = rng.integers(0, VOCABULARY, rng.integers(1, min(both)))
            sides = []
            for length in both:
                ids = np.concatenate([prompt, rng.integers(0, VOCABULARY, length - len(prompt))])
                sides.append((ids, (np.arange(length) >= len(prompt)).astype(np.float32)))
            windows[-1].append(sides)
    return windows


def references(seed: int = 1) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities and reward gaps of every window's pairs, of the size that random weights give."""
    rng = np.random.default_rng(seed)
    tokens = [np.array(lengths, dtype=np.float64) for lengths in WINDOWS]
    return [(-3 * n + rng.normal(size=n.shape) * 4, rng.normal(size=len(n))) for n in tokens]


def batch_of(windows, given) -> dict[str, torch.Tensor]:
    from nemotron_h.data.feed.preference_module import pair_window

    made = [pair_window(w, *values, SEQ, pad_id=1) for w, values in zip(windows, given, strict=True)]
    return {key: torch.stack([m[key] for m in made]) for key in made[0]}


def token_losses(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["tokens"], seq_idx=batch.get("seq_idx"))
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view_as(batch["tokens"])


def formula(kind: str, a: float, b: float) -> float:
    """A pair's loss, in Python's floats, from probabilities."""
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    if kind in ("dpo", "dpo_norm"):
        return -math.log(q)
    if kind == "rpo_sq":
        return (b - a) ** 2
    first, second = (p, q) if kind == "rpo_bwd_kl" else (q, p)
    return first * math.log(first / second) + (1 - first) * math.log((1 - first) / (1 - second))


def alone(model, sides) -> list[torch.Tensor]:
    """Summed log-probabilities of a pair's answers, each conversation by itself in a batch of one."""
    found = []
    for ids, learnt in sides:
        one = {"tokens": torch.from_numpy(ids[None, :-1]), "labels": torch.from_numpy(ids[None, 1:])}
        found.append(-(token_losses(model, one) * torch.from_numpy(learnt[None, 1:])).sum())
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def whole():
    return small_model(small_config(2, dtype=torch.float64))


def adapted(kind: str):
    model, _ = adapted_model(adapted_config(kind, torch.float64))
    randomize_adapters(model)
    return model


@pytest.mark.parametrize(
    ("kind", "make"),
    [*((kind, whole) for kind in KINDS), ("dpo", partial(adapted, "lora")), ("rpo_bwd_kl", partial(adapted, "dora"))],
    ids=[*KINDS, "dpo, lora", "rpo_bwd_kl, dora"],
)
def test_packed_is_unpacked_and_the_formula(kind: str, make) -> None:
    from nemotron_h.training.stages.preference.loss import PreferenceLoss

    model = make()
    windows, given = pairs(), references()
    batch = batch_of(windows, given)
    reduction = PreferenceLoss(kind, BETA, SCALE)
    reduction.setup(batch)
    total, count, report = reduction(token_losses(model, batch))
    total.backward()
    packed = gradients(model)

    expected = {"loss": 0.0, "pairs": 0.0, "margin": 0.0, "accuracy": 0.0, "chosen": 0.0, "rejected": 0.0}
    unpacked = torch.zeros((), dtype=torch.float64)
    for window, (reference, gaps) in zip(windows, given, strict=True):
        for sides, (chosen_ref, rejected_ref), gap in zip(window, reference, gaps, strict=True):
            chosen, rejected = alone(model, sides)
            lengths = [learnt[1:].sum() if kind == "dpo_norm" else 1 for _, learnt in sides]
            b = BETA * ((chosen - chosen_ref) / lengths[0] - (rejected - rejected_ref) / lengths[1])
            a = torch.tensor(SCALE * gap, dtype=torch.float64)
            p, q = torch.sigmoid(a), torch.sigmoid(b)
            kl = lambda x, y: x * (x / y).log() + (1 - x) * ((1 - x) / (1 - y)).log()  # noqa: E731
            rewarded = {"rpo_sq": (b - a) ** 2, "rpo_bwd_kl": kl(p, q), "rpo_fwd_kl": kl(q, p)}
            loss = rewarded.get(kind, -q.log())
            unpacked = unpacked + loss
            for key, value in zip(
                expected,
                (formula(kind, float(a), float(b)), 1, float(b), float(b) > 0, float(chosen), float(rejected)),
                strict=True,
            ):
                expected[key] += value
    unpacked.backward()
    assert int(count) == 7
    assert report["sums"].tolist() == pytest.approx(list(expected.values()), rel=1e-9)
    assert relative_error(total.detach(), unpacked.detach()) < 1e-9
    errors = {name: relative_error(packed[name], g) for name, g in gradients(model).items()}
    assert max(errors.values()) < 1e-8, sorted(errors.items(), key=lambda e: -e[1])[:5]
    assert max(float(gradient.abs().max()) for name, gradient in packed.items() if "in_proj" in name) > 1e-3
    assert all("adapter" in name for name in packed) == (make is not whole)


def test_the_losses_stay_finite_far_out() -> None:
    from nemotron_h.training.stages.preference.loss import LOSSES

    a = torch.tensor([0.0, 300.0, -300.0, 800.0], dtype=torch.float64)
    b = torch.tensor([-900.0, -700.0, 900.0, 800.0], dtype=torch.float64, requires_grad=True)
    assert LOSSES["dpo"](a, b)[:2].tolist() == [900.0, 700.0]
    for kind in KINDS:
        assert LOSSES[kind](a, b).isfinite().all(), kind
        (gradient,) = torch.autograd.grad(LOSSES[kind](a, b).sum(), b)
        assert gradient.isfinite().all(), kind


def test_a_policy_that_is_its_reference_has_log_2_exactly() -> None:
    from nemotron_h.training.stages.preference.loss import PreferenceLoss, answer_logprobs

    model = small_model(small_config(2))
    windows = pairs()
    batch = batch_of(windows, references())
    losses = token_losses(model, batch).detach()
    batch["reference"] = answer_logprobs(losses, batch["loss_mask"], batch["seq_idx"], SEQ // 2)
    reduction = PreferenceLoss("dpo", BETA, 1.0)
    reduction.setup(batch)
    _, count, report = reduction(losses.double())
    loss, pairs_, margin, *_ = report["sums"].tolist()
    assert (loss / pairs_, margin, int(count)) == (math.log(2), 0.0, 7)


def test_it_can_fail() -> None:
    """Without the resets, or with the members of pairs exchanged, the losses are others."""
    from nemotron_h.training.stages.preference.loss import PreferenceLoss

    model = small_model(small_config(2))
    windows, given = pairs(), references()
    swapped = [[sides[::-1] for sides in window] for window in windows]

    def loss(made, losses) -> float:
        reduction = PreferenceLoss("dpo", BETA, SCALE)
        reduction.setup(made)
        return float(reduction(losses)[0])

    batch = batch_of(windows, given)
    right = loss(batch, token_losses(model, batch))
    leaking = loss(batch, token_losses(model, {**batch, "seq_idx": None}))
    other = batch_of(swapped, given)
    assert abs(leaking / right - 1) > 0.01
    assert abs(loss(other, token_losses(model, other)) / right - 1) > 0.05
