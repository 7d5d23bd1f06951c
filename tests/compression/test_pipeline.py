"""The whole pipeline on a tiny model, distillations included, and what becomes of its child."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from browser import PROGRAM, Browser
from tiny_pipeline import SHARED, Tiny
from typer.testing import CliRunner, Result

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.cli.main import app
from nemotron_h.inference.model import load_model

pytestmark = pytest.mark.slow
STAGES = ("importance", "candidates", "score", "short-distil", "select", "distil", "export")


def child_of(tiny: Tiny) -> Path:
    return find_checkpoint(tiny.root / "distil" / "small")


def test_every_stage_ran(compressed: tuple[Tiny, Result]) -> None:
    tiny, said = compressed
    assert [line.split(":")[0] for line in said.stdout.splitlines() if line.startswith("[") and " s)" in line] == [
        f"[{n}/7] {name}" for n, name in enumerate(STAGES, 1)
    ]
    assert len(tiny.of_the_whole) == 3
    assert tiny.of_the_whole[-1] == "small"
    tiny.started.clear()
    again = CliRunner().invoke(app, ["minipuzzle", str(tiny.recipe_file)], catch_exceptions=False)
    assert [line for line in again.stdout.splitlines() if "done before" in line] == again.stdout.splitlines()
    assert len(again.stdout.splitlines()) == 7
    assert not tiny.started


def test_the_child_is_the_one_that_was_planned(compressed: tuple[Tiny, Result]) -> None:
    tiny, _ = compressed
    ranking = json.loads((tiny.root / "score" / "ranking.json").read_text())
    winner = json.loads((tiny.root / "select" / "winner.json").read_text())
    assert winner["name"] in ranking["chosen"]
    (row,) = [row for row in ranking["candidates"] if row["name"] == winner["name"]]
    assert 44_000 <= row["parameters"] <= 52_000
    weights = WeightFile(child_of(tiny))
    padding = 2 * 32 * (weights.shapes["embedding.word_embeddings.weight"][0] - 300)
    assert sum(torch.Size(s).numel() for s in weights.shapes.values()) - padding == row["parameters"]
    definition = read_definition(read_record(child_of(tiny)), "")
    assert (definition.pattern, definition.parameters) == (row["pattern"], row["parameters"])


def test_the_result_is_of_text_that_no_choice_has_seen(compressed: tuple[Tiny, Result]) -> None:
    tiny, _ = compressed
    result = json.loads((tiny.root / "export" / "result.json").read_text())
    ranking = json.loads((tiny.root / "score" / "ranking.json").read_text())
    made = tiny.made()
    text = made.text.held_out
    assert result["text"]["report"] == "the second half of each source's validation text"
    assert result["validation"]["parent"]["loss"] != ranking["parent"]["loss"]
    assert not {tuple(w) for w in text["choice"].tolist()} & {tuple(w) for w in text["report"].tolist()}
    child = made.parent.score(load_model(child_of(tiny), dtype=torch.float32), "report")
    assert result["validation"]["child"] == pytest.approx(vars(child))
    loss = {word: score["loss"] for word, score in result["validation"].items()}
    assert loss["parent"] < loss["child"] < loss["pruned"]
    recovered = (loss["pruned"] - loss["child"]) / (loss["pruned"] - loss["parent"])
    assert result["recovered"] == pytest.approx(recovered)
    page = (tiny.root / "export" / "report.html").read_text()
    assert page.count("<svg ") >= 8, "four pictures or more, for a wide screen and for a phone"
    assert f"{recovered:.1%}" in page
    assert "no choice has seen" in page


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_the_report(compressed: tuple[Tiny, Result]) -> None:
    browser = Browser()
    try:
        for width in (390, 1280):
            look = browser.look(compressed[0].root / "export" / "report.html", width, "dark")
            assert look.messages == []
            assert look.width <= width
    finally:
        browser.close()


def test_the_child_is_exported_and_comes_back(compressed: tuple[Tiny, Result], tmp_path: Path) -> None:
    tiny, _ = compressed
    folder = tiny.root / "export" / "hf"
    assert (folder / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    CliRunner().invoke(app, ["import", "hf", str(folder), str(tmp_path / "back")], catch_exceptions=False)
    before, after = (tensors_of(WeightFile(path)) for path in (child_of(tiny), tmp_path / "back"))
    for name, weight in before.items():
        assert torch.equal(weight[: len(after[name])], after[name]), name  # a run pads the vocabulary


def tensors_of(file: WeightFile) -> dict[str, torch.Tensor]:
    found = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(found)
    return found


GOES_ON = """
# @package _global_
defaults: [/base/pretrain, _self_]
name: goes_on
tokens: 1024 # 4 steps
init: {{checkpoint: {child}}}
optim: {{peak_lr: 1e-3, final_lr: 1e-4, warmup_tokens: 256}}
checkpoint: {{every_steps: 4}}
"""

TUNED = """
# @package _global_
defaults: [/base/sft, _self_]
name: tuned
tokens: 1024 # 2 steps
init: {{checkpoint: {child}}}
adapter: {{kind: lora, rank: 4, alpha: 8, targets: [in_proj, linear_qkv, linear_fc1]}}
optim: {{peak_lr: 1e-3, final_lr: 1e-4, warmup_tokens: 512}}
checkpoint: {{every_steps: 2}}
"""


def test_the_child_goes_on_as_any_other_model(compressed: tuple[Tiny, Result], tmp_path: Path) -> None:
    """Pretraining and LoRA on conversations, from its model.yaml and its checkpoint; the tuned one is merged."""
    tiny, _ = compressed
    tiny.prepare_talk()
    child, definition = child_of(tiny), tiny.root / "export" / "model.yaml"
    shared = SHARED.format(folder=tiny.folder)
    for name, text in (("goes_on", GOES_ON), ("tuned", TUNED)):
        recipe = tiny.folder / f"{name}.yaml"
        blend = (
            shared
            if name == "goes_on"
            else shared.replace("words.yaml", "talk.yaml").replace("seq_length: 32", "seq_length: 64")
        )
        recipe.write_text(text.format(child=child) + blend + f"model: {definition}\n")
        tiny.train(recipe)
        assert f"weights from {child}" in recipe.with_suffix(".out").read_text()
    (first,) = re.findall(r"step 1/4  loss (\S+)", (tiny.folder / "goes_on.out").read_text())
    assert float(first) < 2.5  # where the distillation ended; a new model begins at log(300) = 5.7
    arguments = ["merge-adapter", str(tiny.folder / "runs" / "tuned"), str(tmp_path / "merged")]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    merged, before = load_model(tmp_path / "merged").definition, read_definition(read_record(child), "")
    assert (merged.pattern, merged.parameters) == (before.pattern, before.parameters)
