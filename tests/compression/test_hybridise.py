"""A hybrid in rounds by its command: every stage with real runs, choices and controls with played ones, refusals."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import WORKER
from tiny_pipeline import SHARED, Tiny, composed
from typer.testing import CliRunner, Result

from nemotron_h.architecture.blocks.transplant import attention_layers
from nemotron_h.architecture.hybrid import counts, evenly
from nemotron_h.cli.main import app
from nemotron_h.compression.hybridise.hybridise import Hybridise
from nemotron_h.compression.hybridise.pipeline import mixers
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import load_model
from nemotron_h.launch import runs
from nemotron_h.launch.runs import write_recipe
from nemotron_h.platform import memory
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow

MODEL = """
model:
  name: small_llama
  family: llama
  pattern: "*S*S*S*S"
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 8
  position_embedding: rope
  rope_base: 10000
  rope_percent: 1.0
  tied_embeddings: true
  vocab_size: 300
  init_std: 0.1
  expect: {mamba: 0, attention: 4, ffn: 0, swiglu: 4, parameters: 46752}
"""

PARENT = """
# @package _global_
defaults: [/base/pretrain, _self_]
name: llama
tokens: 15360 # 60 steps
optim: {peak_lr: 1e-2, final_lr: 1e-3, warmup_tokens: 1024}
checkpoint: {every_steps: 60}
"""

HYBRID = """
# @package _global_
defaults: [/base/distill, _self_]
name: hybrid
stage: hybridise
tokens: 4096 # 16 steps
optim: {{peak_lr: 3e-3, final_lr: 1e-4, warmup_tokens: 256}}
checkpoint: {{every_steps: 8}}
hybridise:
  parent: {folder}/runs/llama
  attention: [0.5, 0.0]
  local: {{matrices: 1024, mixers: 2048, batch: 4, lr: 1e-2}}
  frozen_tokens: 2048
  score_tokens: 512
  generation: {{batch: 2, prompt: 16, output: 16}}
  then: [{folder}/tuned.yaml]
"""

TUNED = """
# @package _global_
defaults: [/base/sft, _self_]
name: tuned
tokens: 1024 # 2 steps
optim: {peak_lr: 1e-3, final_lr: 1e-4, warmup_tokens: 512}
checkpoint: {every_steps: 2}
"""

STAGES = ("mixers-1", "distil-1", "mixers-2", "distil-2", "then-1", "generation", "report")


def hybrid(tiny: Tiny, *overrides: str, **arguments: Any) -> Hybridise:
    """Return the compression, ready to run."""
    recipe = copy.deepcopy(composed(tiny.folder / "hybrid.yaml", overrides))
    return Hybridise(recipe, Console(file=io.StringIO(), width=300), **arguments)


@pytest.fixture(scope="module")
def small(tiny: Tiny) -> Tiny:
    """`tiny`, with a trained Llama, conversations, and the recipes of its hybrid."""
    tiny.prepare_talk()
    shared = SHARED.format(folder=tiny.folder).replace("precision: bf16", "precision: fp32")
    talk = shared.replace("words.yaml", "talk.yaml").replace("seq_length: 32", "seq_length: 64")
    for name, text in (("llama", PARENT), ("hybrid", HYBRID.format(folder=tiny.folder)), ("tuned", TUNED)):
        (tiny.folder / f"{name}.yaml").write_text(text + MODEL + (talk if name == "tuned" else shared))
    tiny.train(tiny.folder / "llama.yaml")
    return tiny


@pytest.fixture(scope="module")
def made(small: Tiny) -> tuple[Tiny, Result]:
    """`small` after `nemotron-h hybridise RECIPE`, and what the command said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", small.launch)
        small.started.clear()
        said = CliRunner().invoke(app, ["hybridise", str(small.folder / "hybrid.yaml")], catch_exceptions=False)
    return small, said


def read(tiny: Tiny, *path: str) -> Any:
    return json.loads((tiny.folder / "runs/hybrid").joinpath(*path).read_text())


def test_every_stage_runs_and_is_not_run_again(made: tuple[Tiny, Result]) -> None:
    tiny, said = made
    assert said.exit_code == 0, said.output
    assert tiny.started == ["hybrid_1_frozen", "hybrid_1", "hybrid_2_frozen", "hybrid_2", "tuned"]
    states = hybrid(tiny).pipeline.states()
    assert {name: state.word for name, state in states.items()} == dict.fromkeys(STAGES, "done")
    other = hybrid(tiny, "hybridise.attention=[0.5, 0.25]").pipeline.states()
    assert [name for name, state in other.items() if state.word == "done"] == ["mixers-1", "distil-1"]


