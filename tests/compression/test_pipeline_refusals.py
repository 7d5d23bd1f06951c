"""What a pipeline refuses before any work: each message names the key, what was found, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_pipeline import Tiny
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import train_bpe

pytestmark = pytest.mark.slow


def refused(tiny: Tiny, *overrides: str) -> tuple[str, str]:
    """What `nemotron-h minipuzzle` says of a recipe, without its file's name in front, and its hint; it did no work."""
    elsewhere = tiny.folder / "refused"
    arguments = ["minipuzzle", str(tiny.recipe_file), *overrides, f"log.dir={elsewhere}"]
    with pytest.raises(UserError) as raised:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not elsewhere.exists()
    assert raised.value.message.startswith(f"{tiny.recipe_file}: ")
    return raised.value.message.removeprefix(f"{tiny.recipe_file}: "), raised.value.hint


def test_no_candidate_fits(tiny: Tiny) -> None:
    limits = ("minipuzzle.budget.parameters=20K", "minipuzzle.budget.least_parameters=null")
    said, hint = refused(tiny, *limits)
    assert said == (
        "minipuzzle: no candidate of the grid fits budget.parameters = 20K: the smallest (2M/2-/1*, FFN 32, hidden 32) "
        "has 44,912"
    )
    assert hint == "raise budget.parameters to 44912 or more, or widen the grid"
    said, hint = refused(tiny, "minipuzzle.budget.memory_gib=1e-5", "minipuzzle.budget.context=1024")
    assert said.startswith(
        "minipuzzle: no candidate of the grid fits budget.memory_gib = 1e-05: the smallest (2M/2-/1*"
    )
    assert hint.startswith("raise budget.memory_gib to 0.01 or more, shorten budget.context, or widen the grid")


def test_nothing_between_the_limits(tiny: Tiny) -> None:
    said, hint = refused(tiny, "minipuzzle.budget.parameters=46K", "minipuzzle.budget.least_parameters=45.5K")
    assert said.startswith("minipuzzle: no candidate of the grid meets all limits at once: budget.parameters = 46K, ")
    assert "widen the grid" in hint


def test_parent_of_another_definition(tiny: Tiny) -> None:
    said, hint = refused(tiny, "model.ffn_hidden_size=48", "model.expect.parameters=59272")
    parent = tiny.folder / "runs" / "parent" / "checkpoints" / "step-000060"
    assert said == (
        f"minipuzzle.parent: {parent} is of another model: ffn_hidden_size: 64 in the checkpoint, 48 in the recipe"
    )
    assert hint == "name a checkpoint of the recipe's model, or take the model of the checkpoint: model=NAME"


def test_no_parent(tiny: Tiny) -> None:
    said, hint = refused(tiny, f"minipuzzle.parent={tiny.folder}/runs/absent")
    assert said == f"minipuzzle.parent: there is no checkpoint folder {tiny.folder}/runs/absent"
    assert hint == "train it first, or name another: minipuzzle.parent=runs/NAME"
    said, hint = refused(tiny, f"minipuzzle.parent={tiny.folder}/data")
    assert said == f"minipuzzle.parent: {tiny.folder}/data is neither a checkpoint nor a run with a finished one"
    assert hint.startswith("name a run folder")


def test_too_few_samples(tiny: Tiny) -> None:
    for key in ("layer_samples", "neuron_samples"):
        said, hint = refused(tiny, f"minipuzzle.{key}=5000")
        assert said.startswith(
            f"minipuzzle.{key} = 5,000: blend 'words' has too little training text for 5,000 samples of 32 tokens: "
        )
        assert hint.startswith("Ask for fewer samples")
    said, hint = refused(tiny, "minipuzzle.score_tokens=1M")
    assert said.startswith("minipuzzle.score_tokens = 1M, of each half of the validation text: 1,000,000 validation")
    assert hint.startswith("Ask for fewer, or hold out more")


def test_data_that_is_not_prepared(tiny: Tiny) -> None:
    said, hint = refused(tiny, f"data.root={tiny.folder}/nowhere")
    assert said == f"data: blend 'words' is not prepared: there is no {tiny.folder}/nowhere/words/manifest.json"
    assert hint == f"Run: nemotron-h data prepare --blend {tiny.folder}/words.yaml --root {tiny.folder}/nowhere"


def test_another_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    """Of another size than the parent's vocabulary; or of the same, and other words."""
    for size in (301, 300):
        shutil.copytree(tiny.folder / "data", tmp_path / str(size))
        path = tmp_path / str(size) / "words" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        manifest["tokenizer"]["vocab_size"] = size
        if size == 300:
            other = train_bpe([Path(__file__).read_text()], 300, path.with_name("tokenizer"))
            manifest["tokenizer"]["sha256"] = other.fingerprint()
        path.write_text(json.dumps(manifest))
        blend = yaml.safe_load((tiny.folder / "words.yaml").read_text())
        blend["tokenizer"]["vocab_size"] = size
        for source in blend["sources"].values():
            source["path"] = str(tiny.folder / source["path"])
        (tmp_path / "words.yaml").write_text(yaml.safe_dump(blend))
        said, hint = refused(tiny, f"data.root={tmp_path / str(size)}", f"data.blend={tmp_path / 'words.yaml'}")
        if size == 301:
            assert said == "the tokenizer of blend words has 301 tokens, the parent a vocabulary of 300"
            assert hint == "choose a blend that was prepared with the parent's tokenizer"
        else:
            assert said.startswith("minipuzzle.parent: wrong tokenizer: blend words was prepared with another one than")
            assert hint.startswith("take the checkpoint's: write tokenizer: {blend: NAME} of its blend")
