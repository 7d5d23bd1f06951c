"""`nemotron-h importance` and `nemotron-h prune`: from a checkpoint to a child that is used as any other model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from local_corpus import sentences
from small_model import pure_config, small_config, small_model
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.inference.model import load_model


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def place(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a prepared blend of its vocabulary, and the importance that the command measured."""
    from save_checkpoint import save

    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("\n".join(sentences(1, 2000)))
    blend = {
        "name": "lines",
        "tokenizer": {"kind": "bpe", "vocab_size": 300, "train_on": ["text"], "train_bytes": "1M"},
        "sources": {"text": {"category": "web", "format": "text", "split_on": "\n", "path": "text.txt"}},
        "phases": [{"name": "all", "weights": {"web": 100}}],
    }
    (folder / "lines.yaml").write_text(yaml.safe_dump(blend))
    prepare(load_blend(str(folder / "lines.yaml")), str(folder / "data"), workers=1)
    data = {"tokenizer": str(folder / "data" / "lines" / "tokenizer"), "seq_length": 64}
    save(small_model(small_config()), folder / "run" / "checkpoints" / "step-000001", data=data)
    text = ("--blend", folder / "lines.yaml", "--root", folder / "data")
    said = invoke(
        "importance", folder / "run", folder / "importance", *text, "--layer-samples", 4, "--neuron-samples", 6
    )
    assert "4 and 6 samples of 64 tokens; least important: " in said
    return folder


def test_what_importance_holds(place: Path) -> None:
    record = json.loads((place / "importance" / "importance.json").read_text())
    settings = record["settings"]
    assert (settings["layer_samples"], settings["neuron_samples"], settings["seq_length"]) == (4, 6, 64)
    assert settings["blend"] == "lines"
    assert len(settings["checkpoint_sha256"]) == 64
    assert not list(place.glob("*unfinished*"))


def test_child_generates_and_is_exported(place: Path, tmp_path: Path) -> None:
    child = tmp_path / "Half Size"
    sizes = ("--mamba", 2, "--ffn-hidden-size", 48, "--mamba-num-heads", 4, "--hidden-size", 32)
    said = invoke("prune", place / "run", child, "--importance", place / "importance", *sizes)
    assert "half_size, 2M/3-/1*, " in said
    model = load_model(child)
    d = model.definition
    assert (d.name, d.mamba_num_heads, d.ffn_hidden_size, d.hidden_size) == ("half_size", 4, 48, 32)
    options = ("--max-tokens", 8, "--temperature", 0)
    generated = invoke("generate", child, "line", *options)
    invoke("export", "hf", child, tmp_path / "hf")
    invoke("import", "hf", tmp_path / "hf", tmp_path / "back")
    assert invoke("generate", tmp_path / "back", "line", *options) == generated
    again = load_model(tmp_path / "back")
    assert torch.equal(again.embedding, model.embedding)
    assert again.definition.family == d.family


def test_a_child_of_experts(place: Path, tmp_path: Path) -> None:
    """Fewer and narrower experts, through both commands and out to Hugging Face's format."""
    from save_checkpoint import save

    data = {"tokenizer": str(place / "data" / "lines" / "tokenizer"), "seq_length": 64}
    run, measured, child = tmp_path / "run", tmp_path / "importance", tmp_path / "fewer"
    save(small_model(pure_config("E")), run / "checkpoints" / "step-000001", data=data)
    text = ("--blend", place / "lines.yaml", "--root", place / "data")
    invoke("importance", run, measured, *text, "--layer-samples", 2, "--neuron-samples", 4)
    sizes = ("--num-experts", 4, "--expert-hidden-size", 24, "--shared-expert-hidden-size", 48)
    assert "fewer, 3M/0-/1*, " in invoke("prune", run, child, "--importance", measured, *sizes)
    d = load_model(child).definition
    assert (d.num_experts, d.experts_per_token, d.expert_hidden_size, d.shared_expert_hidden_size) == (4, 2, 24, 48)
    options = ("--max-tokens", 8, "--temperature", 0)
    invoke("export", "hf", child, tmp_path / "hf")
    invoke("import", "hf", tmp_path / "hf", tmp_path / "back")
    assert invoke("generate", tmp_path / "back", "line", *options) == invoke("generate", child, "line", *options)
    for arguments, message in (
        (("--num-experts", 1), "--num-experts has 1, less than the experts_per_token of small, 2"),
        (("--num-experts", 7), "--num-experts has 7; small has 6"),
        (("--ffn-hidden-size", 8), "--ffn-hidden-size has 8: small has no layers that can be pruned by ffn_hidden"),
    ):
        with pytest.raises(UserError, match=message):
            invoke("prune", run, tmp_path / "none", "--importance", measured, *arguments)
    with pytest.raises(UserError, match="--num-experts has 4: small has no layers that can be pruned by num_experts"):
        invoke("prune", place / "run", tmp_path / "none", "--importance", place / "importance", "--num-experts", 4)


def test_refusals(place: Path, tmp_path: Path) -> None:
    run, measured = place / "run", place / "importance"
    for arguments, message in (
        ((), "nothing is cut"),
        (("--mamba", 4), "--mamba has 4; small has 3"),
        (("--ffn-hidden-size", 0), "--ffn-hidden-size has 0; small has 80"),
        (("--mamba-num-heads", 3), "no multiple of the 2 groups"),
        (("--mamba", 0, "--ffn", 0, "--attention", 0), "no layer is left"),
        (("--ffn", 2, "--order", "best"), "order 'best' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            invoke("prune", run, tmp_path / "child", "--importance", measured, *arguments)
    with pytest.raises(UserError, match="holds no importance"):
        invoke("prune", run, tmp_path / "child", "--importance", tmp_path, "--ffn", 2)
    text = ("--blend", place / "lines.yaml", "--root", place / "data")
    with pytest.raises(
        UserError, match=r"too little training text for 100,000 samples of 64 tokens: text has [\d,]+ of"
    ):
        invoke("importance", run, tmp_path / "importance", *text, "--layer-samples", 100_000)
    with pytest.raises(UserError, match="exists already"):
        invoke("importance", run, measured, *text)
    assert not list(tmp_path.iterdir())
