"""A student is distilled from a checkpoint: exact resume, any layout, ordinary checkpoints, refusals before work."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import FORKS, Small, assert_same, changes_at_resume, distill_recipe, drawn, layout_of_strategy, losses

from nemotron_h.core.errors import UserError
from nemotron_h.report.run import read_run

pytestmark = pytest.mark.slow


def test_straight_equals_killed_and_resumed(distilled: Small) -> None:
    killed = distilled.train("kd_resumed", "kill=4", check=False, recipe=distill_recipe(distilled, "kd_resumed"))
    assert killed.returncode < 0
    out = distilled.train("kd_resumed", recipe=distill_recipe(distilled, "kd_resumed"))
    assert "resumed at step 3" in out.stdout
    assert_same(distilled, "kd_resumed", "kd")
    assert losses(distilled, "kd")[-1] < losses(distilled, "kd")[0]


def test_another_objective_holds_from_the_resume_on(distilled: Small) -> None:
    recipe = distill_recipe(distilled, "kd_other")
    settings = ("model.config.lm_weight=0.5", "model.config.temperature=2.0")
    changed = changes_at_resume(distilled, "kd", "kd_other", recipe, *settings)
    assert changed == {"distill.lm_weight": [0.0, 0.5], "distill.temperature": [1.0, 2.0]}


def test_the_checkpoint_is_an_ordinary_one(distilled: Small) -> None:
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
    from nemotron_h.inference.model import load_model

    checkpoint = find_checkpoint(distilled.run_dir("kd"))
    record = read_record(checkpoint)
    definition = read_definition(record, "kd")
    assert definition.pattern == "M*-"
    assert sum(torch.Size(s).numel() for s in WeightFile(checkpoint).shapes.values()) == definition.parameters
    load_model(checkpoint)
    teacher = find_checkpoint(distilled.run_dir("straight"))
    assert record["teacher"]["checkpoint"] == str(teacher)
    assert {"kl", "lm", "val_kl", "val_lm", "val_loss"} <= set(record["metrics"])
    assert record["metrics"]["val_kl"] == pytest.approx(record["metrics"]["val_loss"], rel=1e-5)
    run = read_run(distilled.run_dir("kd"))
    assert run.values("kl") == pytest.approx(run.values(lambda step: step.loss), rel=1e-5)
    assert run.validated("val_kl")[1][-1] == pytest.approx(record["metrics"]["val_kl"])
    page = drawn(run.folder)
    assert [title in page for title in ("KL to the teacher", "Terms of the loss", "Matmuls of the teacher")] == [
        True
    ] * 3
    held = json.loads((checkpoint / "integrity.json").read_text())
    assert not [name for name in held if "teacher" in name]


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=true"),
        ("trainer.strategy.context_parallel_size=2",),
    ],
    ids=["tensor", "context"],
)
def test_ranks_that_split_both_models(distilled: Small, settings: tuple[str, ...], request) -> None:
    """bfloat16 sums in another order, so close and not equal; a teacher that is cut wrongly is far off."""
    name = f"kd_{request.node.callspec.id}"
    distilled.train(name, *settings, "trainer.devices=2", ranks=2, recipe=distill_recipe(distilled, name))
    for ours, single in zip(losses(distilled, name), losses(distilled, "kd"), strict=True):
        assert ours == pytest.approx(single, rel=0.01)


def test_pipeline(distilled: Small) -> None:
    settings = ["trainer.strategy.pipeline_model_parallel_size=2", "trainer.devices=2"]
    distilled.train("kd_pipeline", *settings, ranks=2, recipe=distill_recipe(distilled, "kd_pipeline"))
    assert losses(distilled, "kd_pipeline") == losses(distilled, "kd")


def test_a_teacher_teaches_itself_nothing(distilled: Small) -> None:
    """A student that starts from the teacher's checkpoint has no divergence: every weight of the teacher is in place.

    The model is read from the checkpoint.
    """
    teacher = distilled.run_dir("straight")
    text = distill_recipe(distilled, "kd_self").read_text()
    before, rest = text.split("model:\n")
    after = rest[rest.index("data:\n") :]
    path = distilled.folder / "kd_self.yaml"
    path.write_text(f"{before}model: {teacher}\ninit: {{checkpoint: {teacher}}}\n{after}")
    distilled.train("kd_self", "trainer.max_steps=2", "optim.warmup_steps=1", "data.horizon_steps=6", recipe=path)
    assert losses(distilled, "kd_self")[0] == 0
    own = json.loads((distilled.run_dir("kd_self") / "run.json").read_text())["metrics"]
    assert own["lm"] < math.log(512) - 0.5  # what twelve steps of training reached


#: with a linear layer behind attention
WIDE = (
    ("mamba_num_heads: 8", "mamba_num_heads: 16"),
    ("pattern: M*-", "pattern: M*L-"),
    ("family: nemotron_h", "family: pruned"),
    ("parameters: 116568", "linear: 1, parameters: 146608"),
)
FP8 = ("precision: bf16", "precision: fp8_current_scaling\nprecision_options: {bf16_edge_layers: 1}")


def test_fp8(distilled: Small) -> None:
    """Both models but for their first and last layer; the first loss is that of their full logits."""
    few = ["trainer.max_steps=2", "optim.warmup_steps=1", "data.horizon_steps=6"]
    distilled.train("wide", "model.config.mamba_num_heads=16", *few)  # 592 values of the input projection, 16 * 37
    teacher = (str(distilled.run_dir("straight")), str(distilled.run_dir("wide")))
    recipe = distill_recipe(distilled, "kd_fp8", *WIDE, FP8, teacher)
    said = distilled.train("kd_fp8", *few, recipe=recipe).stdout
    student, taught = (said.index(f"matrix products of the {who} on each rank") for who in ("student", "teacher"))
    for table, rows in ((said[student:taught], 3), (said[taught:], 6)):
        # attention, two products, and the linear layer, one; FFN, Mamba-2 and attention
        assert table.count("E4M3 weights and activations, E5M2 gradients") == rows
        assert "first layer" in table or "first 1 layer" in table
    arguments = [str(Path(__file__).with_name("plain_loss.py")), str(recipe), str(distilled.folder / "kd_fp8/start.pt")]
    assert FORKS.run(*arguments, folder=distilled.folder, name="plain") == 0
    plain = re.search(r"^loss (\S+)$", (distilled.folder / "plain.out").read_text(), re.M).group(1)
    assert losses(distilled, "kd_fp8")[0] == pytest.approx(float(plain), rel=1e-5)
    assert losses(distilled, "kd_fp8")[1] < losses(distilled, "kd_fp8")[0]


HIDDEN = ["model.config.hidden_weight=0.5", "model.config.hidden_layers=[[0,2],[2,4]]"]
NARROW = (("hidden_size: 64", "hidden_size: 32"), ("parameters: 116568", "parameters: 56792"))


def test_states_through_a_projection(distilled: Small) -> None:
    """Of a narrower student: killed and resumed it is the straight run; the projection is not in what others read."""
    from nemotron_h.checkpoint.definition import read_definition
    from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
    from nemotron_h.inference.model import load_model
    from nemotron_h.training.stages.distillation.model import DistillationConfig
    from nemotron_h.training.stages.distillation.stage import ResumeDistillation

    def train(name: str, *options: str, **how: Any) -> subprocess.CompletedProcess:
        return distilled.train(name, *HIDDEN, *options, recipe=distill_recipe(distilled, name, *NARROW), **how)

    train("kd_states")
    assert train("kd_states_resumed", "kill=4", check=False).returncode < 0
    assert "resumed at step 3" in train("kd_states_resumed").stdout
    assert distilled.steps("kd_states_resumed") == distilled.steps("kd_states")
    checkpoint = find_checkpoint(distilled.run_dir("kd_states"))
    record = read_record(checkpoint)
    assert record["hidden_projection"] == [64, 32]
    first, last = (
        json.loads((at / "run.json").read_text())["metrics"] for at in (checkpoint.parent / "step-000003", checkpoint)
    )
    assert last["hidden"] < first["hidden"] < 1
    definition = read_definition(record, "kd_states")
    assert sum(torch.Size(s).numel() for s in WeightFile(checkpoint).shapes.values()) == definition.parameters
    load_model(checkpoint)
    config = DistillationConfig(teacher=str(distilled.run_dir("straight")), num_attention_heads=4, mamba_num_heads=4)
    with pytest.raises(UserError, match=r"with a projection of states \[64, 32\], now it would be none"):
        ResumeDistillation._check_same_projection(checkpoint, config)

    # the projection is whole on each of two tensor-parallel ranks
    settings = ["trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=true"]
    settings += ["trainer.devices=2", "trainer.max_steps=2", "optim.warmup_steps=1", "data.horizon_steps=6"]
    train("kd_states_tensor", *settings, ranks=2)
    split, whole = (distilled.steps(name)[1] for name in ("kd_states_tensor", "kd_states"))
    for key in ("loss", "grad_norm"):
        assert float.fromhex(split[key]) == pytest.approx(float.fromhex(whole[key]), rel=0.02)


def test_refusals(distilled: Small, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.training.stages.distillation.model import DistillationConfig
    from nemotron_h.training.stages.distillation.stage import ResumeDistillation, check_teacher

    teacher = find_checkpoint(distilled.run_dir("straight"))
    strategy = layout_of_strategy()
    trainer = SimpleNamespace(strategy=strategy, num_devices=1, num_nodes=1)

    def refused(match: str, **changes: object) -> None:
        values = {"teacher": str(teacher), "vocab_size": 512, "hidden_size": 32, "hybrid_override_pattern": "M-"}
        config = DistillationConfig(
            **{**values, **changes}, num_attention_heads=4, mamba_num_heads=4, mamba_num_groups=2
        )
        with pytest.raises(UserError, match=match):
            check_teacher(config, trainer)

    refused("vocabulary of 512, the student of 1,024", vocab_size=1024)
    refused("temperature = 0 is not positive", temperature=0)
    refused("there is no checkpoint folder", teacher=str(tmp_path / "none"))
    layers = {"hidden_weight": 1.0, "hidden_layers": [[0, 5]]}
    refused(r"hidden_layers has \[0, 5\]: the teacher \(small\) has layers 0 to 4", **layers)
    refused(r"hidden_layers has \[2, 0\]: the student .* has layers 0 to 1", **{**layers, "hidden_layers": [[2, 0]]})

    other = tmp_path / "step-000012"
    shutil.copytree(teacher, other)
    record = json.loads((other / "run.json").read_text())
    record["model"]["pattern"] = "M-M-M*-"
    (other / "run.json").write_text(json.dumps(record, indent=1))
    listed = json.loads((other / "integrity.json").read_text())
    listed["run.json"][0] = (other / "run.json").stat().st_size
    (other / "integrity.json").write_text(json.dumps(listed))
    refused("belong to different runs|has [0-9,]+", teacher=str(other))
    (other / "run.json").unlink()
    refused("damaged: run.json is missing", teacher=str(other))

    config = DistillationConfig(teacher=str(teacher), num_attention_heads=4, mamba_num_heads=4, mamba_num_groups=2)
    now = config.record()["teacher"]
    student = find_checkpoint(distilled.run_dir("kd"))
    ResumeDistillation._check_same_teacher(student, config)
    config.record = lambda: {"teacher": {**now, "weights": "0" * 64}}
    with pytest.raises(UserError, match="was distilled from"):
        ResumeDistillation._check_same_teacher(student, config)
