"""Slices: what they compute, the checkpoints they make, and the gates that a wrong one does not pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_model
import pytest
import torch
import yaml
from forks import Forks
from small_model import EXPERTS, pure_config, relative_error, small_config, small_model

from nemotron_h.architecture.blocks.transplant import transplants
from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.compression import slicing
from nemotron_h.compression.candidates import Candidates
from nemotron_h.compression.child import Child, child_definition
from nemotron_h.compression.transplant.mixers import Mixers
from nemotron_h.core.errors import UserError
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import load_model
from nemotron_h.schema.minipuzzle import BudgetSchema, GridSchema

AXES = ("layers", "hidden", "neurons", "heads", "channels", "all")


def draw_child(d: ModelDefinition, axis: str, seed: int = 0) -> Child:
    """A child of random layers and channels along one axis, or all of them."""
    rng = np.random.default_rng(seed)

    def some(size: int, keep: float = 0.6) -> np.ndarray:
        return np.sort(rng.choice(size, max(1, int(size * keep)), replace=False))

    def on(name: str) -> bool:
        return axis in (name, "all")

    layers = tuple(some(d.num_layers, 0.75).tolist()) if on("layers") else None
    whole = Child.whole(d, layers)
    hidden = some(d.hidden_size) if on("hidden") else whole.hidden
    kept = {layer: dict(axes) for layer, axes in whole.kept.items()}
    per_group = d.mamba_num_heads // max(d.mamba_num_groups, 1)
    experts = d.num_experts

    def some_of_each() -> np.ndarray:
        """Other neurons of each expert that stays."""
        nonlocal experts
        width = len(some(d.expert_hidden_size))
        rows = [rng.choice(d.expert_hidden_size, width, replace=False) for _ in range(experts)]
        return np.sort(np.stack(rows))

    def some_experts() -> np.ndarray:
        nonlocal experts
        stay = some(d.num_experts)
        experts = len(stay)
        return stay

    for name, draw_one in (
        ("neurons", lambda: some(d.ffn_hidden_size)),
        ("heads", lambda: np.concatenate([some(per_group) + g * per_group for g in range(d.mamba_num_groups)])),
        ("channels", lambda: some(d.mamba_head_dim)),
        ("experts", some_experts),
        ("expert_neurons", some_of_each),
        ("shared_neurons", lambda: some(d.shared_expert_hidden_size)),
    ):
        for axes in kept.values():
            if on(name) and name in axes:
                axes[name] = draw_one()
            if name == "experts" and name in axes:
                axes["expert_neurons"] = axes["expert_neurons"][: len(axes[name])]
    return Child(whole.layers, hidden, kept)


def exchanged(child: Child, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Child:
    """Return the child with another choice on one axis of every layer."""
    kept = {n: {key: change(v) if key == name else v for key, v in axes.items()} for n, axes in child.kept.items()}
    return replace(child, kept=kept)


def tokens(length: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("axis", AXES)
def test_slice_computes_what_the_masked_parent_does(axis: str, groups: int) -> None:
    d = plain_model.definition(mamba_num_groups=groups)
    parent = plain_model.model(d)
    child = draw_child(d, axis)
    sliced = slicing.slice_model(parent, child)
    assert slicing.logits_error(slicing.Masked(parent, child), sliced, tokens()) < 1e-12
    # and that is another model than the parent
    unmasked = slicing.Masked(parent, Child.whole(d))
    assert slicing.logits_error(unmasked, parent, tokens()) < 1e-12
    assert slicing.logits_error(unmasked, sliced, tokens()) > 0.1


@pytest.mark.parametrize("axis", ["layers", "hidden", "experts", "expert_neurons", "shared_neurons", "all"])
def test_slice_of_experts_computes_what_the_masked_parent_does(axis: str) -> None:
    d = plain_model.definition("MEM*E-E")
    parent = plain_model.model(d)
    child = draw_child(d, axis, seed=2)
    sliced = slicing.slice_model(parent, child)
    sizes = sum(t.numel() for w in sliced.layers for t in vars(w).values()) + sliced.embedding.numel()
    sizes += sliced.output.numel() + sliced.final_norm.numel()
    assert sliced.definition.expect.parameters == sizes
    assert slicing.logits_error(slicing.Masked(parent, child), sliced, tokens()) < 1e-12
    unmasked = slicing.Masked(parent, Child.whole(d))
    assert slicing.logits_error(unmasked, parent, tokens()) < 1e-12
    assert slicing.logits_error(unmasked, sliced, tokens()) > 0.01


def test_gate_sees_a_wrong_slice_of_experts() -> None:
    d = plain_model.definition("MEM*E-E")
    parent = plain_model.model(d)
    whole = Child.whole(d)
    for name, stay, wrong in (
        ("experts", np.array([0, 2, 3, 5]), np.array([0, 2, 4, 5])),
        ("expert_neurons", np.tile(np.arange(30), (6, 1)), np.tile(np.arange(10, 40), (6, 1))),
        ("shared_neurons", np.arange(50), np.arange(1, 51)),
    ):

        def kept(of: np.ndarray, name: str = name) -> Child:
            child = exchanged(whole, name, lambda _: of)
            return exchanged(child, "expert_neurons", lambda rows: rows[: len(of)]) if name == "experts" else child

        masked = slicing.Masked(parent, kept(stay))
        assert slicing.logits_error(masked, slicing.slice_model(parent, kept(stay)), tokens()) < 1e-12
        assert slicing.logits_error(masked, slicing.slice_model(parent, kept(wrong)), tokens()) > 0.01
    # one expert's neurons for another's
    rows = np.stack([np.arange(n, n + 30) for n in range(6)])
    masked = slicing.Masked(parent, exchanged(whole, "expert_neurons", lambda _: rows))
    wrong = slicing.slice_model(parent, exchanged(whole, "expert_neurons", lambda _: rows[[0, 1, 2, 3, 5, 4]]))
    assert slicing.logits_error(masked, wrong, tokens()) > 0.001


def test_impossible_experts() -> None:
    d = plain_model.definition("MEM*E-E")
    whole = Child.whole(d)
    for wrong, message in (
        (
            exchanged(whole, "experts", lambda kept: kept[1:]),
            "expert_neurons of layer 1: not a row for each",
        ),
        (exchanged(whole, "expert_neurons", lambda _: np.arange(40)), "expert_neurons of layer 1: not a row for each"),
        (exchanged(whole, "expert_neurons", lambda kept: kept[:, ::-1]), "expert_neurons of layer 1: not ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            child_definition(d, wrong, "child")
    few = exchanged(exchanged(whole, "experts", lambda _: np.array([3])), "expert_neurons", lambda kept: kept[:1])
    with pytest.raises(UserError, match="experts_per_token"):
        child_definition(d, few, "child")


def uneven_child(d: ModelDefinition) -> Child:
    """Return a child of `M-M*-M-` whose third and last layer keep fewer channels than the others of their kinds."""
    child = Child.whole(d, (0, 2, 3, 4, 5, 6))
    per_group = d.mamba_num_heads // d.mamba_num_groups
    heads = np.concatenate([np.arange(1, per_group, 2) + g * per_group for g in range(d.mamba_num_groups)])
    narrow = {2: {"heads": heads, "channels": np.arange(0, 10, 2)}, 6: {"neurons": np.arange(3, 53)}}
    return replace(child, hidden=np.arange(8, d.hidden_size), kept={**child.kept, **narrow})


def test_layers_of_one_kind_may_differ() -> None:
    """The definition states most layers' widths once and the others' in `overrides`; the slice computes the same."""
    d = plain_model.definition()
    parent, child = plain_model.model(d), uneven_child(d)
    sliced = slicing.slice_model(parent, child)
    assert sliced.definition.pattern == "MM*-M-"
    assert (sliced.definition.mamba_num_heads, sliced.definition.ffn_hidden_size) == (16, 80)
    assert sliced.definition.overrides == {1: {"mamba_num_heads": 8, "mamba_head_dim": 5}, 5: {"ffn_hidden_size": 50}}
    sizes = sum(t.numel() for w in sliced.layers for t in vars(w).values()) + 2 * 300 * 40 + 40
    assert sliced.definition.expect.parameters == sizes
    assert slicing.logits_error(slicing.Masked(parent, child), sliced, tokens()) < 1e-12
    # a child of that child, by another choice in every layer
    again = Child.whole(sliced.definition, (0, 1, 3, 5))
    again = exchanged(exchanged(again, "channels", lambda kept: kept[1:]), "neurons", lambda kept: kept[::2])
    quarter = slicing.slice_model(sliced, again)
    assert quarter.definition.overrides == {1: {"mamba_num_heads": 8, "mamba_head_dim": 4}, 3: {"ffn_hidden_size": 25}}
    assert slicing.logits_error(slicing.Masked(sliced, again), quarter, tokens()) < 1e-12
    with pytest.raises(UserError, match=r"small has widths of their own in layers 2, 5 \(model.overrides\)"):
        Candidates(
            replace(d, overrides={5: {"mamba_head_dim": 8}, 2: {"mamba_head_dim": 8}}), GridSchema(), BudgetSchema()
        )


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("MMM", {}),
        ("*-*-", {"position_embedding": "rope", "rope_base": 100, "rope_percent": 0.5}),
        ("M-M*-M-", {"head_dim": 8}),
        ("MEM*EM-", {}),
    ],
)
def test_other_families(pattern: str, changes: dict) -> None:
    d = plain_model.definition(pattern, **changes)
    parent, child = plain_model.model(d), draw_child(d, "all", seed=1)
    assert slicing.logits_error(slicing.Masked(parent, child), slicing.slice_model(parent, child), tokens()) < 1e-12


def test_gate_sees_a_wrong_slice() -> None:
    """Every kind of channel exchanged for a dropped one, and the mean of a norm over the whole width."""
    d = plain_model.definition()
    parent = plain_model.model(d)
    child = draw_child(d, "all")

    def other(kept: np.ndarray, size: int) -> np.ndarray:
        return np.sort(np.append(kept[1:], np.setdiff1d(np.arange(size), kept)[0]))

    per_group = d.mamba_num_heads // d.mamba_num_groups
    kept_per_group = next(len(axes["heads"]) for axes in child.kept.values() if "heads" in axes) // d.mamba_num_groups

    def other_heads(kept: np.ndarray) -> np.ndarray:
        return np.concatenate([other(kept[:kept_per_group], per_group), kept[kept_per_group:]])

    wrong = [
        exchanged(child, "heads", other_heads),
        replace(child, hidden=other(child.hidden, d.hidden_size)),
        exchanged(child, "neurons", lambda kept: other(kept, d.ffn_hidden_size)),
        exchanged(child, "channels", lambda kept: other(kept, d.mamba_head_dim)),
    ]
    masked = slicing.Masked(parent, child)
    for mistaken in wrong:
        assert slicing.logits_error(masked, slicing.slice_model(parent, mistaken), tokens()) > 0.01
    sliced = slicing.slice_model(parent, child)
    sliced.final_norm = sliced.final_norm * (d.hidden_size / len(child.hidden)) ** 0.5
    assert slicing.logits_error(masked, sliced, tokens()) > 0.01


def test_impossible_children() -> None:
    d = plain_model.definition()
    whole = Child.whole(d)
    for wrong, message in (
        (replace(whole, layers=(0, 9)), "layers: not ascending numbers from 0 to 6"),
        (replace(whole, layers=(1, 0)), "layers: not ascending"),
        (replace(whole, hidden=np.arange(49)), "hidden: not ascending numbers from 0 to 47"),
        (
            replace(whole, kept={**whole.kept, 4: {}, 6: {}}),
            r"neurons: given for layers \[1\], the kept ffn are \[1, 4, 6\]",
        ),
        (
            exchanged(whole, "heads", lambda _: np.arange(2, 16)),
            r"heads of layer 0: the groups keep \[6, 8\], not one number",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            child_definition(d, wrong, "child")


def test_definition_of_a_child() -> None:
    d = plain_model.definition(sources={"pattern": "paper 1", "hidden_size": "paper 2", "head_dim": "paper 3"})
    child = draw_child(d, "all")
    with pytest.raises(UserError, match="the child's name = 'a/b' is not a name"):
        child_definition(d, child, "a/b")
    made = child_definition(d, replace(child, **vars(Child.whole(d, (0, 1, 3)))), "c")
    assert (made.pattern, made.family) == ("M-*", "pruned")
    assert made.sources == {"pattern": "pruned from small", "hidden_size": "paper 2", "head_dim": "paper 3"}
    made.validate("c")
    made = child_definition(d, Child.whole(d, (0, 1)), "c")  # no attention is left: its widths and sources go
    assert (made.pattern, made.family, made.head_dim, made.num_query_groups) == ("M-", "nemotron_h", 0, 0)
    assert made.sources == {"pattern": "pruned from small", "hidden_size": "paper 2"}


# checkpoints


@pytest.fixture(scope="module")
def parent(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of one rank."""
    from save_checkpoint import save

    folder = tmp_path_factory.mktemp("run")
    save(small_model(small_config()), folder / "checkpoints" / "step-000001", data={**DATA, "seed": 1})
    return folder


