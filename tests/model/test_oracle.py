"""The whole Megatron model against a token-by-token float64 reference: logits, loss and every gradient."""

from __future__ import annotations

import pytest
import reference
import torch
from small_model import VOCABULARY, pure_config, relative_error, small_config, small_model, tokens

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH = 2, 75  # two whole chunks of the scan and a part


def documents() -> torch.Tensor:
    """Documents that differ between the rows, int32 [batch, length]."""
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    starts[0, [5, 6, 64]] = 1
    starts[1, [32, 50]] = 1
    return starts.cumsum(1, dtype=torch.int32)


def expected(model, definition, ids, seq_idx):
    """The reference's logits and losses with the model's weights, and those weights as float64 leaves. Losses are over
    the words alone: rows of the output matrix that pad it have no part in them.
    """
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    biases = {name: buffer.double() for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    scores = reference.logits({**parameters, **biases}, definition, ids[:, :-1], seq_idx)
    return scores, reference.losses(scores[..., :VOCABULARY], ids[:, 1:]), parameters


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("groups", [1, 2, 8, "E"])
def test_float32(groups: int | str, packed: bool) -> None:
    config = pure_config("E") if groups == "E" else small_config(groups)
    model = small_model(config)
    ids, seq_idx = tokens(BATCH, LENGTH + 1), documents() if packed else None
    scores, losses, parameters = expected(model, config.definition(), ids, seq_idx)
    actual = model(input_ids=ids[:, :-1], seq_idx=seq_idx)
    assert relative_error(actual, scores) < 1e-4
    actual_losses = model(input_ids=ids[:, :-1], labels=ids[:, 1:], seq_idx=seq_idx)
    assert relative_error(actual_losses, losses) < 1e-4
    losses.mean().backward()
    actual_losses.mean().backward()
    errors = {name: relative_error(p.grad, parameters[name].grad) for name, p in model.named_parameters()}
    # the gated norm of 8 groups is over 16 channels: some rows of it are ill-conditioned in float32
    assert max(errors.values()) < (5e-4 if groups == 8 else 1e-4), sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_float64(packed: bool) -> None:
    config = small_config(dtype=torch.float64)
    model = small_model(config)
    ids, seq_idx = tokens(BATCH, LENGTH + 1), documents() if packed else None
    scores, losses, parameters = expected(model, config.definition(), ids, seq_idx)
    actual = model(input_ids=ids[:, :-1], seq_idx=seq_idx)
    assert actual.dtype == torch.float64
    assert relative_error(actual, scores) < 1e-9
    losses.mean().backward()
    # megatron-core's loss is computed in float32; in float64 the model's own part is what is compared
    reference.losses(actual[..., :VOCABULARY], ids[:, 1:]).mean().backward()
    errors = {name: relative_error(p.grad, parameters[name].grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("symbols", "changes"),
    [
        ("M", {}),
        ("*-", {}),
        ("*-", {"rotary_percent": 1.0, "rotary_base": 10000}),
        ("PS", {"mamba_num_groups": 1}),
        ("PS", {"mamba_num_groups": 2}),
        ("PS", {"mamba_norm": False}),
        ("*S", {}),
        ("L", {}),
    ],
    ids=[
        *("mamba2", "transformer", "transformer, whole heads rotated", "falcon_h1, 1 group", "2 groups", "no norm"),
        *("llama", "linear layers"),
    ],
)
def test_pure_patterns(symbols: str, changes: dict, packed: bool) -> None:
    """The reference turns by positions in the row too: in packed rows only the differences count."""
    config = pure_config(symbols, dtype=torch.float64, **changes)
    config.definition().validate_structure("test")
    model = small_model(config)
    if config.position_embedding_type == "rope":  # megatron-core computes angles in the precision of these
        model.rotary_pos_emb.inv_freq = exact_frequencies(config)
    ids, seq_idx = tokens(BATCH, LENGTH + 1), documents() if packed else None
    scores, losses, parameters = expected(model, config.definition(), ids, seq_idx)
    actual = model(input_ids=ids[:, :-1], seq_idx=seq_idx)
    assert 0.3 < float(actual.detach().std()) < 3
    assert relative_error(actual, scores) < 1e-9
    losses.mean().backward()
    reference.losses(actual[..., :VOCABULARY], ids[:, 1:]).mean().backward()
    errors = {name: relative_error(p.grad, parameters[name].grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:5]


def exact_frequencies(config) -> torch.Tensor:
    d = config.definition()
    return torch.tensor([reference.frequency(d, i) for i in range(d.rotary_dim // 2)], dtype=torch.float64)


@pytest.mark.parametrize("symbols", ["*-", "*S"])
def test_rotary_positions_in_float32(symbols: str) -> None:
    """As it is trained: angles from float32."""
    config = pure_config(symbols)
    model = small_model(config)
    ids = tokens(BATCH, LENGTH + 1)
    scores, _, _ = expected(model, config.definition(), ids, None)
    assert relative_error(model(input_ids=ids[:, :-1]), scores) < 1e-4
    if symbols == "*S":  # scaled frequencies, not the plain ones
        frequencies = model.rotary_pos_emb.inv_freq
        assert relative_error(frequencies, exact_frequencies(config)) < 1e-6
        assert relative_error(frequencies, 100.0 ** (-torch.arange(8) / 8)) > 0.01
        return
    config.position_embedding_type = "none"
    assert relative_error(small_model(config)(input_ids=ids[:, :-1]), scores) > 0.1, "positions make no difference"


def test_activations_are_at_scale_one() -> None:
    """Otherwise the comparisons above would be easier than they look."""
    scores = small_model(small_config())(input_ids=tokens(BATCH, LENGTH))
    assert 0.3 < float(scores.detach().std()) < 3
