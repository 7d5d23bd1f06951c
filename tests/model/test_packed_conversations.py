"""Packed conversations are separate ones: the loss over assistant tokens and every gradient, padding and all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_model import VOCABULARY, pure_config, relative_error, small_config, small_model

pytestmark = pytest.mark.usefixtures("megatron")

SEQ = 96
#: tokens of the conversations of each window; the scan's chunk is 32
WINDOWS = ([34, 2, 33, 20], [65, 18], [97])


def conversations(seed: int = 0) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Token ids, and whether each is learnt: turns of random lengths, the last an assistant's."""
    rng = np.random.default_rng(seed)
    windows = []
    for lengths in WINDOWS:
        windows.append([])
        for length in lengths:
            learnt = (np.arange(length)[::-1] // rng.integers(1, 9) % 2 == 0).astype(np.float32)
            windows[-1].append((rng.integers(0, VOCABULARY, length), learnt))
    return windows


def masked_losses(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every token of a batch; 0 for those that are not learnt."""
    logits = model(input_ids=batch["tokens"], seq_idx=batch.get("seq_idx"))[..., :VOCABULARY]
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses * batch["loss_mask"].flatten()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: small_config(2, dtype=torch.float64), 1e-9),
        (lambda: pure_config("M", dtype=torch.float64), 1e-9),
        (lambda: small_config(2), 2e-4),
    ],
    ids=["hybrid", "mamba2", "hybrid, float32"],
)
def test_packed_is_unpacked(make, tolerance: float) -> None:
    from nemotron_h.data.feed.sft_module import packed_window

    model = small_model(make())
    windows = conversations()
    packed = [packed_window(window, SEQ, pad_id=1) for window in windows]
    assert [int((p["seq_idx"] == len(w)).sum()) for p, w in zip(packed, windows, strict=True)] == [11, 15, 0]
    batch = {key: torch.stack([p[key] for p in packed]) for key in packed[0]}
    loss = masked_losses(model, batch).sum()
    loss.backward()
    packed_gradients = gradients(model)

    alone = torch.zeros((), dtype=torch.float64)
    for ids, learnt in (conversation for window in windows for conversation in window):
        one = {
            "tokens": torch.from_numpy(ids[None, :-1]),
            "labels": torch.from_numpy(ids[None, 1:]),
            "loss_mask": torch.from_numpy(learnt[None, 1:]),
        }
        part = masked_losses(model, one).sum()
        part.backward()
        alone += part.detach().double()
    assert relative_error(loss.detach(), alone) < tolerance
    assert batch["loss_mask"].sum() == sum(learnt[1:].sum() for w in windows for _, learnt in w)
    errors = {name: relative_error(packed_gradients[name], g) for name, g in gradients(model).items()}
    assert max(errors.values()) < tolerance, sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9], ids=["none", "few", "most"])
def test_tokens_outside_the_loss_need_no_logits(share: float) -> None:
    """Against the cross entropy of all logits; with few tokens in the loss the model has no others'."""
    model = small_model(small_config(2, dtype=torch.float64))
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (2, 49), generator=rng)
    mask = (torch.rand(2, 48, generator=rng) < share).double()
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}
    expected = masked_losses(model, batch)
    (expected * torch.arange(len(expected))).sum().backward()
    theirs = gradients(model)
    losses = model(input_ids=batch["tokens"], labels=batch["labels"], loss_mask=mask).flatten()
    assert torch.allclose(losses * mask.flatten(), expected, rtol=1e-9, atol=1e-9)
    assert bool((losses[mask.flatten() == 0] == 0).all()) == (0 < share < 0.5)
    (losses * mask.flatten() * torch.arange(len(losses))).sum().backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-8, atol=1e-9), name


def test_it_can_fail() -> None:
    """Without the resets, or with the mask of the position before, losses are others."""
    from nemotron_h.data.feed.sft_module import packed_window

    model = small_model(small_config(2))
    packed = [packed_window(window, SEQ, pad_id=1) for window in conversations()]
    batch = {key: torch.stack([p[key] for p in packed]) for key in packed[0]}
    right = masked_losses(model, batch).detach()
    leaking = masked_losses(model, {**batch, "seq_idx": None}).detach()
    shifted = masked_losses(model, {**batch, "loss_mask": batch["loss_mask"].roll(1, 1)}).detach()
    assert relative_error(leaking, right) > 0.1
    assert relative_error(shifted, right) > 0.1