#: what a child keeps of its parent's record, so that data of another tokenizer is refused for it too
DATA = {"tokenizer": "/t", "tokenizer_sha256": "files", "tokenizer_ids_sha256": "ids", "seq_length": 128}


def child_of(checkpoint: Path, axis: str = "all") -> Child:
    checkpoint = find_checkpoint(checkpoint)
    return draw_child(read_definition(read_record(checkpoint), ""), axis)


def test_written_child(parent: Path, tmp_path: Path) -> None:
    child, out, written = child_of(parent), tmp_path / "child", []
    made = slicing.write_child(parent, child, out, "half", {"by": "test"}, written.append)
    assert sum(written) == slicing.child_size(parent, child)
    loaded, expected = load_model(out, dtype=torch.float64), load_model(parent, dtype=torch.float64)
    assert loaded.definition == made
    made.validate("half")
    assert slicing.logits_error(slicing.Masked(expected, child), loaded, tokens()) < 1e-12
    record = json.loads((out / "run.json").read_text())
    assert record["data"] == DATA
    assert record["pruned"]["layers"] == list(child.layers)
    assert record["pruned"]["by"] == "test"
    text = yaml.safe_load((out / "model.yaml").read_text())
    assert definition_from_dict(text, "model.yaml") == made


def test_a_child_with_experts_is_written_and_read(megatron: None, tmp_path: Path) -> None:
    """Its layers, experts and neurons; writing compares it with its masked parent. Megatron trains it on."""
    from megatron.core import dist_checkpointing
    from save_checkpoint import save

    checkpoint = save(small_model(pure_config("E")), tmp_path / "parent", data=DATA)
    child = child_of(checkpoint)
    made = slicing.write_child(checkpoint, child, tmp_path / "child", "narrow")
    sizes = (made.num_experts, made.expert_hidden_size, made.shared_expert_hidden_size, made.hidden_size)
    assert sizes == (3, 24, 38, len(child.hidden))
    loaded, whole = load_model(tmp_path / "child", dtype=torch.float64), load_model(checkpoint, dtype=torch.float64)
    assert loaded.definition == made
    assert slicing.logits_error(slicing.Masked(whole, child), loaded, tokens()) < 1e-12
    widths = {key: getattr(made, key) for key in ("num_experts", "expert_hidden_size", "shared_expert_hidden_size")}
    widths |= {"pattern": made.pattern, "family": made.family, "hidden_size": made.hidden_size}
    widths |= {"mamba_num_heads": made.mamba_num_heads, "mamba_head_dim": made.mamba_head_dim}
    trained = small_model(small_config(**{**EXPERTS, "ffn_hidden_size": 0, **widths}))
    state = dist_checkpointing.load(trained.sharded_state_dict(prefix="module."), str(tmp_path / "child" / "weights"))
    trained.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    ids = tokens()
    expected = loaded.logits(loaded.extend(ids, loaded.new_states(*ids.shape)))
    actual = trained(ids)[..., : made.vocab_size]
    assert relative_error(actual.detach(), expected.float()) < 1e-4
    trained(ids, labels=ids).mean().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_layers_that_differ_are_written_and_read(parent: Path, tmp_path: Path) -> None:
    d = read_definition(read_record(find_checkpoint(parent)), "")
    made = slicing.write_child(parent, uneven_child(d), tmp_path / "child", "uneven")
    assert made.overrides == {1: {"mamba_num_heads": 4, "mamba_head_dim": 5}, 5: {"ffn_hidden_size": 50}}
    assert load_model(tmp_path / "child").definition == made
    assert definition_from_dict(yaml.safe_load((tmp_path / "child" / "model.yaml").read_text()), "model.yaml") == made


