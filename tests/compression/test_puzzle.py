"""Puzzle on a tiny model by its command: every stage, what is written, and what an interruption leaves."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_pipeline import MODEL, SHARED, Tiny, composed
from typer.testing import CliRunner, Result

from nemotron_h.cli.main import app
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.puzzle import child as child_writer
from nemotron_h.compression.puzzle.local import child_changes
from nemotron_h.compression.puzzle.pipeline import compare, library, refine, score
from nemotron_h.compression.puzzle.puzzle import Puzzle
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model
from nemotron_h.launch import runs
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow
RECIPE = """
# @package _global_
defaults: [/base/distill, _self_]
name: puzzled
stage: puzzle
tokens: 2048 # 8 steps
optim: {{peak_lr: 3e-3, final_lr: 1e-4, warmup_tokens: 256}}
checkpoint: {{every_steps: 2}}
distill: {{hidden_weight: 1.0}}
puzzle:
  parent: {folder}/runs/parent
  layer_samples: 2
  neuron_samples: 8
  library:
    num_query_groups: [1]
    ffn_hidden_size: [32]
    mamba_num_heads: [4]
    linear: [attention]
    no_op: [attention, ffn]
  local: {{tokens: 2048, batch: 4, lr: 1e-2}}
  score_tokens: 512
  costs: {{batch: 2, prompt: 16, output: 16, times: none, parameters: 50K}}
  solutions: 2
  refine_tokens: 1024
