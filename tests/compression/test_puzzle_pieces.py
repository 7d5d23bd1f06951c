"""Variants of a layer: what they are made of, what training leaves of their error, and their scores in its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_model import definition, model

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import Variant, check_library, variants_of
from nemotron_h.compression.child import whole_axes
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import align_layer, plain_mean
from nemotron_h.compression.heads.fusion import PooledLayers
from nemotron_h.compression.heads.moments import measure_moments
from nemotron_h.compression.importance import Scores, measure
from nemotron_h.compression.puzzle.initial import Knowledge, initial_tensors
from nemotron_h.compression.puzzle.local import Piece, Training, changes, errors, fit_linear, train
from nemotron_h.compression.selection import top_channels
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import GenerationModel
from nemotron_h.schema.puzzle import LibrarySchema

PATTERN = "M*-E"
HEADS = {"num_attention_heads": 4, "num_query_groups": 4}
LIBRARY = LibrarySchema(
    num_query_groups=[2, 1],
    ffn_hidden_size=[48],
    mamba_num_heads=[8],
    mamba_head_dim=[8],
    num_experts=[4],
    expert_hidden_size=[24],
    linear=["attention"],
    no_op=["attention", "ffn"],
)


def text(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Return token ids [rows, length]."""
    return np.random.default_rng(seed).integers(0, 300, (rows, length))


def stored(parent: GenerationModel, layer: int) -> list[torch.Tensor]:
    """Return a layer's weights as a checkpoint holds them."""
    w = dict(vars(parent.layers[layer]))
    if "A" in w:
        w |= {"A": torch.log(-w["A"]), "conv_weight": w["conv_weight"].unsqueeze(1)}
    return list(w.values())


@pytest.fixture(scope="module")
def parent() -> GenerationModel:
    return model(definition(PATTERN, **HEADS))


@pytest.fixture(scope="module")
def scores(parent: GenerationModel) -> Scores:
    return measure(parent, text(2, 24), text(4, 24)).scores()


VARIANTS = [
    (layer, name)
    for layer, of_layer in enumerate(variants_of(definition(PATTERN, **HEADS), LIBRARY))
    for name in of_layer
]


def test_every_combination_of_widths_is_a_variant() -> None:
    assert [name for layer, name in VARIANTS if layer == 0] == [
        "parent",
        "mamba_head_dim=8",
        "mamba_num_heads=8",
        "mamba_num_heads=8,mamba_head_dim=8",
    ]
    assert [name for layer, name in VARIANTS if layer == 1] == [
        "parent",
        *("num_query_groups=2", "num_query_groups=1", "linear", "no_op"),
    ]
    assert [name for layer, name in VARIANTS if layer == 2] == ["parent", "ffn_hidden_size=48", "no_op"]


