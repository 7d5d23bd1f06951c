"""`CheckpointableAdamW` is torch's AdamW with another state layout."""

from __future__ import annotations

import pytest
import torch

from nemotron_h.platform.adamw import CheckpointableAdamW


def test_equals_torch_adamw_and_survives_a_checkpoint() -> None:
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=rng), torch.randn(7, generator=rng)]
    gradients = [[torch.randn(p.shape, generator=rng) for p in start] for _ in range(6)]

    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(p.clone()) for p in start]

    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected, ours = parameters(), parameters()
    theirs, mine = torch.optim.AdamW(expected, **options), CheckpointableAdamW(ours, **options)
    for step, step_gradients in enumerate(gradients):
        for p, q, g in zip(expected, ours, step_gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if step == 3:
            saved = mine.state_dict()
            assert saved["param_groups"][0]["step"] == 3
            assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq"}
            # all that Transformer Engine's Adam reads of a group: a run may go on on a GPU
            assert {"lr", "bias_correction", "betas", "eps", "weight_decay"} <= set(saved["param_groups"][0])
            mine = CheckpointableAdamW(ours, **options)
            mine.load_state_dict(saved)
        theirs.step()
        mine.step()
    for p, q in zip(expected, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("option", [{"adam_w_mode": False}, {"bias_correction": False}, {"capturable": True}, {"b": 1}])
def test_what_it_cannot_do_is_an_error(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="CheckpointableAdamW"):
        CheckpointableAdamW([torch.nn.Parameter(torch.ones(1))], **option)
