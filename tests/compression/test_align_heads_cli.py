"""`nemotron-h align-heads`: from a run to a checkpoint with fewer key-value heads that is used as any other model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from save_checkpoint import save
from small_model import pure_config, relative_error, small_config, small_model
from test_prune_cli import invoke, place  # noqa: F401

from nemotron_h.compression.child import Child
from nemotron_h.compression.heads import child
from nemotron_h.compression.heads.alignment import LayerAlignment
from nemotron_h.compression.slicing import Masked, logits_error
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model

HEADS = {"num_attention_heads": 8, "num_query_groups": 4}
#: a hybrid, a Transformer with half of each head rotated, and Falcon-H1, whose multipliers are beside its weights
MODELS = {
    "hybrid": lambda changes: small_config(**{**HEADS, **changes}),
    "transformer": lambda changes: pure_config("*", **{**HEADS, **changes}),
    "falcon_h1": lambda changes: pure_config("PS", **{**HEADS, **changes}),
}


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, place: Path) -> Path:  # noqa: F811
    """A run with four key-value heads, of the vocabulary of the prepared text."""
    folder = place / request.param
    data = {"tokenizer": str(place / "data" / "lines" / "tokenizer"), "seq_length": 64}
    model = small_model(MODELS[request.param]({}))
    save(model, folder / "checkpoints" / "step-000001", data=data)
    return folder


def text(place: Path) -> tuple[object, ...]:  # noqa: F811
    return "--blend", place / "lines.yaml", "--root", place / "data", "--samples", 6


def difference(one: Path, other: Path) -> float:
    parent, changed = (load_model(folder, dtype=torch.float64) for folder in (one, other))
    tokens = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
    return logits_error(Masked(parent, Child.whole(parent.definition)), changed, tokens)


def test_heads_are_merged(place: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "Two Heads"
    said = invoke("align-heads", run, out, "--kv-heads", 2, *text(place))
    lines = re.findall(
        r"^layer \d+: (\d)\+(\d) (\d)\+(\d), keys lose ([\d.]+)% \(([\d.]+)%\), values lose ([\d.]+)% \(([\d.]+)%\)$",
        said,
        re.MULTILINE,
    )
    assert len(lines) == said.count("layer ") > 0
    for line in lines:
        assert sorted(line[:4]) == list("0123")
        assert all(float(ours) < float(mean) for ours, mean in (line[4:6], line[6:8]))
    model, parent = load_model(out), load_model(run)
    d = model.definition
    assert (d.name, d.num_query_groups, d.num_attention_heads) == ("two_heads", 2, 8)
    assert d.multipliers == parent.definition.multipliers
    assert f"two_heads, 2 key-value heads, {d.parameters:,} parameters" in said
    record = json.loads((out / "run.json").read_text())["aligned"]
    assert (record["method"], record["kv_heads"], record["samples"], record["seed"]) == ("aligned", 2, 6, 0)
    assert record["blend"] == "lines"
    assert len(record["checkpoint_sha256"]) == 64
    for layer in record["layers"]:
        similarity = torch.tensor(layer["similarity"]["values"])
        assert similarity.shape == (4, 4)
        torch.testing.assert_close(similarity.diagonal(), torch.ones(4))
        assert layer["lost"]["keys"] < layer["lost_by_neighbours"]["keys"]
    options = ("--max-tokens", 8, "--temperature", 0)
    generated = invoke("generate", out, "line", *options)
    if d.family == "transformer":  # no format of Hugging Face has it
        return
    invoke("export", "hf", out, tmp_path / "hf")
    invoke("import", "hf", tmp_path / "hf", tmp_path / "back")
    assert invoke("generate", tmp_path / "back", "line", *options) == generated


def test_layers_train_after_merging_and_by_gates(place: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    """What is written is what was trained; without gates and with them from the same merged layers on the same text."""
    merged = {}
    for method in ("aligned", "gates"):
        options = ("--kv-heads", 2, "--method", method, "--tokens", "8K", "--batch", 2, "--lr", 3e-3, *text(place))
        said = invoke("align-heads", run, tmp_path / method, *options)
        errors = re.findall(r"^layer \d+: error ([\d.]+) merged, ([\d.]+) trained$", said, re.MULTILINE)
        record = json.loads((tmp_path / method / "run.json").read_text())["aligned"]
        assert (record["method"], record["tokens"], record["batch"], record["lr"]) == (method, 8000, 2, 3e-3)
        assert record.get("multipliers") == ("trained" if method == "gates" else None)
        assert len(record["layers"]) == len(errors) > 0
        for layer, (before, after) in zip(record["layers"], errors, strict=True):
            assert layer["error"] == pytest.approx({"merged": float(before), "trained": float(after)}, abs=1e-4)
            assert layer["error"]["trained"] < layer["error"]["merged"]
            assert ("largest_gate" in layer) == (method == "gates")
        merged[method] = [layer["error"]["merged"] for layer in record["layers"]]
        assert load_model(tmp_path / method).definition.num_query_groups == 2
    assert merged["gates"] == merged["aligned"]
    assert difference(tmp_path / "aligned", tmp_path / "gates") > 1e-3


def test_alignment_alone_is_the_same_function(place: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    said = invoke("align-heads", run, tmp_path / "same", "--kv-heads", 2, "--align-only", *text(place))
    assert "same, aligned, none merged, " in said
    assert 0 < difference(run, tmp_path / "same") < 1e-5
    before, after = load_model(run), load_model(tmp_path / "same")
    assert after.definition.num_query_groups == 4
    assert max(float((a.qkv - b.qkv).abs().max()) for a, b in attention(before, after)) > 0.1
    # merging neighbours of what is aligned is what merging at once does
    invoke("align-heads", tmp_path / "same", tmp_path / "later", "--kv-heads", 2, "--method", "mean")
    invoke("align-heads", run, tmp_path / "once", "--kv-heads", 2, *text(place))
    assert difference(tmp_path / "later", tmp_path / "once") < 1e-5


def test_megatron_trains_the_merged_model(place: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    from megatron.core import dist_checkpointing

    invoke("align-heads", run, tmp_path / "one", "--kv-heads", 1, *text(place))
    trained = MODELS[run.name]({"num_query_groups": 1}).configure_model(None)
    state = dist_checkpointing.load(trained.sharded_state_dict(prefix="module."), str(tmp_path / "one" / "weights"))
    trained.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
    model = load_model(tmp_path / "one")
    expected = model.logits(model.extend(ids, model.new_states(*ids.shape)))
    assert relative_error(trained(ids)[..., :300].detach(), expected) < 1e-4
    trained(ids, labels=ids).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.parameters())


def attention(*models: object) -> list[tuple]:
    return [pair for pair in zip(*(model.layers for model in models), strict=True) if hasattr(pair[0], "qkv")]


def test_a_plain_mean_is_a_control(run: Path, tmp_path: Path) -> None:
    said = invoke("align-heads", run, tmp_path / "mean", "--kv-heads", 2, "--method", "mean", "--name", "pooled")
    assert re.search(r"^layer \d+: 0\+1 2\+3$", said, re.MULTILINE)
    assert json.loads((tmp_path / "mean" / "run.json").read_text())["aligned"]["method"] == "mean"
    for before, after in attention(load_model(run), load_model(tmp_path / "mean")):
        pooled = before.qkv.reshape(2, 2, 4, 16, 48)[:, :, 2:].mean(1)  # of a group: two queries, the key, the value
        torch.testing.assert_close(after.qkv.reshape(2, 6, 16, 48)[:, 4:], pooled)
        torch.testing.assert_close(after.proj, before.proj)


def test_bfloat16_is_rounded_anew(place: Path, tmp_path: Path) -> None:  # noqa: F811
    model = small_model(pure_config("*", **HEADS, dtype=torch.bfloat16))
    data = {"tokenizer": str(place / "data" / "lines" / "tokenizer"), "seq_length": 64}
    run = save(model, tmp_path / "run", data=data)
    invoke("align-heads", run, tmp_path / "same", "--kv-heads", 1, "--align-only", *text(place))
    assert 1e-4 < difference(run, tmp_path / "same") < 3e-2


def test_a_wrong_fusion_is_not_saved(
    place: Path,  # noqa: F811
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gates compare what is written with the parent, merged and not."""
    right = LayerAlignment.proj
    monkeypatch.setattr(LayerAlignment, "proj", lambda self, proj: right(self, proj).flip(1))
    for options in ((), ("--align-only",)):
        with pytest.raises(UserError, match="computes something else than it should: logits differ by"):
            invoke("align-heads", run, tmp_path / "wrong", "--kv-heads", 2, *options, *text(place))
    assert not list(tmp_path.iterdir())