def test_child_goes_on_as_any_other_model(parent: Path, tmp_path: Path) -> None:
    """Megatron loads it, computes the same, and gives gradients to all of its weights; a child of a child is cut."""
    from megatron.core import dist_checkpointing

    from nemotron_h.model.module import NemotronHConfig

    slicing.write_child(parent, child_of(parent), tmp_path / "child", "half")
    d = read_definition(read_record(tmp_path / "child"), "")
    keys = {"head_dim": "kv_channels", "pattern": "hybrid_override_pattern", "name": "definition_name"}
    widths = ("hidden_size", "ffn_hidden_size", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups")
    names = (*widths, "num_attention_heads", "num_query_groups", "family", *keys)
    config = small_config(**{keys.get(key, key): getattr(d, key) for key in names})
    assert isinstance(config, NemotronHConfig)
    trained = config.configure_model(None)
    state = dist_checkpointing.load(trained.sharded_state_dict(prefix="module."), str(tmp_path / "child" / "weights"))
    trained.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    ids = tokens()
    actual = trained(ids)[..., : d.vocab_size]
    model = load_model(tmp_path / "child")
    expected = model.logits(model.extend(ids, model.new_states(*ids.shape)))
    assert relative_error(actual.detach(), expected) < 1e-4
    trained(ids, labels=ids).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.parameters())
    slicing.write_child(tmp_path / "child", child_of(tmp_path / "child"), tmp_path / "again", "quarter")
    assert load_model(tmp_path / "again").definition.parameters < d.parameters


