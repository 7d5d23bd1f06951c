"""The pipeline on a parent with experts: fewer and narrower ones through every stage, distillations played."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from test_pipeline_options import Played
from tiny_pipeline import Tiny, composed

from nemotron_h.compression.minipuzzle import MiniPuzzle
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model
from nemotron_h.recipe.check import examine

pytestmark = pytest.mark.slow

WIDTHS = """num_experts: 4
  experts_per_token: 2
  expert_hidden_size: 32
  shared_expert_hidden_size: 48
  expert_scaling: 1.5"""
#: of both recipes
MODEL_CHANGES = {
    "pattern: M-M*-M-": "pattern: MEM*E",
    "ffn_hidden_size: 64": WIDTHS,
    "ffn: 3, parameters: 62344": "ffn: 0, experts: 2, parameters: 63608, active: 55416",
    "mamba: 3": "mamba: 2",
}
#: of the compression's
CHANGES = {
    "parent: FOLDER/runs/parent": "parent: FOLDER/runs/parent_experts",
    "grid: {mamba: [2, 3], ffn: [2, 3], ffn_hidden_size: [32, 48]}": (
        "grid: {num_experts: [2, 3], expert_hidden_size: [16, 32], shared_expert_hidden_size: [24]}"
    ),
    "budget: {parameters: 52K, least_parameters: 44K}": "budget: {parameters: 55K}",
}


def recipe_of(tiny: Tiny, name: str, changes: dict[str, str]) -> Path:
    """Write a recipe of `tiny` for a model with experts."""
    text = (tiny.folder / f"{name}.yaml").read_text().replace(str(tiny.folder), "FOLDER")
    for old, new in (MODEL_CHANGES | changes).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = tiny.folder / f"{name}_experts.yaml"
    file.write_text(text.replace("FOLDER", str(tiny.folder)))
    return file


def test_fewer_and_narrower_experts(tiny: Tiny, tmp_path: Path) -> None:
    """Importance of the text finds them, the budget excludes the largest, every later stage takes the child."""
    tiny.train(recipe_of(tiny, "parent", {"name: parent": "name: parent_experts"}))
    file = recipe_of(tiny, "small", CHANGES)
    made = MiniPuzzle(composed(file, (f"log.dir={tmp_path}",)), Console(file=io.StringIO()), train=Played())
    for stage in made.pipeline.stages:
        made.pipeline.run(stage.name)
    rows = made.read("candidates", "candidates.json")
    sizes = {(row["num_experts"], row["expert_hidden_size"], row["shared_expert_hidden_size"]) for row in rows}
    assert sizes == {(2, 16, 24), (2, 32, 24), (3, 16, 24)}
    winner = made.read("select", "winner.json")["name"]
    (row,) = [row for row in rows if row["name"] == winner]
    child = load_model(tmp_path / "small" / "distil" / "small").definition
    assert (child.num_experts, child.expert_hidden_size) == (row["num_experts"], row["expert_hidden_size"])
    assert (child.parameters, child.experts_per_token) == (row["parameters"], 2)
    report = (tmp_path / "small" / "export" / "report.html").read_text()
    assert f"num_experts {child.num_experts}, expert_hidden_size {child.expert_hidden_size}, shared_exp" in report
    for key, value, message in (
        ("num_experts", 1, "num_experts has 1, less than the experts_per_token of tiny, 2"),
        ("shared_expert_hidden_size", 49, "shared_expert_hidden_size has 49; tiny has 48"),
        ("ffn_hidden_size", 8, "ffn_hidden_size has 8: tiny has no layers that can be pruned by ffn_hidden_size"),
    ):
        with pytest.raises(UserError, match=rf"small_experts.yaml: minipuzzle\.grid\.{message}"):
            examine(str(file), [f"minipuzzle.grid.{key}=[{value}]"])
