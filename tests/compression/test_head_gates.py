"""Gates on key-value heads: their distribution and schedule, both of their ends, and what training with them leaves."""

from __future__ import annotations

import numpy as np
import plain_model
import pytest
import torch
from torch import Tensor

from nemotron_h.architecture.variants import Variant
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.gates import MULTIPLIERS, Gates
from nemotron_h.compression.heads.moments import measure_moments
from nemotron_h.compression.puzzle.gated import GatedPiece
from nemotron_h.compression.puzzle.initial import Knowledge, initial_tensors, merging
from nemotron_h.compression.puzzle.local import Piece, Training, errors, train
from nemotron_h.inference.model import GenerationModel

LAYER = 1
MODELS = {
    "no positions": {},
    "half rotated": {"position_embedding": "rope", "rope_base": 100, "rope_percent": 0.5},
}


def text(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(300, size=(rows, 24))


def small(kind: str) -> GenerationModel:
    pattern = "-*-" if MODELS[kind] else "M*-"
    heads = {"num_attention_heads": 8, "num_query_groups": 4}
    return plain_model.model(plain_model.definition(pattern, **heads, **MODELS[kind]))


def gated(model: GenerationModel, kv_heads: int, aligned: bool = True, gates: Gates | None = None) -> GatedPiece:
    d = model.definition
    widths = {"num_query_groups": kv_heads}
    variant = Variant("merged", d.block("*", widths), widths)
    moments = measure_moments(model, text(4, 1)) if aligned else None
    knowledge = Knowledge(None, moments, {})  # no channels are cut
    whole = list(vars(model.layers[LAYER]).values())
    tensors = initial_tensors(d, LAYER, variant, whole, knowledge)
    alignment = merging(d, LAYER, variant, knowledge)
    qkv = whole[alignment.heads.qkv]
    return GatedPiece(variant.block, alignment, tensors, qkv, Forward(model), gates or Gates(4))


def stream() -> Tensor:
    return torch.randn(2, 20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_open_gates_are_the_parent_and_closed_ones_the_merged_layer(kind: str, kv_heads: int, aligned: bool) -> None:
    model, x = small(kind), stream()
    piece = gated(model, kv_heads, aligned)
    parent = piece.forward.layer(LAYER, piece.forward.weights(LAYER), x)
    merged = Piece(piece.running.block, piece.tensors, piece.forward)(x)
    torch.testing.assert_close(piece.mixed(x, torch.ones(4)), parent, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(piece.mixed(x, torch.zeros(4)), merged, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(piece(x), merged, rtol=0, atol=0)
    assert float((parent - merged).abs().max()) > 1e-2


def test_a_gate_moves_the_keys_and_values_of_its_own_head() -> None:
    """An oracle: the parent's layer with one head's rows replaced by its group's mean."""
    model, x = small("no positions"), stream()
    piece = gated(model, 2, aligned=False)
    qkv = model.layers[LAYER].qkv.clone()
    by_group = qkv.view(4, 4, 16, 48)  # of a group: two queries, the key, the value
    by_group[3, 2:] = 0.25 * by_group[3, 2:] + 0.75 * by_group[2:, 2:].mean(0)
    weights = type(model.layers[LAYER])(model.layers[LAYER].norm, qkv, model.layers[LAYER].proj)
    expected = piece.forward.layer(LAYER, weights, x)
    torch.testing.assert_close(piece.mixed(x, torch.tensor([1, 1, 1, 0.25])), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("log_alpha", [-3.0, -2.0, -1.0])
def test_expected_sparsity_is_the_share_of_zeros(log_alpha: float) -> None:
    gates = Gates(100_000)
    gates.log_alpha.fill_(log_alpha)
    share = float((gates.begin(0.0) == 0).double().mean())
    assert share == pytest.approx(float(gates.sparsity()), abs=0.01)


def test_gates_begin_open_grow_quiet_and_end_closed() -> None:
    first = Gates(1000).begin(0.0)
    assert float(first.median()) > 0.99
    assert 0 < float((first == 1).double().mean()) < 1
    gates = Gates(1000, seed=3)
    assert torch.equal(gates.begin(0.4), Gates(1000, seed=3).begin(0.4)), "seeded"
    assert not torch.equal(gates.begin(0.4), Gates(1000, seed=4).begin(0.4))
    spread = [float(gates.begin(done).double().var()) for done in (0.0, 0.4, 0.7)]
    assert spread == sorted(spread, reverse=True)
    assert torch.equal(gates.begin(0.8), gates.begin(0.8)), "without noise"
    assert float(gates.begin(0.85).max()) == pytest.approx(0.5), "under a ceiling"
    assert all(float(gates.begin(done).abs().max()) == 0 for done in (0.9, 0.95, 1.0))


def test_multipliers_ascend_and_fixed_ones_are_one() -> None:
    trained, fixed = Gates(4), Gates(4, "fixed")
    start = float(fixed.sparsity())
    for gates in (trained, fixed):
        gates.begin(0.15)  # half of the way to its target
    apart = start + (1 - start) / 2 - float(fixed.sparsity())
    assert apart > 0.4
    assert float(fixed.penalty()) == pytest.approx(apart + apart**2, rel=1e-5)
    assert len(fixed.parameter_groups(100)) == 1, "log_alpha alone"
    groups = trained.parameter_groups(100)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for tensor in (trained.log_alpha, trained.multipliers):
        tensor.requires_grad_(True)
    before = trained.log_alpha.detach().clone()
    trained.penalty().backward()
    torch.testing.assert_close(trained.multipliers.grad, torch.tensor([apart, apart**2]))
    optimizer.step()
    assert torch.all(trained.multipliers > 1), "they weigh a penalty that is above 0 more"
    assert torch.all(trained.log_alpha < before), "and gates close"


@pytest.mark.parametrize("multipliers", MULTIPLIERS)
def test_training_with_gates_ends_with_a_plain_merged_layer(multipliers: str) -> None:
    model = small("no positions")
    held_out, batches = text(4, 9), lambda step: text(4, 100 + step)
    pieces = {name: gated(model, 2, gates=Gates(4, multipliers, seed=5)) for name in ("one", "same")}
    made = errors(Forward(model), range(LAYER, LAYER + 1), pieces, held_out, 4)["one"]
    lengths = dict.fromkeys(pieces, Training(4 * 24 * 60, 4, 1e-2))
    train(Forward(model), range(LAYER, LAYER + 1), pieces, lengths, batches)
    trained = errors(Forward(model), range(LAYER, LAYER + 1), pieces, held_out, 4)
    one, same = pieces.values()
    assert trained["one"] == trained["same"]
    if multipliers == "trained":
        assert trained["one"] < 0.7 * made
        assert one.gates.largest < 0.01, "what is learnt closes them, not the ceiling"
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, same.tensors, strict=True))
    assert not any(tensor.requires_grad for tensor in one.tensors)
    plain = Piece(one.running.block, one.tensors, one.forward)
    assert torch.equal(plain(stream()), one(stream()))
