"""Latency by peak rates against measured steps of the 8B; by measured layers against the whole model, on this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.inference import layer_costs
from nemotron_h.inference.model import GenerationModel
from nemotron_h.laws.shapes import enumerate_shapes, model_named
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.latency import (
    check_costs,
    measured_latency,
    read_layer_costs,
    roofline,
    write_layer_costs,
)
from nemotron_h.schema.layer_costs import Cost, LayerCosts, Machine, Scenario


@pytest.mark.parametrize(("name", "milliseconds"), [("nemotron_h_8b", 6.9), ("nemotron_t_8b", 10.3)])
def test_peak_rates_are_below_measured_steps_by_a_third(name: str, milliseconds: float) -> None:
    """Of one H100 at batch 1 behind 65,536 tokens (docs/results/generation.md)."""
    least = roofline(model_named(name), gpu("h100"), Scenario(1, 65_536))
    assert 0.6 < 1e3 * least.decode / milliseconds < 0.8


def test_prefill_grows_with_tokens_and_decode_with_the_cache_alone() -> None:
    hybrid, h200 = model_named("nemotron_h_8b"), gpu("h200")
    short, long = (roofline(hybrid, h200, Scenario(1, context)) for context in (8192, 16_384))
    assert 1.9 < long.prefill / short.prefill < 2.3
    assert 1 < long.decode / short.decode < 1.02
    large = roofline(hybrid, h200, Scenario(64, 8192))
    assert short.decode < large.decode < 3 * short.decode


def clocked(model: GenerationModel, prompts: torch.Tensor, scenario: Scenario) -> tuple[float, float]:
    """Stand in for a timed turn: a nanosecond for each parameter of a layer, a millisecond for the ends."""
    layers = sum(block.parameters for block in model.definition.blocks)
    return 1e-3 + 1e-9 * layers * scenario.context, 1e-3 + 1e-9 * layers


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> LayerCosts:
    monkeypatch.setattr(layer_costs, "_turn", clocked)
    return layer_costs.measure(model_named("nemotron_h_tiny"), [128, 256], Scenario(2, 32), "cpu", turns=1)


def test_a_layer_costs_what_stacks_differ_in(costs: LayerCosts) -> None:
    tiny = model_named("nemotron_h_tiny")
    latency = measured_latency(costs, tiny)
    layers = sum(block.parameters for block in tiny.blocks)
    assert latency.decode == pytest.approx(1e-3 + 1e-9 * layers, rel=0.01)
    # the last FFN reads the last token alone: no state comes after it
    assert latency.prefill == pytest.approx(1e-3 + 1e-9 * (32 * layers - 31 * tiny.blocks[-1].parameters), rel=0.01)


@pytest.mark.parametrize("like", ["nemotron_t_tiny", "mamba2_4m", "falcon_h1_tiny"])
def test_layers_of_any_family_are_measured(monkeypatch: pytest.MonkeyPatch, like: str) -> None:
    """Rotary positions have no use in a stack of FFNs."""
    monkeypatch.setattr(layer_costs, "_turn", clocked)
    costs = layer_costs.measure(model_named(like), [256], Scenario(1, 8), "cpu", turns=1)
    assert set(costs.layers) == {*(kind.name for kind in model_named(like).kinds), "ends"}


def test_a_turn_generates() -> None:
    tiny = model_named("nemotron_h_tiny")
    model = layer_costs.random_model(tiny, torch.float32, "cpu")
    (times,) = layer_costs.seconds([model], Scenario(3, 40), turns=1)
    assert 0 < times[1] < times[0]
    logits = model.logits(layer_costs._read_all(model, torch.zeros(3, 40, dtype=torch.int64), model.new_states(3, 40)))
    assert logits.shape == (3, tiny.vocab_size)
    assert logits.isfinite().all()


def test_a_measurement_that_noise_hides_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_costs, "_turn", lambda *_: (1e-3, 1e-4))
    with pytest.raises(UserError, match=r"mamba layers of 128: 7 of them take 1 and 0\.1 ms") as error:
        layer_costs.measure(model_named("nemotron_h_tiny"), [128], Scenario(1, 8), "cpu", turns=1)
    assert "idle machine" in error.value.hint


def test_costs_are_read_as_they_were_written(costs: LayerCosts, tmp_path: Path) -> None:
    file = tmp_path / "costs.yaml"
    write_layer_costs(file, costs)
    assert read_layer_costs(file) == costs
    file.write_text(file.read_text().replace("decode: ", "decode: -", 1))
    with pytest.raises(UserError, match=r"layers\.mamba: decode = -"):
        read_layer_costs(file)


def stated() -> LayerCosts:
    """Return costs with round numbers: a Mamba-2 layer of 128 takes 1 ms, one of 256 takes 4 ms."""
    sizes = {"mamba": (135_064, 467_504), "attention": (65_664, 196_864), "ffn": (172_160, 688_384)}
    rows = {**sizes, "ends": (1_048_704, 2_097_408)}
    layers = {
        kind: [Cost(h, n, t, t / 10) for h, n, t in zip((128, 256), each, (1e-3, 4e-3), strict=True)]
        for kind, each in rows.items()
    }
    widths = {"head_dim": 64, "mamba_head_dim": 32, "mamba_state_dim": 64, "conv_kernel": 4}
    return LayerCosts(Machine("cpu", "any", 1, "float32", "2"), Scenario(1, 512), widths, layers)


def test_other_scenarios_widths_and_sizes_are_refused() -> None:
    costs, tiny = stated(), model_named("nemotron_h_tiny")
    with pytest.raises(UserError, match="was measured with batch 1, 512 tokens of prompt, not with batch 8"):
        check_costs(costs, tiny, Scenario(8, 512), "cpu.yaml")
    with pytest.raises(UserError, match="was measured with head_dim = 64; nemotron_h_8b has 128"):
        check_costs(costs, model_named("nemotron_h_8b"), Scenario(1, 512), "cpu.yaml")
    del costs.layers["ffn"]
    with pytest.raises(UserError, match="has no ffn layers"):
        check_costs(costs, tiny, Scenario(1, 512), "cpu.yaml")
    wide = next(shape for shape in enumerate_shapes(tiny, 60_000_000) if shape.hidden_size > 512)
    assert measured_latency(stated(), wide) is None
