"""Alignment of key-value heads: rotations and groups against other sources, the function that stays, what merges."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import plain_model
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from nemotron_h.compression.child import Child
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import (
    LayerAlignment,
    align,
    aligned_definition,
    attention_layers,
    plain_mean,
)
from nemotron_h.compression.heads.fusion import PooledLayers, aligned_model
from nemotron_h.compression.heads.grouping import best_groups, count_ways, inside
from nemotron_h.compression.heads.moments import measure_moments
from nemotron_h.compression.heads.procrustes import agreement, best_rotation, energy, group_rotations, shared_energy
from nemotron_h.compression.slicing import Masked, logits_error
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import GenerationModel

ROTARY = {"position_embedding": "rope", "rope_base": 100}
#: a hybrid, Transformers of which half and all of each head is rotated, and layers of other widths
MODELS = {
    "hybrid": ("M-M*-M-*-", {}),
    "half rotated": ("*-*-", {**ROTARY, "rope_percent": 0.5}),
    "rotated": ("*-*-", {**ROTARY, "rope_percent": 1.0}),
    "overrides": ("M-M*-M-*-", {"overrides": {3: {"num_query_groups": 4, "num_attention_heads": 12, "head_dim": 8}}}),
}
WIDTHS = {"num_attention_heads": 16, "num_query_groups": 8, "head_dim": 16}


def small(kind: str) -> GenerationModel:
    pattern, changes = MODELS[kind]
    return plain_model.model(plain_model.definition(pattern, **WIDTHS, **changes))


def windows(samples: int = 4, length: int = 50) -> np.ndarray:
    return np.random.default_rng(1).integers(300, size=(samples, length))


def aligned(model: GenerationModel, kv_heads: int) -> dict[int, LayerAlignment]:
    layers = attention_layers(model.definition, kv_heads, "model")
    return align(measure_moments(model, windows()), layers, kv_heads)


def merged(model: GenerationModel, alignments: dict[int, LayerAlignment], kv_heads: int | None) -> GenerationModel:
    return aligned_model(model, alignments, aligned_definition(model.definition, kv_heads, "merged"))


def difference(one: GenerationModel, other: GenerationModel) -> float:
    return logits_error(Masked(one, Child.whole(one.definition)), other, torch.from_numpy(windows(2)))


def heads_of(dim: int, count: int, seed: int = 0, tokens: int = 60) -> Tensor:
    """Return what heads compute, [count, tokens, dim]."""
    return torch.randn(count, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def crossed(x: Tensor) -> Tensor:
    return torch.einsum("ita,jtb->ijab", x, x)


def position(dim: int, rotary: int, at: int) -> Tensor:
    """Return the matrix by which a position rotates a key, as `split_qkv` does: channel n with n + rotary / 2."""
    matrix, half = torch.eye(dim, dtype=torch.float64), rotary // 2
    for n in range(half):
        angle = torch.tensor(at * 100 ** (-n / half), dtype=torch.float64)
        matrix[n, n] = matrix[n + half, n + half] = angle.cos()
        matrix[n, n + half], matrix[n + half, n] = -angle.sin(), angle.sin()
    return matrix


# rotations


def test_rotation_is_scipy_s() -> None:
    x, y = heads_of(7, 2)
    expected, scale = scipy.linalg.orthogonal_procrustes(x.numpy(), y.numpy())
    rotation = best_rotation(x.T @ y)
    np.testing.assert_allclose(rotation.numpy(), expected, atol=1e-12)
    assert float(agreement(rotation, x.T @ y)) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("rotary", [6, 10])
def test_rotation_under_positions(rotary: int) -> None:
    """It commutes with every position, and a search over the angles finds none better."""
    x, y = heads_of(10, 2)
    rotation = best_rotation(x.T @ y, rotary)
    for at in (1, 5, 100):
        p = position(10, rotary, at)
        torch.testing.assert_close(p @ rotation, rotation @ p, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
    half = rotary // 2
    for n in range(half):
        pair = [n, n + half]
        cross = (x.T @ y)[pair][:, pair]
        angles = torch.linspace(0, 2 * torch.pi, 10_000, dtype=torch.float64)
        turned = angles.cos() * (cross[0, 0] + cross[1, 1]) + angles.sin() * (cross[0, 1] - cross[1, 0])
        assert float(agreement(rotation[pair][:, pair], cross)) == pytest.approx(float(turned.max()), rel=1e-6)
    if rotary < 10:
        expected, _ = scipy.linalg.orthogonal_procrustes(x[:, rotary:].numpy(), y[:, rotary:].numpy())
        np.testing.assert_allclose(rotation[rotary:, rotary:].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("rotary", [0, 4, 8])
def test_group_shares_more_than_pairs_with_any_head_and_no_turn_of_one_head_helps(rotary: int) -> None:
    x = heads_of(8, 4) + 2 * heads_of(8, 1, seed=1)
    cross = crossed(x)
    rotations = group_rotations(cross, rotary)
    shared = shared_energy(cross, rotations)
    mean = (x @ rotations).mean(0)
    assert shared == pytest.approx(4 * float(mean.square().sum()), rel=1e-12)
    assert energy(cross) == pytest.approx(float(x.square().sum()), rel=1e-12)
    for head in range(4):
        assert shared >= shared_energy(cross, best_rotation(cross[:, head], rotary)) * (1 - 1e-12)
        others = [other for other in range(4) if other != head]
        target = (cross[head, others] @ rotations[others]).sum(0)
        best = agreement(best_rotation(target, rotary), target)
        assert float(agreement(rotations[head], target)) == pytest.approx(float(best), rel=1e-3)


# groups


def planted(heads: int, size: int, seed: int) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    rng = np.random.default_rng(seed)
    group = rng.permutation(heads) // size
    noise = rng.random((heads, heads))
    similarity = (noise + noise.T) / 4 + (group[:, None] == group)
    return similarity, tuple(sorted(tuple(np.flatnonzero(group == n).tolist()) for n in range(heads // size)))


@pytest.mark.parametrize(("heads", "size"), [(8, 2), (8, 4), (8, 8), (8, 1), (16, 8), (32, 4), (32, 8)])
def test_planted_groups_are_found(heads: int, size: int) -> None:
    similarity, groups = planted(heads, size, seed=heads + size)
    assert best_groups(similarity, size) == groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "size", "ways"), [(8, 2, 105), (9, 3, 280), (8, 4, 35), (12, 4, 5775)])
def test_search_is_seeded_and_as_good_as_trying_all(
    monkeypatch: pytest.MonkeyPatch, heads: int, size: int, ways: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).random((heads, heads))
    similarity = noise + noise.T
    exact = best_groups(similarity, size)
    assert count_ways(heads, size) == ways
    monkeypatch.setattr("nemotron_h.compression.heads.grouping._TRY_ALL", 0)
    searched = best_groups(similarity, size, seed=3)
    assert searched == best_groups(similarity, size, seed=3)
    assert inside(similarity, searched) == pytest.approx(inside(similarity, exact), rel=1e-12)
    # no exchange of two heads makes it better
    swapped = [
        tuple(tuple({a: b, b: a}.get(head, head) for head in group) for group in searched)
        for a, b in combinations(range(heads), 2)
    ]
    assert max(inside(similarity, groups) for groups in swapped) <= inside(similarity, searched) * (1 + 1e-12)


# models


def test_moments_are_those_of_keys_and_values() -> None:
    model, text = small("hybrid"), windows()
    moments = measure_moments(model, text)
    assert list(moments) == [3, 7]
    forward = Forward(model)
    x = forward.embed(torch.from_numpy(text))
    for layer in range(7):
        x = x + forward.layer(layer, model.layers[layer], x)
    h = forward.norm(x, model.layers[7].norm).flatten(0, 1)
    by_group = model.layers[7].qkv.reshape(8, 4, 16, 48)  # of a group: two queries, the key, the value
    for part, number in ((moments[7].keys, 2), (moments[7].values, 3)):
        outputs = torch.stack([h @ by_group[group, number].T for group in range(8)])
        torch.testing.assert_close(part, crossed(outputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_aligned_model_is_the_same_function(kind: str, kv_heads: int) -> None:
    model = small(kind)
    alignments = aligned(model, kv_heads)
    same = merged(model, alignments, None)
    assert difference(model, same) < 1e-10
    for layer, alignment in alignments.items():
        assert {len(group) for group in alignment.groups} == {alignment.heads.groups // kv_heads}
        if alignment.heads.groups > kv_heads:
            assert float((same.layers[layer].qkv - model.layers[layer].qkv).abs().max()) > 0.1


@pytest.mark.parametrize(("kind", "least"), [("hybrid", 0.0), ("half rotated", 1e-3), ("rotated", 1e-3)])
def test_any_rotation_of_keys_would_change_a_model_with_positions(kind: str, least: float) -> None:
    model = small(kind)
    layers = {n: replace(heads, rotary=0) for n, heads in attention_layers(model.definition, 4, "model").items()}
    same = merged(model, align(measure_moments(model, windows()), layers, 4), None)
    error = difference(model, same)
    assert error > least if least else error < 1e-10


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_merged_model_computes_what_the_pooled_parent_does(kind: str, kv_heads: int) -> None:
    model = small(kind)
    layers = attention_layers(model.definition, kv_heads, "model")
    for alignments in (aligned(model, kv_heads), {n: plain_mean(heads, kv_heads) for n, heads in layers.items()}):
        child = merged(model, alignments, kv_heads)
        blocks = [block for block in child.definition.blocks if block.attention_heads()]
        assert {block.num_query_groups for block in blocks} == {kv_heads}
        assert child.definition.num_attention_heads == 16
        sizes = sum(t.numel() for w in child.layers for t in vars(w).values()) + 2 * 300 * 48 + 48
        assert child.definition.expect.parameters == sizes
        pooled = GenerationModel(
            model.definition, model.embedding, PooledLayers(model, alignments), model.final_norm, model.output
        )
        assert difference(pooled, child) < 1e-10
        assert difference(model, child) > 1e-2


def with_rotated_copies(model: GenerationModel, groups: tuple[tuple[int, ...], ...]) -> None:
    """Make the heads of each group rotations of its first one, by ones that commute with positions."""
    rng = np.random.default_rng(0)
    for block, w in zip(model.definition.blocks, model.layers, strict=True):
        heads = block.attention_heads()
        if heads is None:
            continue
        by_group = w.qkv.view(8, 4, 16, 48)
        for group in groups:
            for head in group[1:]:
                angles = torch.from_numpy(rng.normal(size=(2, 16, 16)))
                key = best_rotation(angles[0], heads.rotary)
                value = torch.from_numpy(scipy.stats.ortho_group.rvs(16, random_state=rng))
                by_group[head, 2] = key.T @ by_group[group[0], 2]
                by_group[head, 3] = value.T @ by_group[group[0], 3]


@pytest.mark.parametrize("groups", [((0, 5), (1, 3), (2, 7), (4, 6)), ((0, 2, 5, 7), (1, 3, 4, 6))], ids=len)
@pytest.mark.parametrize("kind", ["hybrid", "half rotated", "rotated"])
def test_rotated_copies_merge_without_loss(kind: str, groups: tuple[tuple[int, ...], ...]) -> None:
    model = small(kind)
    with_rotated_copies(model, groups)
    kv_heads = len(groups)
    alignments = aligned(model, kv_heads)
    for alignment in alignments.values():
        assert alignment.groups == groups
        assert max(map(abs, alignment.lost.values())) < 1e-10
        assert min(alignment.lost_by_neighbours.values()) > 0.1
        first, second = groups[0][:2]
        assert alignment.similarity["keys"][first][second] == 1.0
    assert difference(model, merged(model, alignments, kv_heads)) < 1e-8


def attention_outputs(model: GenerationModel, inputs: dict[int, Tensor]) -> dict[int, Tensor]:
    forward = Forward(model)
    return {layer: forward.layer(layer, model.layers[layer], x) for layer, x in inputs.items()}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["hybrid", "half rotated", "rotated"])
def test_aligned_heads_merge_with_less_error_than_their_plain_mean(kind: str, kv_heads: int) -> None:
    """Each attention layer's output on the calibration text, of the parent's input; and what the line tells."""
    model = small(kind)
    forward, inputs = Forward(model), {}
    alignments = aligned(model, kv_heads)
    x = forward.embed(torch.from_numpy(windows()))
    for layer in range(model.definition.num_layers):
        if layer in alignments:
            inputs[layer] = x
        x = x + forward.layer(layer, model.layers[layer], x)
    mean = {layer: plain_mean(alignment.heads, kv_heads) for layer, alignment in alignments.items()}
    expected = attention_outputs(model, inputs)
    by_rotation, by_mean = (attention_outputs(merged(model, each, kv_heads), inputs) for each in (alignments, mean))
    for layer, alignment in alignments.items():
        for part in ("keys", "values"):
            assert 0 < alignment.lost[part] < alignment.lost_by_neighbours[part]
        errors = [float((each[layer] - expected[layer]).square().mean()) for each in (by_rotation, by_mean)]
        assert errors[0] <= errors[1]
    assert "keys lose " in alignments[layer].line()


def test_definition_of_the_merged_model() -> None:
    model = small("overrides")
    d = aligned_definition(model.definition, 4, "merged")
    assert (d.num_query_groups, d.num_attention_heads) == (4, 16)
    assert d.overrides == {3: {"num_attention_heads": 12, "head_dim": 8}}
    assert d.sources["num_query_groups"] == "merged from small"
    d.validate("merged")
    assert aligned_definition(model.definition, None, "same").num_query_groups == 8


def test_heads_that_cannot_be_merged() -> None:
    d = small("hybrid").definition
    for definition, kv_heads, message in (
        (d, 3, r"run: --kv-heads = 3 does not divide model.num_query_groups = 8 \(layer 3\)"),
        (d, 0, "--kv-heads = 0 does not divide"),
        (d, 16, "--kv-heads = 16 does not divide"),
        (d, 8, "--kv-heads = 8 is what every layer of small has: nothing is merged"),
        (small("overrides").definition, 8, r"8 does not divide model.overrides.3.num_query_groups = 4 \(layer 3\)"),
        (replace(d, qkv_bias=True), 4, r"--kv-heads = 4: the model has model\.qkv_bias, through which no rotation"),
        (replace(d, qk_norm=True), 4, r"the model has model\.qk_norm, through"),
        (plain_model.definition("M-M-"), 2, "small has no layer with attention, so no key-value heads"),
    ):
        with pytest.raises(UserError, match=message):
            attention_layers(definition, kv_heads, "run")
    with pytest.raises(UserError) as error:
        attention_layers(small("overrides").definition, 8, "run")
    assert error.value.hint == "what divides the heads of all layers: 1, 2, 4"
    with pytest.raises(UserError, match="the data has token 300, model small a vocabulary of 300"):
        measure_moments(small("hybrid"), windows() + 1)