"""
STAGES = ("importance", "library", "score", "costs", "search", "compare", "refine", "child", "heal", "report")


def puzzle(tiny: Tiny, *overrides: str) -> Puzzle:
    """Return the compression, ready to run."""
    recipe = copy.deepcopy(composed(tiny.folder / "puzzled.yaml", overrides))
    return Puzzle(recipe, Console(file=io.StringIO(), width=300))


@pytest.fixture(scope="module")
def solved(tiny: Tiny) -> tuple[Tiny, Result]:
    """`tiny` after `nemotron-h puzzle RECIPE`, and what the command said."""
    shared = MODEL + SHARED.format(folder=tiny.folder)
    (tiny.folder / "puzzled.yaml").write_text(RECIPE.format(folder=tiny.folder) + shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", tiny.launch)
        said = CliRunner().invoke(app, ["puzzle", str(tiny.folder / "puzzled.yaml")], catch_exceptions=False)
    return tiny, said


def read(tiny: Tiny, *path: str) -> Any:
    return json.loads((tiny.folder / "runs/puzzled").joinpath(*path).read_text())


def test_every_stage_runs_and_is_not_run_again(solved: tuple[Tiny, Result]) -> None:
    tiny, said = solved
    assert said.exit_code == 0, said.output
    made = puzzle(tiny)
    assert {name: state.word for name, state in made.pipeline.states().items()} == dict.fromkeys(STAGES, "done")
    again = puzzle(tiny, "puzzle.costs.parameters=55K").pipeline.states()
    assert [name for name, state in again.items() if state.word == "done"] == list(STAGES[:4])


def test_training_brings_the_variants_closer_to_their_layers(solved: tuple[Tiny, Result]) -> None:
    entries = read(solved[0], "library", "library.json")
    assert len(entries) == 3 + 3 + 2, "narrower Mamba-2 and FFN layers, merged heads and a linear layer"
    assert all(entry["trained"] <= entry["made"] for entry in entries)
    assert sum(entry["trained"] for entry in entries) < 0.8 * sum(entry["made"] for entry in entries)


def test_the_program_s_sum_is_at_most_that_of_greedy_and_random(solved: tuple[Tiny, Result]) -> None:
    found = read(solved[0], "search", "solutions.json")
    best = found["solutions"][0]
    assert best["costs"]["parameters"] <= 50_000 < found["parent"]["parameters"] == 62_344
    assert best["score"] <= found["greedy"]["score"]
    assert best["score"] <= min(row["score"] for row in found["random"])
    scores = [point["score"] for point in found["front"]]
    assert scores == sorted(scores, reverse=True)


def test_the_child_is_what_was_chosen(solved: tuple[Tiny, Result]) -> None:
    """Its checkpoint computes what the variants compute in memory; its loss is the one that was told."""
    tiny, _ = solved
    told, made = read(tiny, "child", "child.json"), puzzle(tiny)
    compared = read(tiny, "compare", "compared.json")
    chosen = compared["chosen"]
    model = load_model(tiny.folder / "runs/puzzled/child/pruned")
    assert model.definition.parameters == told["parameters"]["child"]
    assert model.definition.parameters == chosen["costs"]["parameters"]
    from_disk = child_changes(made.parent.model, {"child": model}, made.text.held_out[CHOICE], 8)["child"]
    refined = read(tiny, "refine", "refined.json")["kl"]
    assert from_disk.kl == pytest.approx(refined["after"], rel=5e-3), "of bf16"
    assert refined["after"] < refined["before"] == compared["solutions"][chosen["solution"]]["kl"]


def test_pairs_that_are_worse_together_are_not_taken(
    solved: tuple[Tiny, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*arguments: Any) -> dict[str, Any]:
        return {"before": SimpleNamespace(kl=0.1), "after": SimpleNamespace(kl=0.2)}

    monkeypatch.setattr(refine, "child_changes", worse)
    said = refine.run(puzzle(solved[0]), tmp_path)
    assert said.endswith("KL 0.1000 -> 0.2000: the variants stay as they were")
    assert json.loads((tmp_path / "refined.json").read_text())["stored"] == {}


def test_the_healed_child_is_closer_to_its_parent(solved: tuple[Tiny, Result]) -> None:
    tiny, _ = solved
    healed, told = read(tiny, "heal", "results.json"), read(tiny, "child", "child.json")
    assert healed["parent"]["loss"] < healed["child"]["loss"] < told["report"]["loss"]
    recipe = compose(str(tiny.folder / "runs/puzzled/heal/puzzled/recipe.yaml"))
    stay = [layer for layer, pick in enumerate(told["picks"]) if pick != "no_op"]
    assert recipe.distill.hidden_layers == [[number, layer] for number, layer in enumerate(stay)]


def test_the_report_shows_each_layer_s_variant(solved: tuple[Tiny, Result]) -> None:
    page = (solved[0].folder / "runs/puzzled/report/report.html").read_text()
    result = read(solved[0], "report", "result.json")
    assert -1 <= result["spearman"] <= 1
    assert result["children"] == 2 + 1 + 20
    assert page.count("<svg") >= 8, "four pictures, each for a wide and a narrow screen"
    assert all(pick in page for pick in result["picks"] if pick != "parent")


@pytest.mark.parametrize(
    ("stage", "module", "name", "output"),
    [
        ("library", library, "make_layer", "library.json"),
        ("score", score, "score_layer", "scores.json"),
        ("compare", compare, "child_changes", "compared.json"),
        ("refine", refine, "refine_pair", "refined.json"),
    ],
)
def test_an_interrupted_stage_goes_on_where_it_was(
    solved: tuple[Tiny, Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    module: Any,
    name: str,
    output: str,
) -> None:
    """What it comes to is what it comes to in one go, bit for bit, and nothing that was done is done again."""
    tiny, _ = solved
    root, copied = tiny.folder / "runs/puzzled", tmp_path / "puzzled"
    shutil.copytree(root, copied, ignore=shutil.ignore_patterns("heal", "child", "report"))
    shutil.rmtree(copied / stage)
    for weights in (copied / "variants").iterdir():
        made_by = "refine" if weights.stem in read(tiny, "refine", "refined.json")["stored"].values() else "library"
        if made_by == stage:
            weights.unlink()
    original, calls, limit = getattr(module, name), [], 2

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(compare, "AT_ONCE", 4)
    monkeypatch.setattr(module, name, counted)
    with pytest.raises(KeyboardInterrupt):
        puzzle(tiny, f"log.dir={tmp_path}").pipeline.run(stage)
    assert not (copied / stage / output).exists()
    limit = 1000
    puzzle(tiny, f"log.dir={tmp_path}").pipeline.run(stage)
    if stage != "refine":  # which measures the whole child at its end
        times = len(calls)
        shutil.rmtree(copied / stage)
        for weights in (copied / "variants").iterdir() if stage == "library" else ():
            weights.unlink()
        puzzle(tiny, f"log.dir={tmp_path}").pipeline.run(stage)
        assert len(calls) - times == times - 1, "the call that was interrupted alone was made twice"
    assert (copied / stage / output).read_bytes() == (root / stage / output).read_bytes()


def test_several_processes_make_the_same_library(solved: tuple[Tiny, Result], tmp_path: Path) -> None:
    root = solved[0].folder / "runs/puzzled"
    shutil.copytree(root / "importance", tmp_path / "puzzled/importance")
    made = puzzle(solved[0], f"log.dir={tmp_path}", "parallel.devices=2", "data.micro_batch_size=4")
    made.pipeline.run("library")
    told = "library/library.json"
    assert (tmp_path / "puzzled" / told).read_bytes() == (root / told).read_bytes()


def test_heads_merge_by_gates(solved: tuple[Tiny, Result], tmp_path: Path) -> None:
    """What trains with gates is a layer of merged heads like another; a linear one beside it has none."""
    entries, shapes = {}, {}
    for merge in ("aligned", "gates"):
        options = (f"log.dir={tmp_path}", "puzzle.local.tokens=12K", "puzzle.library.no_op=[]")
        made = puzzle(solved[0], *options, f"puzzle.merge={merge}")
        made.pipeline.run("importance")
        library.make_layer(made, 3, library._moments(made, tmp_path, library._all(made)))
        hashes = [made.hash(3, variant) for variant in made.trained_variants(3).values()]
        entries[merge] = [made.library.entry(name) for name in hashes]
        shapes[merge] = [tensor.shape for tensor in made.library.tensors(hashes[0])]
    (aligned, linear), (gated, same) = entries.values()
    assert (gated.variant, gated.made) == ("num_query_groups=1", aligned.made)
    assert gated.trained < gated.made
    assert gated.trained != aligned.trained
    assert same.trained == linear.trained
    assert shapes["gates"] == shapes["aligned"]


def test_a_child_that_is_not_its_variants_is_not_written(
    solved: tuple[Tiny, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, _ = solved
    picks, made = read(tiny, "child", "child.json")["picks"], puzzle(tiny)
    original: Callable[..., Any] = child_writer._Reader.__call__

    def damaged(self: Any, row: Any) -> Any:
        return {name: torch.flip(tensor, [0]) for name, tensor in original(self, row).items()}

    monkeypatch.setattr(child_writer._Reader, "__call__", damaged)
    with pytest.raises(UserError, match="computes something else than its variants"):
        child_writer.write_child(made, picks, {}, tmp_path / "child", "wrong", {})
    assert not (tmp_path / "child").exists()


def test_a_limit_that_nothing_meets_is_refused_before_any_stage(solved: tuple[Tiny, Result]) -> None:
    """By hand: 19,232 outside of the layers, and three Mamba-2 layers of 4 heads; all others may go."""
    least = 19_232 + 3 * 5_804
    with pytest.raises(UserError, match=rf"puzzle.costs.parameters = 36K: .* all layers make {least:,} with"):
        puzzle(solved[0], "puzzle.costs.parameters=36K")
    assert puzzle(solved[0], f"puzzle.costs.parameters={least}")