def test_a_trained_layer_that_is_written_wrong_is_not_saved(
    place: Path,  # noqa: F811
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = child._reader

    def damaged(*arguments: Any) -> Any:
        read = right(*arguments)
        return lambda row: {key: t.flip(0) if "linear_proj" in key else t for key, t in read(row).items()}

    monkeypatch.setattr(child, "_reader", damaged)
    options = ("--kv-heads", 2, "--tokens", 128, "--batch", 1, *text(place))
    with pytest.raises(UserError, match="computes something else than it should: logits differ by"):
        invoke("align-heads", run, tmp_path / "wrong", *options)
    assert not list(tmp_path.iterdir())


def test_refusals(place: Path, run: Path, tmp_path: Path) -> None:  # noqa: F811
    blend = text(place)
    for arguments, message in (
        (("--kv-heads", 2), "--method aligned needs text"),
        (("--kv-heads", 3, *blend), r"--kv-heads = 3 does not divide model.num_query_groups = 4 \(layer \d\)"),
        (("--kv-heads", 4, *blend), "nothing is merged"),
        (("--kv-heads", 2, "--method", "best", *blend), "--method = 'best'"),
        (("--kv-heads", 2, "--method", "mean", "--align-only"), "exclude each other"),
        (("--kv-heads", 2, "--method", "gates", "--align-only", "--tokens", "1K", *blend), "exclude each other"),
        (("--kv-heads", 2, "--align-only", "--tokens", "1K", *blend), "--align-only and --tokens exclude each other"),
        (("--kv-heads", 2, "--method", "mean", "--seed", 0), "--seed: --method mean reads no text"),
        (("--kv-heads", 2, "--method", "mean", "--tokens", "1K", *blend), "--samples: --method mean aligns nothing"),
        (("--kv-heads", 2, "--method", "mean", "--tokens", "1K"), "--method mean needs text"),
        (("--kv-heads", 2, "--method", "gates", *blend), "--method gates trains layers, and needs text for it"),
        (("--kv-heads", 2, "--multipliers", "fixed", *blend), "--multipliers: --method aligned has no gates"),
        (("--kv-heads", 2, "--method", "gates", "--tokens", "1K", "--multipliers", "x", *blend), "--multipliers = 'x'"),
        (("--kv-heads", 2, "--lr", 1e-3, *blend), "--lr: nothing is trained"),
        (("--kv-heads", 2, "--tokens", "many", *blend), "align-heads: --tokens"),
        (("--kv-heads", 2, "--tokens", "1B", *blend), "too little training text for"),
        (("--kv-heads", 2, "--name", "a/b", *blend), "the model's name = 'a/b' is not a name"),
        (("--kv-heads", 2, *blend, "--samples", 100_000), "too little training text for 100,000 samples"),
    ):
        with pytest.raises(UserError, match=message):
            invoke("align-heads", run, tmp_path / "child", *arguments)
    with pytest.raises(UserError, match="exists already"):
        invoke("align-heads", run, run, "--kv-heads", 2, *blend)
    assert not list(tmp_path.iterdir())