def test_each_round_begins_with_what_the_one_before_made(made: tuple[Tiny, Result]) -> None:
    tiny, _ = made
    one, two = (read(tiny, f"mixers-{number}", "mixers.json") for number in (1, 2))
    assert (one["go"], one["stay"], one["pattern"]) == ([0, 4], [2, 6], "MS*SMS*S")
    assert (two["go"], two["stay"], two["pattern"]) == ([2, 6], [], "MSMSMSMS")
    for row in (one, two):
        assert len(row["errors"]) == 2
        for error in row["errors"].values():
            assert error["trained"] <= error["matrix"]["output"]
            assert error["trained"] < error["transplanted"]
            assert error["matrix"]["trained"] < error["matrix"]["transplanted"]
    distilled = [read(tiny, f"distil-{number}", "results.json") for number in (1, 2)]
    record = json.loads((tiny.folder / "runs/hybrid/mixers-2/transplanted/run.json").read_text())["transplanted"]
    assert record["from"] == distilled[0]["child"]["checkpoint"]
    assert (record["chosen_by"], record["round"], record["layers"][0]["C"]) == ("every", 2, "Q")
    for row, result in zip((one, two), distilled, strict=True):
        assert result["parent"]["loss"] < result["child"]["loss"] < row["measured"]["loss"]
        assert row["measured"]["agreement"] < result["frozen"]["agreement"] < result["child"]["agreement"]
    teacher = compose(str(tiny.folder / "runs/hybrid/distil-2/hybrid_2.yaml")).distill.teacher
    assert teacher.startswith(f"{tiny.folder}/runs/llama/"), "the first parent teaches"


def test_frozen_layers_stay_bit_for_bit(made: tuple[Tiny, Result]) -> None:
    tiny, _ = made
    root = tiny.folder / "runs/hybrid"
    before, frozen = (load_model(root / path) for path in ("mixers-1/transplanted", "distil-1/hybrid_1_frozen"))
    assert torch.equal(before.embedding, frozen.embedding)
    assert torch.equal(before.final_norm, frozen.final_norm)
    mixed = attention_layers(before.definition.blocks)
    for layer, (one, other) in enumerate(zip(before.layers, frozen.layers, strict=True)):
        same = [torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)]
        if layer in mixed or before.definition.pattern[layer] == "S":
            assert all(same), layer
        else:
            assert not any(same[1:]), layer


def test_recipes_follow(made: tuple[Tiny, Result]) -> None:
    tiny, _ = made
    tuned = compose(str(tiny.folder / "runs/hybrid/then-1/tuned.yaml"))
    assert tuned.init.checkpoint == read(tiny, "distil-2", "results.json")["child"]["checkpoint"]
    assert (tuned.stage, tuned.model.pattern) == ("sft", "MSMSMSMS")
    result = read(tiny, "report", "result.json")
    assert result["checkpoint"] == result["then"][0]["child"]["checkpoint"]
    assert result["checkpoint"].startswith(f"{tiny.folder}/runs/hybrid/then-1/tuned/")


def test_the_report_tells_each_round(made: tuple[Tiny, Result]) -> None:
    tiny, _ = made
    result = read(tiny, "report", "result.json")
    page = (tiny.folder / "runs/hybrid/report/report.html").read_text()
    assert page.count("<svg") >= 8, "four pictures, each for a wide and a narrow screen"
    for row in result["rounds"]:
        assert row["pattern"] in page
        assert row["generation"]["tokens_per_second"] > 0
    # by hand, of 32 tokens: 2 key-value heads of 8 in bf16; 4 heads of 8 x 8 in float32, 3 x 96 inputs in bf16
    of_attention, of_mixer = 32 * 2 * 2 * 8 * 2, 4 * 8 * 8 * 4 + 3 * 96 * 2
    assert result["rounds"][0]["parent_generation"]["state_bytes"] == 4 * of_attention
    assert result["rounds"][0]["generation"]["state_bytes"] == 2 * of_attention + 2 * of_mixer
    assert result["rounds"][1]["generation"]["state_bytes"] == 4 * of_mixer
    assert "pattern: MSMSMSMS" in (tiny.folder / "runs/hybrid/report/model.yaml").read_text().replace('"', "")


