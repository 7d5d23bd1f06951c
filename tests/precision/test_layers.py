"""FP8 in the model: in which layers, under recompute, without state in checkpoints, and good enough to train."""

from __future__ import annotations

import contextlib

import pytest
import torch
from small_model import small_config, small_model, tokens

PATTERN = "M-M*-M-"
LAYERS = len(PATTERN)
pytestmark = pytest.mark.usefixtures("megatron")


def fp8_config(recipe: str | None, edges: int = 2, pattern: str = PATTERN, **changes):
    """As the precision plugin sets it."""
    return small_config(
        pattern=pattern,
        fp8_emulation=recipe,
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=edges,
        num_layers_at_end_in_bf16=edges,
        **changes,
    )


def step(recipe: str | None, **changes):
    """Loss and gradients of one step."""
    model = small_model(fp8_config(recipe, **changes)).train()
    batch = tokens(2, 65)
    loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("edges", "layers"), [(0, range(7)), (1, range(1, 6)), (2, range(2, 5)), (3, range(3, 4))])
@pytest.mark.parametrize("pattern", [PATTERN, "M-ML*-L"])
def test_all_linear_layers_but_those_at_the_ends(pattern: str, edges: int, layers: range) -> None:
    model = small_model(fp8_config("fp8_current_scaling", edges, pattern))
    for number, layer in enumerate(model.decoder.layers):
        found = {name: m.fp8_emulation for name, m in layer.named_modules() if hasattr(m, "fp8_emulation")}
        assert len(found) == (1 if pattern[number] == "L" else 2)
        assert set(found.values()) == ({"fp8_current_scaling"} if number in layers else {None}), number
    assert model.output_layer.fp8_emulation is None


@pytest.mark.parametrize("recipe", ["fp8_current_scaling", "fp8_blockwise"])
def test_fp8_layers_quantise_and_the_others_do_not(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.model import megatron_layers

    shapes, real = [], megatron_layers.fp8_linear
    monkeypatch.setattr(
        megatron_layers,
        "fp8_linear",
        lambda x, weight, name: shapes.append(tuple(weight.shape)) or real(x, weight, name),
    )
    loss, _ = step(recipe)
    # layers 2 to 4: mixer, attention, FFN
    assert shapes == [(2 * 128 + 2 * 32 + 8, 48), (48, 128), (128, 48), (48, 64), (80, 48), (48, 80)]
    exact, _ = step(None)
    assert 0 < abs(loss - exact) < 0.1 * exact


@pytest.mark.parametrize(
    "again", [{}, {"recompute_mamba": "layer", "recompute_attention": "layer"}], ids=["kept", "recomputed"]
)
def test_every_layer_runs_in_its_own_transformer_engine_context(again: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine multiplies, megatron-core's context decides: entered around each layer, and once more
    around what the backward pass computes again.
    """
    from nemotron_h.model import layers

    inside, seen = [], []

    @contextlib.contextmanager
    def context(config, layer_no, is_init=False):
        inside.append(layer_no)
        yield
        inside.pop()

    monkeypatch.setattr(layers, "get_fp8_context", context)
    model = small_model(small_config(pattern=PATTERN, **again)).train()
    for number, layer in enumerate(model.decoder.layers):
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_emulation"):
                module.register_forward_pre_hook(lambda *_, n=number, k=name: seen.append((n, list(inside))))
    batch = tokens(2, 65)
    model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()).mean().backward()
    assert all(within == [number] for number, within in seen)
    assert not inside
    recomputed = sum(symbol in "M*" for symbol in PATTERN) if again else 0
    assert len(seen) == 2 * (LAYERS + recomputed)


def test_megatron_makes_no_context_in_the_layers_at_the_ends() -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = fp8_config(None)
    assert [is_first_last_bf16_layer(config, n) for n in range(LAYERS)] == [n not in (2, 3, 4) for n in range(LAYERS)]


def test_recompute_changes_nothing() -> None:
    loss, gradients = step("fp8_current_scaling")
    again, others = step(
        "fp8_current_scaling", recompute_mamba="layer", recompute_attention="layer", recompute_ffn="layer"
    )
    assert torch.equal(loss, again)
    assert not [name for name, g in gradients.items() if not torch.equal(g, others[name])]


def test_checkpoints_hold_no_fp8_state_and_load_without_it() -> None:
    fp8, bf16 = small_model(fp8_config("fp8_current_scaling"), seed=1), small_model(fp8_config(None), seed=2)
    one, two = fp8.sharded_state_dict(), bf16.sharded_state_dict()
    assert one.keys() == two.keys()
    assert not [key for key in one if "extra_state" in key]
    weights = {key: value for key, value in fp8.state_dict().items() if "extra_state" not in key}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    bf16.load_state_dict(weights, strict=True)
    fp8.load_state_dict(weights, strict=True)
    with pytest.raises(RuntimeError, match="final_norm"):
        bf16.load_state_dict({key: value for key, value in weights.items() if "final_norm" not in key}, strict=True)


def test_both_recipes_train() -> None:
    last = {}
    for recipe in (None, "fp8_current_scaling", "fp8_blockwise"):
        torch.manual_seed(0)
        model = small_model(fp8_config(recipe)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        batch = tokens(2, 65)
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last[recipe] = losses[-1]
        assert losses[-1] < losses[0] / 2, (recipe, losses)
    for recipe, loss in last.items():
        assert loss == pytest.approx(last[None], abs=0.01 * losses[0]), recipe  # of what there is to learn
