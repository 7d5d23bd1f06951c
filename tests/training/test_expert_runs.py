"""A model with experts trains; a checkpoint of any layout continues in any other, correction biases and all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import (
    Small,
    assert_same,
    distill_recipe,
    losses,
    preference_recipe,
    sft_recipe,
    write_pairs,
)

from nemotron_h.core.progress import STEPS, read_steps
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.slow

WIDTHS = """ffn_hidden_size: 96
  num_experts: 4
  experts_per_token: 2
  expert_hidden_size: 48
  shared_expert_hidden_size: 64
  expert_scaling: 1.5
"""
#: two pipeline stages: one without experts
CHANGES = (
    ("family: nemotron_h", "family: pruned"),
    ("pattern: M-M*-", "pattern: MM-*E"),
    ("ffn_hidden_size: 96\n", WIDTHS),
    (
        "mamba: 2, attention: 1, ffn: 2, parameters: 163376",
        "mamba: 2, attention: 1, ffn: 1, experts: 1, parameters: 184116, active: 171828",
    ),
)
#: tensor-, pipeline-, expert-parallel size and ranks, each continued from the one before
CHAIN = ((1, 1, 1, 1), (1, 1, 2, 2), (1, 2, 1, 2), (2, 1, 2, 2), (1, 1, 1, 1))


def recipe(small: Small, name: str) -> Path:
    return small.variant(name, *CHANGES)


def layout(tensor: int, pipeline: int, expert: int, ranks: int) -> list[str]:
    """Return overrides."""
    return [
        f"trainer.strategy.tensor_model_parallel_size={tensor}",
        f"trainer.strategy.sequence_parallel={tensor > 1}",
        f"trainer.strategy.pipeline_model_parallel_size={pipeline}",
        f"trainer.strategy.expert_model_parallel_size={expert}",
        f"trainer.devices={ranks}",
    ]


def test_states_are_the_same_after_a_change_of_the_layout(small: Small) -> None:
    """Write what each layout has loaded, before a step, and compare it with what the layout before has written."""
    run, file = small.run_dir("experts_chain"), recipe(small, "experts_chain")
    pairs = []
    for number, sizes in enumerate(CHAIN):
        last = 3 + number
        options = [*layout(*sizes), f"trainer.max_steps={last}", "log.ckpt.keep=-1"]
        if number:
            copy = run / f"copy-{number}"
            options.append(f"copy={copy}")
            pairs.append((copy, run / f"checkpoints/step-{last - 1:06d}"))
        small.train("experts_chain", *options, ranks=sizes[-1], recipe=file)
    assert small.same_checkpoints(*pairs)
    model = load_model(run)
    biases = [w.bias for w in model.layers if hasattr(w, "bias")]
    assert len(biases) == 1
    assert all(0 < float(bias.abs().max()) <= 1e-3 * (2 + len(CHAIN)) + 1e-6 for bias in biases)
    assert len(generate(model, [[1, 2, 3]], max_tokens=5, sampling=Sampling(temperature=0))[0]) == 5


@pytest.fixture(scope="module")
def experts(small: Small) -> list[str]:
    """With a run `experts` of six steps on two expert-parallel ranks; its options."""
    options = [*layout(1, 1, 2, 2), "trainer.max_steps=6", "log.ckpt.every_steps=2"]
    small.train("experts", *options, ranks=2, recipe=recipe(small, "experts"))
    return options


def test_killed_and_resumed_is_straight_and_so_is_a_step_that_is_run_again(small: Small, experts: list[str]) -> None:
    """The first run of step 3 has NaN in front of the router of one rank, and its update of the bias must not stay."""
    killed = recipe(small, "experts_killed")
    small.train("experts_killed", *experts, "kill=5", ranks=2, recipe=killed, check=False)
    assert "resumed at step 4" in small.train("experts_killed", *experts, ranks=2, recipe=killed).stdout
    again = recipe(small, "experts_again")
    small.train("experts_again", *experts, "poison=3:output_once:1", ranks=2, recipe=again)
    assert_same(small, "experts", "experts_killed")
    for name in ("experts_killed", "experts_again"):
        assert small.steps(name) == small.steps("experts")
        assert small.same_tensors("experts", name, 6)
    steps = {step.step: step for step in read_steps(small.run_dir("experts") / STEPS)[0]}
    loads = [step.metrics["expert_load"] for step in steps.values()]
    assert all(1 <= load <= 2 for load in loads), "of 4 experts a token passes 2"
    assert all(0.9 < step.metrics["balance_loss"] < 2 for step in steps.values())
    assert steps[6].loss < steps[1].loss
    record = json.loads((small.run_dir("experts") / "run.json").read_text())
    assert record["metrics"]["expert_load"] == loads[-1]
    assert (record["layout"]["expert"], record["settings"]["experts.bias_update"]) == (2, 1e-3)


def adapted(small: Small, name: str, adapter: str) -> Path:
    """A recipe that fine-tunes `experts` with adapters."""
    file = sft_recipe(small, name)
    text = file.read_text().replace(str(small.run_dir("straight")), str(small.run_dir("experts")))
    for before, after in CHANGES:
        text = text.replace(before, after)
    file.write_text(f"{text}adapter: {{{adapter}}}\n")
    return file


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("all", "kind: dora, targets: [in_proj, experts.linear_fc1, experts.linear_fc2, shared_experts.linear_fc1]"),
        # Megatron's optimizer of all other weights then has none
        ("alone", "kind: lora, dropout: 0.1, targets: [experts.linear_fc1]"),
    ],
    ids=["all", "alone"],
)
def test_adapters_of_experts_resume_exactly(
    small: Small, talk: Small, experts: list[str], name: str, adapter: str
) -> None:
    """Their checkpoints have neither experts nor correction biases: these are the base's, and stay. Written by two
    expert-parallel ranks, one rank loads the same.
    """
    options = [*layout(1, 1, 2, 2), "trainer.max_steps=4", "log.ckpt.every_steps=2"]
    runs = (f"lora_{name}", f"lora_{name}_killed")
    for run, kills in zip(runs, ([[]], [["kill=3"], []]), strict=True):
        file = adapted(small, run, f"rank: 4, alpha: 8, {adapter}")
        for kill in kills:
            small.train(run, *options, *kill, ranks=2, recipe=file, check=not kill)
    assert_same(small, *runs)
    assert small.same_tensors(*runs, 4)
    base, tuned = (load_model(small.run_dir(run)).layers[4] for run in ("experts", runs[0]))
    assert torch.equal(base.bias, tuned.bias)
    assert torch.equal(base.shared_down, tuned.shared_down)
    assert not any(torch.equal(one, other) for one, other in zip(base.up, tuned.up, strict=True))
    copy = small.folder / f"lora_{name}_on_one"
    last = ["trainer.max_steps=5", "log.ckpt.keep=-1", f"copy={copy}"]
    small.train(runs[0], *layout(1, 1, 1, 1), *last, recipe=small.folder / f"{runs[0]}.yaml")
    assert small.same_checkpoints((copy, small.run_dir(runs[0]) / "checkpoints/step-000004"))


def of_experts(small: Small, file: Path, *changes: tuple[str, str]) -> Path:
    """Change a recipe of another stage: it starts from `experts`, or has that run as its teacher."""
    text = file.read_text().replace(str(small.run_dir("straight")), str(small.run_dir("experts")))
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    file.write_text(text)
    return file


def biases(small: Small, name: str) -> torch.Tensor:
    """Return the correction biases [experts] of the layer with experts at the end of a run."""
    (found,) = (w.bias for w in load_model(small.run_dir(name)).layers if hasattr(w, "bias"))
    return found


def balance_losses(small: Small, name: str) -> list[float]:
    return [step.metrics["balance_loss"] for step in read_steps(small.run_dir(name) / STEPS)[0]]


def test_preference_has_the_biases_of_its_start_as_reference(small: Small, experts: list[str]) -> None:
    """The resumed run has lost its cache, and computes the reference again before it takes its own weights and biases.
    Two expert-parallel ranks are one.
    """
    write_pairs(small)
    root = small.folder / "experts_data"  # other tests count the caches of theirs
    shutil.copytree(small.folder / "data", root, ignore=shutil.ignore_patterns(".reference"))
    fp32, two = "trainer.plugins.name=fp32", layout(1, 1, 2, 2)
    files = {name: preference_recipe(small, name) for name in ("experts_dpo", "experts_dpo_killed", "experts_dpo_one")}
    for file in files.values():
        of_experts(small, file, *CHANGES, (f"root: {small.folder / 'data'}", f"root: {root}"))
    small.train("experts_dpo", fp32, *two, ranks=2, recipe=files["experts_dpo"])
    killed = files["experts_dpo_killed"]
    small.train("experts_dpo_killed", fp32, *two, "kill=4", ranks=2, recipe=killed, check=False)
    shutil.rmtree(root / "pairs/.reference")
    said = small.train("experts_dpo_killed", fp32, *two, ranks=2, recipe=killed).stdout
    assert "computing them" in said
    assert "resumed at step 3" in said
    assert_same(small, "experts_dpo", "experts_dpo_killed")  # the hash of the reference too
    assert small.same_tensors("experts_dpo", "experts_dpo_killed", 6)
    small.train("experts_dpo_one", fp32, "trainer.max_steps=2", recipe=files["experts_dpo_one"])
    one, two = small.steps("experts_dpo_one"), small.steps("experts_dpo")
    assert float.fromhex(two[1]["margin"]) == 0
    assert float.fromhex(two[6]["margin"]) > 0.5
    for step, key in ((step, key) for step in one for key in ("loss", "margin", "grad_norm")):
        ours, theirs = (float.fromhex(of[step][key]) for of in (two, one))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), (step, key)
    moved = (biases(small, "experts_dpo") - biases(small, "experts")).abs()
    assert 0 < float(moved.max()) <= 6e-3 + 1e-6
    assert all(0.9 < loss < 2 for loss in balance_losses(small, "experts_dpo"))


def test_a_teacher_s_experts_stay_as_they_are(small: Small, experts: list[str]) -> None:
    """A dense student learns of them what it learns of their logits, written before the run; with one that is the
    teacher's own copy there is nothing to learn.
    """
    names = ("experts_kd", "experts_kd_stored", "experts_kd_self")
    files = {name: of_experts(small, distill_recipe(small, name)) for name in names}
    cache = small.folder / "experts_logits"
    small.train("experts_kd", recipe=files["experts_kd"])
    small.command("experts_logits", "distill-cache", str(files["experts_kd"]), f"distill.teacher_logits={cache}")
    small.train("experts_kd_stored", f"model.config.teacher_logits={cache}", recipe=files["experts_kd_stored"])
    assert losses(small, "experts_kd_stored") == losses(small, "experts_kd")
    assert losses(small, "experts_kd")[-1] < losses(small, "experts_kd")[0]

    before, rest = files["experts_kd_self"].read_text().split("model:\n")
    teacher = small.run_dir("experts")
    text = f"{before}model: {teacher}\ninit: {{checkpoint: {teacher}}}\n{rest[rest.index('data:') :]}"
    files["experts_kd_self"].write_text(text)
    small.train("experts_kd_self", *SHORT, *layout(1, 1, 2, 2), ranks=2, recipe=files["experts_kd_self"])
    assert losses(small, "experts_kd_self")[0] == 0


SHORT = ("trainer.max_steps=2", "optim.warmup_steps=1", "data.horizon_steps=6")
STUDENT = (
    ("family: nemotron_h", "family: pruned"),
    ("pattern: M*-", "pattern: M*E"),
    ("ffn_hidden_size: 64\n", WIDTHS[WIDTHS.index("num_experts") :].replace("hidden_size: 48", "hidden_size: 24")),
    ("ffn: 1, parameters: 116568", "ffn: 0, experts: 1, parameters: 129116, active: 122972"),
)


def test_a_student_with_experts(small: Small, experts: list[str], straight: dict) -> None:
    """On two expert-parallel ranks: killed and resumed it is straight. A dense teacher may be beside it."""
    names = ("experts_student", "experts_student_killed")
    two = layout(1, 1, 2, 2)
    for name, kills in zip(names, ([[]], [["kill=4"], []]), strict=True):
        file = of_experts(small, distill_recipe(small, name), *STUDENT)
        for kill in kills:
            small.train(name, *two, *kill, ranks=2, recipe=file, check=not kill)
    assert_same(small, *names)
    assert small.same_tensors(*names, 6)
    assert losses(small, names[0])[-1] < losses(small, names[0])[0]
    assert 0 < float(biases(small, names[0]).abs().max()) <= 6e-3 + 1e-6
    assert all(0.9 < loss < 2 for loss in balance_losses(small, names[0]))
    of_a_dense = distill_recipe(small, "experts_of_a_dense", *STUDENT)
    small.train("experts_of_a_dense", *two, *SHORT, ranks=2, recipe=of_a_dense)
    assert losses(small, "experts_of_a_dense")[1] < losses(small, "experts_of_a_dense")[0]