@pytest.mark.slow
def test_parent_of_two_tensor_parallel_ranks(tmp_path: Path, forks: Forks, megatron: None) -> None:
    worker = str(Path(__file__).parents[1] / "inference" / "save_checkpoint.py")
    code = forks.run(worker, str(tmp_path), "tp2", folder=tmp_path, name="save", ranks=2)
    assert not code, (tmp_path / "save.err").read_text()[-3000:]
    child = child_of(tmp_path / "tp2")
    slicing.write_child(tmp_path / "tp2", child, tmp_path / "child", "half")
    expected = slicing.slice_model(load_model(tmp_path / "tp2"), child)
    actual = load_model(tmp_path / "child")
    assert torch.equal(actual.embedding, expected.embedding)
    assert torch.equal(actual.output, expected.output)
    for one, other in zip(actual.layers, expected.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
    source = ModelSource(tmp_path / "tp2")
    mixers = Mixers(source, transplants(source.definition.blocks, [3], None, ""), seed=0)
    attention = load_model(tmp_path / "tp2").layers[3]
    q, k, v = attention.qkv.unflatten(0, (2, 4, 16)).split([2, 1, 1], dim=1)
    copies = torch.stack([each.expand(2, 2, 16, 48).reshape(64, 48) for each in (v, k, q)])  # x, B and C
    _, in_proj, *_, out_proj = mixers.tensors(3)
    assert torch.equal(in_proj[64:-4], copies.flatten(0, 1))
    assert torch.equal(out_proj, attention.proj)


def test_wrong_child_is_not_saved(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = slicing.cuts

    def wrong(d: ModelDefinition, child: Child) -> list:
        made = right(d, child)
        (rows, columns), *rest = made[0]
        return [((np.flip(rows), columns), *rest), *made[1:]]

    monkeypatch.setattr(slicing, "cuts", wrong)
    with pytest.raises(UserError, match="computes something else than its masked parent: logits differ by"):
        slicing.write_child(parent, child_of(parent), tmp_path / "child", "half")
    assert not list(tmp_path.iterdir())


def test_wrong_count_is_not_saved(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*arguments: object) -> ModelDefinition:
        made = child_definition(*arguments)
        return replace(made, expect=replace(made.expect, parameters=made.parameters + 1))

    monkeypatch.setattr(slicing, "child_definition", plan)
    with pytest.raises(UserError, match=r"has [\d,]+ parameters, [\d,]+ are planned"):
        slicing.write_child(parent, child_of(parent), tmp_path / "child", "half")
    assert not list(tmp_path.iterdir())


def test_refusals(parent: Path, tmp_path: Path) -> None:
    child = child_of(parent)
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        slicing.write_child(tmp_path / "absent", child, tmp_path / "child", "half")
    (tmp_path / "child").mkdir()
    with pytest.raises(UserError, match="exists already"):
        slicing.write_child(parent, child, tmp_path / "child", "half")
