"""Importance: the same numbers as computing each from its definition, on every path; the artefact; the controls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_model
import pytest
import torch
from small_model import relative_error, small_config, small_model

from nemotron_h.compression import measure, unfinished
from nemotron_h.compression.candidates import Candidate, whole
from nemotron_h.compression.child import Child
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.importance import Importance, Scores, work
from nemotron_h.compression.importance import measure as measure_all
from nemotron_h.compression.selection import child_of, top_layers
from nemotron_h.compression.slicing import Masked, slice_model
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model
from nemotron_h.schema.minipuzzle import METRICS

SAMPLES, LENGTH = 5, 40


def windows(samples: int = SAMPLES, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (samples, LENGTH))


@pytest.fixture(scope="module")
def model():
    return plain_model.model(plain_model.definition())


@pytest.fixture(scope="module")
def found(model) -> Importance:
    return measure_all(model, windows(), windows(7), settings={"from": "test"})


def test_forward_is_the_training_model_s_and_generation_s(tmp_path: Path, megatron: None) -> None:
    from save_checkpoint import save

    trained = small_model(small_config())
    loaded = load_model(save(trained, tmp_path / "step-000001"))
    forward, ids = Forward(loaded), torch.from_numpy(windows())
    x = forward.embed(ids)
    for index in range(loaded.definition.num_layers):
        x = x + forward.layer(index, forward.weights(index), x)
    with torch.no_grad():
        assert relative_error(forward.logits(x), trained(ids)[..., :300]) < 1e-5
    generated = loaded.logits(loaded.extend(ids, loaded.new_states(*ids.shape)))
    assert relative_error(forward.logits(x), generated) < 1e-5


@pytest.mark.parametrize("metric", METRICS)
def test_layers_against_models_without_one(model, metric: str) -> None:
    """Every removal computed by itself, by generation's forward."""
    ids = torch.from_numpy(windows())
    d = model.definition

    def outputs(layers: tuple[int, ...]):
        child = slice_model(model, Child.whole(d, layers))
        hidden = child.extend(ids, child.new_states(*ids.shape))
        normed = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], child.final_norm, d.norm_epsilon)
        return normed, child.logits(hidden).log_softmax(-1)

    whole_normed, whole_log = outputs(tuple(range(d.num_layers)))
    expected = []
    for removed in range(d.num_layers):
        normed, log = outputs(tuple(n for n in range(d.num_layers) if n != removed))
        squares = (normed - whole_normed).square().mean((1, 2))
        divergence = (whole_log.exp() * (whole_log - log)).sum(-1).mean(1)
        expected.append(squares if metric == "mse" else divergence)
    actual = measure.measure_layers(model, windows(), metric)
    assert actual.shape == (SAMPLES, d.num_layers)
    assert relative_error(actual, torch.stack(expected, 1)) < 1e-10
    assert actual.min() > 0.001


def test_widths_against_their_formulas(model, found: Importance) -> None:
    """Activations of the last Mamba-2 and FFN layer, by hand."""
    ids, d = torch.from_numpy(windows(7)), model.definition
    forward = Forward(model)
    x = forward.embed(ids)
    inputs = []
    for index in range(d.num_layers):
        inputs.append(torch.nn.functional.rms_norm(x, x.shape[-1:], model.layers[index].norm, d.norm_epsilon))
        x = x + forward.layer(index, forward.weights(index), x)
    activations = {
        "layers.6.neurons": (inputs[6] @ model.layers[6].up.T).clamp(min=0) ** 2,
        "layers.5.x": inputs[5] @ model.layers[5].in_proj[d.blocks[5].d_inner : 2 * d.blocks[5].d_inner].T,
        "layers.3.norm": inputs[3],
    }
    for name, values in activations.items():
        expected = values.abs().mean(1).square().sum(0).sqrt()
        assert relative_error(found.activations[name], expected) < 1e-10, name
    kinds = {"M": {"norm", "x"}, "*": {"norm"}, "-": {"norm", "neurons"}}
    names = {f"layers.{n}.{part}" for n, symbol in enumerate(d.pattern) for part in kinds[symbol]}
    assert set(found.activations) == {*names, "final_norm"}


