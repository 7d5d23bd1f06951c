"""A model with experts trains; a checkpoint of any layout continues in any other, correction biases and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import Small, assert_same, sft_recipe

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


def test_adapters_of_shared_experts_resume_exactly(small: Small, talk: Small, experts: list[str]) -> None:
    """Their checkpoints have neither experts nor correction biases: these are the base's, and stay."""
    options = [*layout(1, 1, 2, 2), "trainer.max_steps=4", "log.ckpt.every_steps=2"]
    runs = ("experts_lora", "experts_lora_killed")
    for name, kills in zip(runs, ([[]], [["kill=3"], []]), strict=True):
        file = sft_recipe(small, name)
        text = file.read_text().replace(str(small.run_dir("straight")), str(small.run_dir("experts")))
        for before, after in CHANGES:
            text = text.replace(before, after)
        targets = "[in_proj, shared_experts.linear_fc1, shared_experts.linear_fc2]"
        file.write_text(f"{text}adapter: {{kind: lora, rank: 4, alpha: 8, targets: {targets}}}\n")
        for kill in kills:
            small.train(name, *options, *kill, ranks=2, recipe=file, check=not kill)
    assert_same(small, *runs)
    assert small.same_tensors(*runs, 4)
    base, adapted = (load_model(small.run_dir(name)) for name in ("experts", "experts_lora"))
    assert torch.equal(base.layers[4].bias, adapted.layers[4].bias)
    assert torch.equal(base.layers[4].up, adapted.layers[4].up)
    assert not torch.equal(base.layers[4].shared_up, adapted.layers[4].shared_up)
