"""LoRA and DoRA: an untrained adapter changes nothing, only adapters are trained, and packing changes no gradient."""

from __future__ import annotations

import pytest
import torch
from adapted_model import KINDS, adapted_config, adapted_model, adapter, randomize_adapters
from small_model import pure_config, relative_error, small_config, small_model, tokens
from test_packed_conversations import SEQ, conversations, masked_losses

from nemotron_h.core.errors import UserError
from nemotron_h.schema.recipe import AdapterSchema

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_is_the_base_exactly(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, base = adapted_model(adapted_config(kind, dtype))
        ids = tokens(2, 40)
        assert torch.equal(model(input_ids=ids), base(input_ids=ids))
    randomize_adapters(model)
    assert relative_error(model(input_ids=ids).detach(), base(input_ids=ids).detach()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained(kind: str) -> None:
    from nemotron_h.architecture.adapters import trained_parameters

    model, _ = adapted_model(adapted_config(kind))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trained)
    assert len(trained) == (2 if kind == "lora" else 3) * 2 * 7  # two matrices in each of seven layers
    assert sum(p.numel() for p in trained.values()) == trained_parameters(adapter(kind), model.config.definition())
    model(input_ids=tokens(1, 20)).square().mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_unpacked(kind: str) -> None:
    from nemotron_h.data.feed.sft_module import packed_window

    model, _ = adapted_model(adapted_config(kind, torch.float64))
    randomize_adapters(model)
    windows = conversations()
    packed = [packed_window(window, SEQ, pad_id=1) for window in windows]
    batch = {key: torch.stack([p[key] for p in packed]) for key in packed[0]}
    loss = masked_losses(model, batch).sum()
    loss.backward()
    together = trained_gradients(model)
    alone = 0.0
    for ids, learnt in (conversation for window in windows for conversation in window):
        one = {
            "tokens": torch.from_numpy(ids[None, :-1]),
            "labels": torch.from_numpy(ids[None, 1:]),
            "loss_mask": torch.from_numpy(learnt[None, 1:]),
        }
        part = masked_losses(model, one).sum()
        part.backward()
        alone += part.item()
    assert loss.item() == pytest.approx(alone, rel=1e-9)
    errors = {name: relative_error(together[name], g) for name, g in trained_gradients(model).items()}
    assert len(errors) == (2 if kind == "lora" else 3) * 2 * 7
    assert max(errors.values()) < 1e-9, sorted(errors.items(), key=lambda e: -e[1])[:5]


def trained_gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def test_gradients_are_those_of_the_weights_they_stand_for() -> None:
    """dB = s dW A^T and dA = s B^T dW, with dW of a full model that has the merged weights."""
    model, _ = adapted_model(adapted_config("lora", torch.float64))
    randomize_adapters(model)
    merged = small_model(small_config(2, dtype=torch.float64))
    weights = dict(merged.named_parameters())
    layers = {name.rpartition(".adapter.")[0] for name, p in model.named_parameters() if p.requires_grad}
    of = dict(model.named_parameters())
    with torch.no_grad():
        for name in layers:
            weights[f"{name}.weight"] += 2.0 * of[f"{name}.adapter.b"] @ of[f"{name}.adapter.a"]
    ids = tokens(2, 40)
    for each in (model, merged):
        each(input_ids=ids).square().mean().backward()
    assert relative_error(model(input_ids=ids).detach(), merged(input_ids=ids).detach()) < 1e-9
    for name in layers:
        full, a, b = weights[f"{name}.weight"].grad, of[f"{name}.adapter.a"], of[f"{name}.adapter.b"]
        assert relative_error(b.grad, 2.0 * full @ a.detach().T) < 1e-9, name
        assert relative_error(a.grad, 2.0 * b.detach().T @ full) < 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers_have_the_same_gradients(kind: str) -> None:
    again = {"recompute_mamba": "layer", "recompute_attention": "layer", "recompute_ffn": "activation"}
    results = []
    for recompute in ({}, again, {**again, "recompute_ffn": "layer"}):
        model, _ = adapted_model(adapted_config(kind, recompute=recompute))
        randomize_adapters(model)
        loss = model(input_ids=tokens(2, 40)).square().mean()
        loss.backward()
        results.append({"loss": loss.detach(), **trained_gradients(model)})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            assert relative_error(other[name], value) < 1e-5, name


@pytest.mark.parametrize("recipe", ["fp8_current_scaling", "fp8_blockwise"])
def test_an_untrained_adapter_on_fp8_is_fp8(recipe: str) -> None:
    """The base's products stay in FP8; the adapter's, which are narrow, are in the precision of the activations."""
    model, base = adapted_model(adapted_config("dora"))
    for each in (model, base):
        for module in each.modules():
            if hasattr(module, "fp8_emulation"):
                module.fp8_emulation = recipe
    ids = tokens(1, 32)
    quantised = model(input_ids=ids).detach()
    assert torch.equal(quantised, base(input_ids=ids))
    for module in base.modules():
        if hasattr(module, "fp8_emulation"):
            module.fp8_emulation = None
    assert not torch.equal(quantised, base(input_ids=ids))
    model(input_ids=ids).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith(".adapter.b"))


def test_dropout_falls_on_the_adapter_in_training_alone() -> None:
    model, _ = adapted_model(adapted_config("lora", dropout=0.5))
    randomize_adapters(model)
    ids = tokens(1, 30)
    torch.manual_seed(1)
    one, other = model(input_ids=ids), model(input_ids=ids)
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(input_ids=ids), model(input_ids=ids))
    plain, _ = adapted_model(adapted_config("lora"))
    randomize_adapters(plain)
    assert torch.equal(model(input_ids=ids), plain.eval()(input_ids=ids))


def test_a_part_of_the_targets() -> None:
    model, _ = adapted_model(adapted_config("lora", targets=["out_proj", "linear_fc1"]))
    names = {n.rpartition(".adapter.")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"out_proj", "linear_fc1"}


def test_falcon_h1_is_adapted_in_both_branches_and_in_all_of_swiglu() -> None:
    model = pure_config("PS", adapter=adapter("lora")).configure_model(None)
    parts = {n.rpartition(".adapter.")[0]: p.shape for n, p in model.named_parameters() if n.endswith("adapter.b")}
    of_layer = {"mixer.in_proj": 328, "mixer.out_proj": 48}  # rows: z, x, B, C, dt; of queries, keys, values; gate, up
    of_layer |= {"self_attention.linear_qkv": 128, "self_attention.linear_proj": 48}
    expected = {f"decoder.layers.{layer}.{name}": (rows, 4) for layer in (0, 2) for name, rows in of_layer.items()}
    for layer in (1, 3):
        expected |= {f"decoder.layers.{layer}.mlp.linear_fc{n}": (rows, 4) for n, rows in ((1, 2 * 80), (2, 48))}
    assert parts == expected


def test_the_built_model_checks_its_adapter_too() -> None:
    with pytest.raises(UserError, match=r"adapter\.rank = 0 is not positive"):
        adapted_config("lora", rank=0).configure_model(None)
    assert small_config(2, adapter=AdapterSchema()).adapter is None