def test_how_work_is_divided_changes_nothing(model, found: Importance, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.STREAM_ELEMENTS > 8 * SAMPLES * LENGTH * 48  # all samples at once above
    monkeypatch.setattr(measure, "STREAM_ELEMENTS", 1)
    monkeypatch.setattr(measure, "LAYER_ELEMENTS", 1)
    done: list[int] = []
    again = measure_all(model, windows(), windows(7), advance=done.append)
    assert relative_error(again.layers, found.layers) < 1e-12
    assert all(relative_error(again.activations[name], found.activations[name]) < 1e-12 for name in found.activations)
    assert sum(done) == work(model.definition, SAMPLES, 7)
    twice = measure_all(model, windows(), windows(7))
    assert torch.equal(twice.layers, measure_all(model, windows(), windows(7)).layers)


@pytest.mark.parametrize("stop_after", [2, 7])  # in the layers, and in the widths
def test_interrupted_measurement_goes_on(
    model, found: Importance, stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "STREAM_ELEMENTS", 1)
    monkeypatch.setattr(measure, "LAYER_ELEMENTS", 1)
    monkeypatch.setattr(unfinished, "WRITE_EVERY_S", 0.0)
    passes: list[int] = []

    def advance(done: int) -> None:
        passes.append(done)
        if len(passes) > stop_after:
            raise KeyboardInterrupt

    file = tmp_path / "unfinished.safetensors"
    with pytest.raises(KeyboardInterrupt):
        measure_all(model, windows(), windows(7), advance=advance, unfinished=file)
    assert file.exists()
    calls: list[int] = []
    again = measure_all(model, windows(), windows(7), advance=calls.append, unfinished=file)
    straight = measure_all(model, windows(), windows(7))
    assert torch.equal(again.layers, straight.layers)
    assert all(torch.equal(again.activations[name], straight.activations[name]) for name in straight.activations)
    assert sum(calls) == work(model.definition, SAMPLES, 7)
    assert calls[0] == work(model.definition, min(stop_after, SAMPLES), 0)
    assert not file.exists()
    passes.clear()
    with pytest.raises(KeyboardInterrupt):  # what was measured on other text is not taken up
        measure_all(model, windows(seed=4), windows(7), advance=advance, unfinished=file)
    assert torch.equal(measure_all(model, windows(), windows(7), unfinished=file).layers, straight.layers)


def test_ranks_are_averaged_and_not_values() -> None:
    """One sample with a large error does not decide (paper 3.2)."""
    d = plain_model.definition("M-M-")
    layers = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [100.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert Importance(d, "mse", layers, {}).ranks().tolist() == [1.0, 4 / 3, 5 / 3, 2.0]
    assert layers.mean(0).argsort().tolist()[-1] == 0


def test_artefact(found: Importance, tmp_path: Path) -> None:
    found.save(tmp_path)
    loaded = Importance.load(tmp_path, found.definition)
    assert torch.equal(loaded.layers, found.layers)
    assert all(torch.equal(loaded.activations[name], found.activations[name]) for name in found.activations)
    assert (loaded.metric, loaded.settings) == ("mse", found.settings)
    assert found.settings == {
        "from": "test",
        "layer_samples": SAMPLES,
        "neuron_samples": 7,
        "seq_length": LENGTH,
        "dtype": "float64",
    }
    rows = json.loads((tmp_path / "importance.json").read_text())["layers"]
    assert [row["type"] for row in rows] == ["mamba", "ffn", "mamba", "attention", "ffn", "mamba", "ffn"]
    assert rows[2]["mse"] == pytest.approx(float(found.layers[:, 2].mean()))


def test_artefact_of_an_earlier_version(found: Importance, tmp_path: Path) -> None:
    """Four aggregations of each activation: the one that remains is read."""
    four = {
        name: torch.stack([values * 2, values * 3, values, values * 4]) for name, values in found.activations.items()
    }
    replace(found, activations=four).save(tmp_path)
    record = json.loads((tmp_path / "importance.json").read_text())
    (tmp_path / "importance.json").write_text(
        json.dumps({**record, "aggregations": ["mean", "l2", "mean_l2", "l2_mean"]})
    )
    loaded = Importance.load(tmp_path, found.definition)
    assert all(torch.equal(loaded.activations[name], found.activations[name]) for name in found.activations)


def test_artefact_of_another_model_or_damaged(found: Importance, tmp_path: Path) -> None:
    found.save(tmp_path)
    other = replace(found.definition, ffn_hidden_size=96, name="other")
    with pytest.raises(UserError, match="is of another model than other: ffn_hidden_size: 80 there, 96 here"):
        Importance.load(tmp_path, other)
    Importance.load(tmp_path, replace(found.definition, name="renamed", sources={"pattern": "x"}))
    content = bytearray((tmp_path / "importance.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "importance.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not the file that was written"):
        Importance.load(tmp_path)
    with pytest.raises(UserError, match="holds no importance"):
        Importance.load(tmp_path / "absent")


def test_refusals(model, found: Importance) -> None:
    with pytest.raises(UserError, match="metric 'rmse' is unknown"):
        measure_all(model, windows(), windows(), metric="rmse")
    with pytest.raises(UserError, match="the data has token 300, model small a vocabulary of 300"):
        measure_all(model, windows(), np.full((1, 4), 300))
    with pytest.raises(UserError, match="order 'best' is unknown"):
        found.scores().ordered("best")


# what stays


def test_selection_by_hand() -> None:
    """Heads stay by group, and by their scores over the channels that stay; the same channels in all heads."""
    d = plain_model.definition("M-", mamba_num_heads=4, mamba_head_dim=3, ffn_hidden_size=4)
    x = np.array([[5, 0, 1], [1, 9, 0], [4, 0, 0], [2, 2, 0]], dtype=float)  # channel 1 is the strongest, then 0
    scores = Scores(np.array([0.0, 1.0]), np.arange(48.0), {0: {"x": x}, 1: {"neurons": np.array([3.0, 1, 2, 1])}})
    child = child_of(d, scores, Candidate(0, 1, 1, 2, 40, 2, 1))
    assert child.kept[0]["channels"].tolist() == [1]
    assert child.kept[0]["heads"].tolist() == [1, 3]  # without the cut of channels, head 2 is stronger than 3
    assert child.kept[1]["neurons"].tolist() == [0, 2]
    assert child.hidden.tolist() == list(range(8, 48))
    two = child_of(d, scores, Candidate(0, 1, 1, 2, 40, 2, 3))
    assert two.kept[0]["heads"].tolist() == [1, 2]


def test_selection_of_experts_by_hand() -> None:
    """Experts stay by what they add, and of each that stays its own neurons."""
    sizes = {"num_experts": 3, "experts_per_token": 1, "expert_hidden_size": 3, "shared_expert_hidden_size": 2}
    d = plain_model.definition("ME", **sizes)
    neurons = np.array([[1.0, 2, 3], [9, 9, 9], [3, 1, 2]])
    of_experts = {"experts": np.array([2.0, 1, 3]), "expert_neurons": neurons, "shared_neurons": np.array([1.0, 2])}
    scores = Scores(np.zeros(2), np.zeros(48), {0: {"x": np.zeros((16, 16))}, 1: of_experts})
    two = whole(d)._replace(num_experts=2, expert_hidden_size=2, shared_expert_hidden_size=1)
    kept = child_of(d, scores, two).kept[1]
    assert {name: indices.tolist() for name, indices in kept.items()} == {
        "experts": [0, 2],
        "expert_neurons": [[1, 2], [0, 2]],
        "shared_neurons": [1],
    }
    # an importance of before there were scores of experts: enough for a child that keeps them
    old = replace(scores, inner={0: scores.inner[0]})
    assert child_of(d, old, whole(d)._replace(mamba_num_heads=8)).kept[1]["experts"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="the importance says nothing of experts: it was measured by an earlier"):
        child_of(d, old, two)


def test_experts_against_their_formulas() -> None:
    """Every expert on every token, weighed by the router's scores of the chosen ones and 0 else."""
    d = plain_model.definition("M*E")
    model = plain_model.model(d)
    found = measure_all(model, windows(), windows(7))
    forward, w = Forward(model), model.layers[2]
    x = forward.embed(torch.from_numpy(windows(7)))
    for index in range(2):
        x = x + forward.layer(index, forward.weights(index), x)
    h = forward.norm(x, w.norm)
    scores = (h @ w.gate.T).sigmoid()
    chosen = torch.zeros_like(scores).scatter(-1, (scores + w.bias).topk(2, dim=-1).indices, 1.0)
    weights = 1.5 * chosen * scores / (chosen * scores).sum(-1, keepdim=True)  # [b, l, n]
    inner = torch.einsum("blh,nfh->blnf", h, w.up).clamp(min=0).square() * weights.unsqueeze(-1)
    added = torch.einsum("blnf,nhf->blnh", inner, w.down)
    for name, values in (
        ("experts", added.norm(dim=-1)),
        ("expert_neurons", inner.flatten(2)),
        ("shared_neurons", (h @ w.shared_up.T).clamp(min=0).square()),
    ):
        expected = values.abs().mean(1).square().sum(0).sqrt()
        assert relative_error(found.activations[f"layers.2.{name}"], expected) < 1e-10, name
    # watching changes nothing
    told: list[str] = []
    watched = forward.layer(2, w, x, lambda name, _: told.append(name))
    assert relative_error(watched, forward.layer(2, w, x)) < 1e-12
    assert told == ["norm", "experts", "expert_neurons", "shared_neurons"]


def test_importance_of_experts_beats_its_controls() -> None:
    d = plain_model.definition("MEM*E-E")
    model = plain_model.model(d)
    scores = measure_all(model, windows(), windows(7)).scores()
    ids = torch.from_numpy(windows(6, seed=11))
    full, expected = whole(d), Masked(model, Child.whole(d)).logits(ids)

    def error(scores: Scores, candidate: Candidate) -> float:
        masked = Masked(model, child_of(d, scores, candidate)).logits(ids)
        return float((masked - expected).square().mean())

    for candidate in (
        full._replace(num_experts=4),
        full._replace(expert_hidden_size=24),
        full._replace(shared_expert_hidden_size=40),
    ):
        best = error(scores, candidate)
        assert best < error(scores.ordered("reversed"), candidate), candidate
        assert best < np.mean([error(scores.ordered("random", seed), candidate) for seed in range(4)]), candidate


def test_importance_beats_its_controls(model, found: Importance) -> None:
    """The children that importance chooses differ less from the parent than those of the controls."""
    d = model.definition
    ids = torch.from_numpy(windows(6, seed=11))
    full = whole(d)

    def error(scores: Scores, candidate: Candidate) -> float:
        masked = Masked(model, child_of(d, scores, candidate)).logits(ids)
        return float((masked - Masked(model, Child.whole(d)).logits(ids)).square().mean())

    scores = found.scores()
    for candidate in (
        full._replace(mamba=2, ffn=2),
        full._replace(ffn_hidden_size=60),
        full._replace(mamba_num_heads=12),
        full._replace(mamba_head_dim=13),
        full._replace(hidden_size=40),
    ):
        best = error(scores, candidate)
        assert best < error(scores.ordered("reversed"), candidate), candidate
        drawn = [error(scores.ordered("random", seed), candidate) for seed in range(4)]
        assert best < np.mean(drawn), candidate
    one, other = scores.ordered("random", 1), scores.ordered("random", 1)
    assert scores.ordered("importance") is scores
    assert np.array_equal(one.layers, other.layers)
    assert not np.array_equal(one.layers, scores.shuffle(2).layers)


#: the order in which figure 9 of the paper shows layers of the 56B, least important first
PUBLISHED = {
    "*": [84, 95, 7, 29, 73, 40, 62, 106, 18, 51],
    "M": [88, 86, 90, 79, 81, 83, 99, 101, 97, 77, 92],
    "-": [89, 91, 87, 93, 85, 96, 98, 82, 80],
}


def test_published_importance_gives_the_published_candidate() -> None:
    """5 attention, 49 FFN and 44 Mamba-2 layers by figure 9 are candidate 2 of figure 11, but for one FFN layer: the
    figure has layer 85 below 96, and the candidate keeps 85 and drops 96.
    """
    from nemotron_h.recipe.checks import definition_of
    from nemotron_h.recipe.compose import compose

    parent = definition_of(compose("nemotron_h_56b"), "56b")
    child = definition_of(compose("nemotron_h_47b_paper"), "47b")
    scores = np.full(parent.num_layers, 1000.0)
    for layers in PUBLISHED.values():
        scores[layers] = np.arange(len(layers))
    kept = set(top_layers(parent.pattern, scores, {"*": 5, "M": 44, "-": 49}))
    dropped = {7, 29, 73, 77, 79, 81, 83, 84, 86, 87, 88, 89, 90, 91, 93, 95, 96, 97, 99, 101}
    published = set(range(parent.num_layers)) - dropped
    assert "".join(parent.pattern[n] for n in sorted(published)) == child.pattern
    for symbol in "*M":
        assert {n for n in kept if parent.pattern[n] == symbol} == {n for n in published if parent.pattern[n] == symbol}
    assert kept ^ published == {85, 96}
