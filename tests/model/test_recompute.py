"""Recomputing layers in the backward pass changes no bit of losses or gradients, and keeps less."""

from __future__ import annotations

import pytest
from small_model import pure_config, relative_error, small_config, small_model, tokens

from nemotron_h.ops import output_matmul

SETTINGS = {
    "mamba": {"recompute_mamba": "layer"},
    "attention": {"recompute_attention": "layer"},
    "ffn": {"recompute_ffn": "layer"},
    "activation": {"recompute_ffn": "activation"},
    "all": {"recompute_mamba": "layer", "recompute_attention": "layer", "recompute_ffn": "layer"},
    "all, offloaded": {
        "recompute_mamba": "layer",
        "recompute_attention": "layer",
        "recompute_ffn": "layer",
        "recompute_offload": True,
    },
    "ffn, offloaded": {"recompute_ffn": "layer", "recompute_offload": True},
    "parallel": {"recompute_parallel": "layer"},
    "swiglu": {"recompute_swiglu": "layer"},
    "experts": {"recompute_experts": "layer"},
    "linear": {"recompute_linear": "layer"},
    "swiglu activation": {"recompute_swiglu": "activation"},
}


def config_of(**changes):
    """The small hybrid, or that with experts or linear layers or the small Falcon-H1 where a setting is of these."""
    if "recompute_experts" in changes:
        return pure_config("E", **{"balance_loss": 0.1, **changes})
    if "recompute_linear" in changes:
        return pure_config("L", **changes)
    falcon = any(key in changes for key in ("recompute_parallel", "recompute_swiglu"))
    return pure_config("PS", **changes) if falcon else small_config(**changes)


def step(**changes):
    """Loss and gradients of one training step."""
    model = small_model(config_of(**changes)).train()
    batch = tokens(2, 65)
    loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def kept_bytes(**changes) -> int:
    """What autograd keeps of a forward pass, beyond the weights."""
    import torch

    model = small_model(config_of(**changes)).train()
    batch, saved = tokens(2, 65), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_in_chunks_give_the_same_and_keep_less(megatron, monkeypatch, tied: bool) -> None:
    """Sums over chunks have another order; a loss mask is in the gradient of the losses."""
    monkeypatch.setitem(output_matmul.CHUNK_ELEMENTS, "cpu", 17 * 384)
    changes = {"share_embeddings_and_output_weights": tied}
    (loss, gradients), (chunked, theirs) = step(**changes), step(recompute_logits="chunks", **changes)
    assert relative_error(chunked, loss) < 1e-6
    assert gradients.keys() == theirs.keys()
    errors = {key: relative_error(theirs[key], value) for key, value in gradients.items()}
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda e: -e[1])[:5]
    assert kept_bytes(**changes) - kept_bytes(recompute_logits="chunks", **changes) > 0.9 * 128 * 384 * 4


@pytest.fixture(scope="module")
def plain(megatron):
    """Without recomputation, by a kind of layers: of the hybrid, of Falcon-H1, with experts, and linear layers."""
    kinds = ("mamba", "parallel", "experts", "linear")
    models = {kind: {f"recompute_{kind}": "none"} for kind in kinds}
    return {kind: (*step(**settings), kept_bytes(**settings)) for kind, settings in models.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_recompute_is_exact_and_keeps_less(plain, megatron, name: str) -> None:
    kind = name.replace("swiglu", "parallel").split()[0]
    plain = plain.get(kind, plain["mamba"])
    loss, gradients = step(**SETTINGS[name])
    assert loss.equal(plain[0])
    assert gradients.keys() == plain[1].keys()
    different = [key for key, value in plain[1].items() if not gradients[key].equal(value)]
    assert not different
    assert kept_bytes(**SETTINGS[name]) < plain[2]


def test_evaluation_recomputes_nothing(megatron) -> None:
    import torch

    batch = tokens(1, 33)
    losses = []
    for changes in ({}, SETTINGS["all"], SETTINGS["activation"]):
        model = small_model(small_config(**changes)).eval()
        with torch.no_grad():
            losses.append(model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()))
    assert losses[0].equal(losses[1])
    assert losses[0].equal(losses[2])
