"""Runs with Muon: resumed bit for bit, in other layouts, and from AdamW and back where that is declared."""

from __future__ import annotations

import json

import pytest
from small_run import Small, assert_same, without_last

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.index import read_index

pytestmark = pytest.mark.slow

STEPS = 12
MUON = ("peak_lr: 1e-2,", "name: muon, qk_clip: 1, peak_lr: 1e-2,")
TENSOR = ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True")


@pytest.fixture(scope="module")
def muon(small: Small) -> Small:
    """With an uninterrupted run, `muon`, and a recipe `muon_recipe` of it."""
    small.train("muon", recipe=small.variant("muon", MUON))
    return small


def states(small: Small, name: str, step: int) -> set[str]:
    """Names of the optimizer's tensors in a checkpoint, without that of the layer."""
    tensors = read_index(small.run_dir(name) / f"checkpoints/step-{step:06d}/weights").state_dict_metadata
    return {key for key in tensors if key.startswith("optimizer.state.")}


def test_one_moment_of_a_matrix_and_two_of_the_rest(muon: Small) -> None:
    names = states(muon, "muon", STEPS)
    for part in ("mixer.in_proj", "mixer.out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        of_part = {name.split(".")[2] for name in names if f".{part}.weight" in name}
        assert of_part == {"momentum", "fp32_param"}, part
    for part in ("word_embeddings", "output_layer", "A_log", "dt_bias", "conv1d", "norm"):
        of_part = {name.split(".")[2] for name in names if part in name and "proj.weight" not in name}
        assert of_part == {"exp_avg", "exp_avg_sq", "fp32_param"}, part


def test_it_learns_and_logs_updates_and_logits(muon: Small) -> None:
    steps = muon.steps("muon")
    losses = [float.fromhex(steps[step]["loss"]) for step in range(1, STEPS + 1)]
    assert losses[-1] < losses[0] - 0.3
    lines = [json.loads(line) for line in (muon.run_dir("muon") / "progress.jsonl").read_text().splitlines()]
    metrics = [line["metrics"] for line in lines]
    assert metrics[0]["attention_logit"] > 2
    assert all(each["attention_logit"] < 1.5 for each in metrics[1:]), "no logit was clipped"
    sizes = {key: value for key, value in metrics[-1].items() if key.startswith("update_rms/")}
    expected = {"mamba": ("in_proj", "out_proj"), "attention": ("linear_qkv", "linear_proj")}
    expected["ffn"] = ("linear_fc1", "linear_fc2")
    assert set(sizes) == {f"update_rms/{kind}.{name}" for kind, names in expected.items() for name in names}
    assert all(0.05 < size < 0.25 for size in sizes.values()), sizes


def test_straight_equals_killed_and_resumed(muon: Small) -> None:
    recipe = muon.variant("muon_killed", MUON)
    muon.train("muon_killed", "kill=6", recipe=recipe, check=False)
    out = muon.train("muon_killed", recipe=recipe)
    assert "resumed at step 4" in out.stdout
    assert "changed from" not in out.stdout
    assert_same(muon, "muon_killed", "muon")
    assert muon.same_tensors("muon", "muon_killed", STEPS)


@pytest.mark.parametrize("options", [TENSOR, ()], ids=["tensor and sequence", "data"])
def test_another_layout_loads_the_same_states_and_continues(muon: Small, options: tuple[str, ...]) -> None:
    name = f"muon_layout_{len(options)}"
    recipe = muon.variant(name, MUON)
    without_last(muon, "muon", name)
    copy = muon.run_dir(name) / "copy"
    muon.train(name, *options, "trainer.devices=2", f"copy={copy}", ranks=2, recipe=recipe)
    assert muon.same_checkpoints((copy, muon.run_dir("muon") / "checkpoints/step-000008"))
    one = muon.steps("muon")
    for step, record in muon.steps(name).items():
        assert float.fromhex(record["loss"]) == pytest.approx(float.fromhex(one[step]["loss"]), rel=2e-2)


def test_a_change_of_the_optimizer_is_declared(muon: Small, straight: dict[int, dict]) -> None:
    for name, before, changes in (("to_muon", "straight", (MUON,)), ("to_adamw", "muon", ())):
        recipe = muon.variant(name, *changes)
        without_last(muon, before, name)
        refused = muon.train(name, recipe=recipe, check=False)
        assert refused.returncode == 2
        assert "which is" in refused.stderr
        assert "resume.optimizer_change=from_step" in refused.stderr
        done = muon.train(name, "resume.optimizer_change=from_step", recipe=recipe)
        assert "optim.name" in done.stdout
        losses = [float.fromhex(record["loss"]) for _, record in sorted(muon.steps(name).items())]
        assert len(losses) == 4
        assert all(abs(loss - float.fromhex(straight[8]["loss"])) < 1 for loss in losses)
        assert states(muon, name, STEPS) == states(muon, "muon" if changes else "straight", STEPS)
        # a second start goes on without the key: the checkpoint is of the new optimizer
        newest = folders.newest(muon.run_dir(name))
        record = json.loads((newest / "run.json").read_text())
        assert record["changes"][-1]["from_step"] == 8