def test_widths_of_a_layer_s_own_are_where_its_variants_begin() -> None:
    d = definition("M--", overrides={1: {"ffn_hidden_size": 48}})
    of_layers = variants_of(d, LibrarySchema(ffn_hidden_size=[64, 48, 32]))
    assert list(of_layers[1]) == ["parent", "ffn_hidden_size=32"]
    assert list(of_layers[2]) == ["parent", "ffn_hidden_size=64", "ffn_hidden_size=48", "ffn_hidden_size=32"]


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ({"num_query_groups": [3]}, "library.num_query_groups has 3, which does not divide the 4"),
        ({"ffn_hidden_size": [96]}, "library.ffn_hidden_size has 96; small has 80"),
        ({"mamba_num_heads": [7]}, "no multiple of the 2 groups"),
        ({"linear": ["swiglu"]}, "puzzle.library.linear"),
        ({}, "puzzle.library has no variant of any layer"),
    ],
)
def test_a_library_that_fits_no_layer_is_refused(library: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_library(definition(PATTERN, **HEADS), LibrarySchema(**library), "recipe x")
    if "num_query_groups" in library:
        normed = replace(definition(PATTERN, **HEADS), qk_norm=True)
        with pytest.raises(UserError, match=r"library\.num_query_groups has 3: the model has model\.qk_norm"):
            check_library(normed, LibrarySchema(**library), "recipe x")


def _piece(parent: GenerationModel, scores: Scores, layer: int, name: str, moments=None) -> Piece:
    variant = variants_of(parent.definition, LIBRARY)[layer][name]
    knowledge = Knowledge(scores, moments, {})
    tensors = initial_tensors(parent.definition, layer, variant, stored(parent, layer), knowledge)
    return Piece(variant.block, tensors, Forward(parent))


def _narrow(d: ModelDefinition, layer: int, variant: Variant, scores: Scores) -> dict[str, np.ndarray]:
    block = d.blocks[layer]
    widths = {axis.key: axis.size for axis in block.axes()} | dict(variant.widths)
    return whole_axes(block) | top_channels(block, scores.inner[layer], widths)


@pytest.mark.parametrize(
    ("layer", "name"), [(n, name) for n, name in VARIANTS if "=" in name and "num_query_groups" not in name]
)
def test_a_narrower_variant_is_the_masked_parent(
    parent: GenerationModel, scores: Scores, layer: int, name: str
) -> None:
    d, x = parent.definition, torch.randn(2, 20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forward, variant = Forward(parent), variants_of(d, LIBRARY)[layer][name]
    masks = d.blocks[layer].masks(_narrow(d, layer, variant, scores))
    masks = {key: torch.from_numpy(mask).double() for key, mask in masks.items()}
    expected = forward.layer(layer, forward.weights(layer), x, masks=masks)
    torch.testing.assert_close(_piece(parent, scores, layer, name)(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("heads", [2, 1])
def test_merged_heads_are_the_parent_with_each_head_its_group_s_mean(
    parent: GenerationModel, scores: Scores, heads: int, aligned: bool
) -> None:
    x = torch.randn(2, 20, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moments = measure_moments(parent, text(4, 24)) if aligned else None
    of_layer = parent.definition.blocks[1].attention_heads()
    alignment = align_layer(moments[1], of_layer, heads) if aligned else plain_mean(of_layer, heads)
    pooled = PooledLayers(parent, {1: alignment})[1]
    expected = Forward(parent).layer(1, pooled, x)
    piece = _piece(parent, scores, 1, f"num_query_groups={heads}", moments)
    torch.testing.assert_close(piece(x), expected, rtol=1e-10, atol=1e-10)


def test_a_linear_layer_starts_as_the_least_squares_fit(parent: GenerationModel) -> None:
    forward, windows = Forward(parent), text(6, 20)
    x = forward.embed(torch.from_numpy(windows))
    x = x + forward.layer(0, forward.weights(0), x)
    h = forward.norm(x, parent.layers[1].norm).flatten(0, 1)
    y = forward.layer(1, forward.weights(1), x).flatten(0, 1)
    oracle = np.linalg.lstsq(h.numpy(), y.numpy(), rcond=None)[0].T
    fit = fit_linear(forward, 1, windows, batch=4)
    np.testing.assert_allclose(fit.matrix().numpy(), oracle, rtol=1e-3, atol=1e-3 * abs(oracle).max())


def test_training_a_variant_lowers_its_error_whatever_is_trained_beside_it(
    parent: GenerationModel, scores: Scores
) -> None:
    held_out = text(4, 24, seed=9)
    before, after = {}, {}
    for names in (["ffn_hidden_size=48"], ["ffn_hidden_size=48", "other"]):
        pieces = {name: _piece(parent, scores, 2, "ffn_hidden_size=48") for name in names}
        initial = Piece(pieces[names[0]].running.block, pieces[names[0]].tensors, Forward(parent))
        lengths = {name: Training(tokens, 4, 3e-2) for name, tokens in zip(names, (4 * 24 * 40, 96), strict=False)}
        before = errors(Forward(parent), range(2, 3), pieces, held_out, 2)
        train(Forward(parent), range(2, 3), pieces, lengths, lambda step: text(4, 24, seed=100 + step))
        after[len(names)] = errors(Forward(parent), range(2, 3), pieces, held_out, 2)
    kept = errors(Forward(parent), range(2, 3), {"initial": initial}, held_out, 2)["initial"]
    assert kept == before["other"], "weights before the training are there, if it makes them worse"
    assert after[1]["ffn_hidden_size=48"] == after[2]["ffn_hidden_size=48"] < 0.8 * before["other"]
    assert after[2]["other"] > after[2]["ffn_hidden_size=48"], "a step of training is less than 40"
    assert not any(tensor.requires_grad for piece in pieces.values() for tensor in piece.tensors)


@pytest.mark.parametrize(
    ("layer", "name"),
    [(0, "mamba_num_heads=8"), (1, "num_query_groups=2"), (2, "ffn_hidden_size=48"), (3, "num_experts=4")],
)
def test_variants_of_a_bfloat16_parent_train_in_float32(
    parent: GenerationModel, scores: Scores, layer: int, name: str
) -> None:
    """As on a GPU: they run in the parent's dtype, and steps too small for bfloat16 are not lost."""
    held_out, there = text(4, 24, seed=9), range(layer, layer + 1)
    single, half = parent.to(torch.float32), parent.to(torch.bfloat16)
    after = {}
    for each in (single, half):
        tensors = [tensor.float() for tensor in _piece(parent, scores, layer, name).tensors]
        block = variants_of(parent.definition, LIBRARY)[layer][name].block
        piece = Piece(block, tensors, Forward(each))
        train(Forward(each), there, {"": piece}, {"": Training(4 * 24 * 20, 4, 1e-3)}, lambda n: text(4, 24, 100 + n))
        assert all(tensor.dtype == torch.float32 for tensor in piece.tensors)
        moved = max(float((a - b).abs().max()) for a, b in zip(piece.tensors, tensors, strict=True))
        assert 0 < moved < 0.05
        after[each.dtype] = errors(Forward(each), there, {"": piece}, held_out, 2)[""]
    assert after[torch.bfloat16] == pytest.approx(after[torch.float32], rel=0.1)  # experts are others for some tokens


def test_scores_are_those_of_the_model_with_one_layer_replaced(parent: GenerationModel, scores: Scores) -> None:
    """An oracle: distributions of models in which a layer is another one, in float64."""
    windows, forward = text(3, 21, seed=4), Forward(parent)
    piece = _piece(parent, scores, 1, "num_query_groups=2")
    results = changes(forward, 1, {"merged": piece, "left out": None}, windows, batch=2)

    def distribution(replaced) -> torch.Tensor:
        x = forward.embed(torch.from_numpy(windows[:, :-1]))
        for layer in range(4):
            x = x + (replaced(x) if layer == 1 else forward.layer(layer, forward.weights(layer), x))
        return forward.logits(x).log_softmax(-1)

    expected = distribution(lambda x: forward.layer(1, forward.weights(1), x))
    labels = torch.from_numpy(windows[:, 1:])
    for name, replaced in (("merged", piece), ("left out", torch.zeros_like)):
        actual = distribution(replaced)
        kl = (expected.exp() * (expected - actual)).sum(-1).mean()
        assert results[name].kl == pytest.approx(float(kl), rel=1e-4)
        loss = -actual.gather(-1, labels[..., None]).mean()
        assert results[name].loss == pytest.approx(float(loss), rel=1e-5)
        assert results[name].accuracy == pytest.approx(float((actual.argmax(-1) == labels).double().mean()))
    assert results[""].kl == 0
    assert results["left out"].measured("loss", results[""]) == results["left out"].loss - results[""].loss
