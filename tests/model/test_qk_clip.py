"""QK-clip: the logits of the layers that exceed the limit are at it afterwards, all others as they were."""

from __future__ import annotations

import pytest
import torch
from small_model import pure_config, small_config, small_model, tokens

CONFIGS = {
    "hybrid": small_config,
    "rotary": lambda **changes: pure_config("*-", **changes),
    "parallel": lambda **changes: pure_config("PS", **changes),
    "recomputed": lambda **changes: small_config(recompute_attention="layer", **changes),
}


def measured(model, clip) -> list[torch.Tensor]:
    """Largest logits of a training step on two micro-batches, one of packed documents."""
    clip.forget()
    for seq_idx in (None, torch.arange(64).div(20, rounding_mode="floor").expand(2, -1)):
        batch = tokens(2, 65)
        more = {} if seq_idx is None else {"seq_idx": seq_idx}
        model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous(), **more).mean().backward()
    return clip.largest


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", CONFIGS)
def test_groups_over_the_limit_are_at_it(name: str) -> None:
    from nemotron_h.training.muon_parts import roles
    from nemotron_h.training.qk_clip import of_attentions

    model = small_model(CONFIGS[name]()).train()
    clip = of_attentions([model], 1.0)
    before = measured(model, clip)[0].clone()  # of the first layer, whose input no clip changes
    assert before[0] != before[1]
    clip.limit = float(before.mean())
    weight = clip.attentions[0].linear_qkv.weight
    matrix = roles(model)[weight].matrix
    values = weight.detach().unflatten(0, (2, -1, 16))[:, -1].clone()
    with torch.no_grad():
        weight.mul_(clip.row_factors(weight, matrix)[:, None])
    after = measured(model, clip)[0]
    assert after.tolist() == pytest.approx(before.clamp(max=clip.limit).tolist(), rel=1e-5)
    assert after.max() < before.max()
    assert torch.equal(weight.detach().unflatten(0, (2, -1, 16))[:, -1], values)
    assert clip.row_factors(weight, matrix) is None or after.max() > clip.limit  # rounding alone


@pytest.mark.usefixtures("megatron")
def test_a_validation_and_a_model_without_attention_measure_nothing() -> None:
    from nemotron_h.training.muon_parts import roles
    from nemotron_h.training.qk_clip import of_attentions

    model = small_model(small_config()).train()
    clip = of_attentions([model], 1.0)
    with torch.no_grad():
        model(input_ids=tokens(2, 64), labels=tokens(2, 64))
    assert all(torch.isneginf(each).all() for each in clip.largest)
    weight = clip.attentions[0].linear_qkv.weight
    assert clip.row_factors(weight, roles(model)[weight].matrix) is None
    assert of_attentions([small_model(pure_config("M"))], 1.0) is None