def test_two_tensor_parallel_ranks_distil_alike(made: tuple[Tiny, Result]) -> None:
    """Two groups of each mixer on each rank; the vocabulary of 300 has as much padding on two ranks as on one."""
    tiny, _ = made
    recipe = copy.deepcopy(compose(str(tiny.folder / "runs/hybrid/distil-1/hybrid_1.yaml")))
    recipe.log.dir, recipe.parallel.tensor, recipe.parallel.devices = str(tiny.folder / "tensor"), 2, 2
    run = runs.Run("hybrid_1", recipe)
    write_recipe(run)
    options = {"folder": run.recipe_file.parent, "name": "tensor", "ranks": 2}
    padding = "model.config.make_vocab_size_divisible_by=64"
    code = tiny.forks.run(str(WORKER), str(run.recipe_file), padding, **options)
    assert code == 0, (run.recipe_file.parent / "tensor.err").read_text()[-3000:]
    of_runs = [
        [float.fromhex(json.loads(line)["loss"]) for line in (folder / "steps.jsonl").read_text().splitlines()[-16:]]
        for folder in (tiny.folder / "runs/hybrid/distil-1", tiny.folder / "tensor")
    ]
    assert of_runs[1] == pytest.approx(of_runs[0], rel=1e-4)


def test_an_interrupted_stage_goes_on_where_it_was(
    made: tuple[Tiny, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it comes to is what it comes to in one go, bit for bit, and no mixer is trained twice."""
    tiny, _ = made
    original, calls = mixers.train_layer, []

    def counted(c: Any, layer: int, *arguments: Any) -> Any:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(c, layer, *arguments)

    monkeypatch.setattr(mixers, "train_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        hybrid(tiny, f"log.dir={tmp_path}").pipeline.run("mixers-1")
    hybrid(tiny, f"log.dir={tmp_path}").pipeline.run("mixers-1")
    assert calls == [4, 0, 0]
    stages = [tmp_path / "hybrid/mixers-1", tiny.folder / "runs/hybrid/mixers-1"]
    outputs = [json.loads((folder / "stage.json").read_text())["outputs"]["transplanted"] for folder in stages]
    assert len(set(outputs)) == 1


def test_the_least_harmful_go_and_a_control_is_worse(made: tuple[Tiny, Result], tmp_path: Path) -> None:
    tiny, _ = made
    options = ("hybridise.attention=[0.75]", "hybridise.local.matrices=null")
    fewer = ("hybridise.choice=kl", "hybridise.local.mixers=512")
    chosen = hybrid(tiny, *fewer, f"log.dir={tmp_path}", *options)
    chosen.pipeline.run("mixers-1")
    one = chosen.read("mixers-1", "mixers.json")
    assert list(one["kl"]) == ["0", "2", "4", "6"]
    best = min(one["kl"], key=lambda layer: one["kl"][layer]["transplanted"])
    assert one["go"] == [int(best)]
    errors = {}
    for start in ("transplant", "random"):
        made_of = hybrid(tiny, f"hybridise.start={start}", f"log.dir={tmp_path / start}", *options)
        made_of.pipeline.run("mixers-1")
        record = json.loads((made_of.transplanted(made_of.rounds[0]) / "run.json").read_text())["transplanted"]
        assert record["layers"][0]["C"] == {"transplant": "Q", "random": "sampled"}[start]
        (errors[start],) = made_of.read("mixers-1", "mixers.json")["errors"].values()
    assert errors["transplant"]["trained"] < errors["random"]["trained"]


def test_shares_and_places() -> None:
    parent = definition_of(compose("llama_tiny/pretrain"), "")
    assert parent.pattern == "*S" * 8
    assert counts(parent, [0.5, 0.25, 0.125, 0.0], "") == [4, 2, 1, 0]
    assert counts(parent, [0.94 - 0.01, 0.3], "") == [7, 2], "to the nearest"
    assert counts(parent, [0.4375], "") == [4], "halves up"
    layers = list(range(0, 64, 2))
    assert evenly(layers, 16) == layers[1::2], "as 2408.15237 has half"
    assert evenly(layers[1::2], 8) == layers[3::4]
    assert evenly(layers, 0) == []
    assert evenly([0, 2, 4, 6, 8, 10, 12], 3) == [4, 8, 12]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["hybridise.attention=[]"], "hybridise.attention is empty"),
        (
            ["hybridise.attention=[0.5,0.5]"],
            "hybridise.attention has 0.5: of 4 attention layers of small_llama that is",
        ),
        (["hybridise.attention=[0.25,0.5]"], "that is 2, to the nearest, where 1 are left"),
        (["hybridise.attention=[0.9]"], "hybridise.attention has 0.9: .* that is 4, to the nearest, where 4 are left"),
        (["hybridise.attention=[0.1]"], "hybridise.attention has 0.1: .* that is 0, to the nearest"),
        (["hybridise.attention=[1.0]"], r"hybridise.attention\[0\] = 1.0 is not below 1"),
        (["hybridise.choice=some"], "hybridise.choice = 'some'"),
        (["hybridise.start=zero"], "hybridise.start = 'zero'"),
        (["hybridise.groups=3"], "hybridise.groups = 3 does not divide the 4 query heads of layer 0"),
        (["hybridise.frozen_tokens=null", "hybridise.frozen_lr=0.1"], "hybridise.frozen_lr is unused"),
        (["hybridise.local.mixers=null", "hybridise.local.matrices=null"], "hybridise.local.lr = 0.01 is unused"),
        (["data.seq_length=9000", "hybridise.score_tokens=9K"], "local.matrices: data.seq_length = 9,000: a matrix of"),
        (["hybridise.local.matrices=1B"], "hybridise.local: blend 'words' has too little training text"),
        (
            ["hybridise.then=[llama_tiny/pretrain]"],
            "hybridise.then has llama_tiny/pretrain, a recipe of stage pretrain",
        ),
        (["hybridise.then=[nowhere.yaml]"], "hybridise.then: there is no recipe file nowhere.yaml"),
        (["hybridise.then=[nemotron_h_tiny/sft_lora]"], "nemotron_h_tiny/sft_lora, which trains an adapter"),
        (["hybridise.then=[nemotron_h_tiny/sft]"], "hybridise.then: nemotron_h_tiny/sft: blend 'sft_sample' is not"),
        (["hybridise.parent=nowhere"], "hybridise.parent: there is no checkpoint folder nowhere"),
        (["hybridise.frozen_tokens=128"], "optim.warmup_tokens \\(256\\) is not shorter than the run \\(128 tokens"),
        (["parallel.tensor=2", "parallel.devices=2", "hybridise.groups=1"], "parallel.tensor = 2 does not divide"),
        (["minipuzzle.parent=x"], "minipuzzle"),
    ],
)
def test_mistakes_are_told_before_any_work(
    small: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        Hybridise(
            compose(str(small.folder / "hybrid.yaml"), [*changes, f"log.dir={tmp_path}/runs"]),
            Console(file=io.StringIO()),
        )
    assert not list(tmp_path.iterdir())


def test_a_parent_needs_attention_and_a_machine_its_memory(
    small: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (small.folder / "hybrid.yaml").read_text()
    falcon = "defaults: [/base/distill, /model: falcon_h1_tiny, _self_]"
    before, after = text.split("model:\n")
    own = before.replace("defaults: [/base/distill, _self_]", falcon) + after[after.index("\nprecision") :]
    (tmp_path / "falcon.yaml").write_text(own)
    with pytest.raises(UserError, match="has no layer that is attention alone"):
        compose(str(tmp_path / "falcon.yaml"))
    monkeypatch.setattr(memory, "available", lambda device: 46_752 * 4)
    arguments = ["hybridise", str(small.folder / "hybrid.yaml"), f"log.dir={tmp_path}/runs"]
    with pytest.raises(UserError, match="stage mixers-1 holds small_llama and what replaces parts of it"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "runs").exists()


def test_dryrun_and_status(small: Tiny, tmp_path: Path) -> None:
    arguments = ["hybridise", str(small.folder / "hybrid.yaml"), f"log.dir={tmp_path}"]
    said = CliRunner().invoke(app, [*arguments, "--dryrun"], catch_exceptions=False).stdout
    commands = [line.split("path=")[1].split(")")[0] for line in said.splitlines()]
    assert [Path(path).stem for path in commands] == [
        *("hybrid_1_frozen", "hybrid_1", "hybrid_2_frozen", "hybrid_2", "tuned")
    ]
    said = CliRunner().invoke(app, [*arguments, "--status"], catch_exceptions=False).stdout
    assert [line.split()[0] for line in said.splitlines()[1:]] == list(STAGES)
    assert not list(tmp_path.iterdir())
