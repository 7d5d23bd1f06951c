"""Runs with images whose projector alone trains, the paper's first stage: resumed = straight, the rest stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import Small, assert_same
from test_frozen import weights

from nemotron_h.checkpoint.index import read_index
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow

STEPS = 6
VISION = """init_std: 0.1
  vision: {name: small, num_layers: 1, hidden_size: 24, ffn_hidden_size: 40, num_attention_heads: 4, image_size: 16,
           patch_size: 4, qkv_bias: true, init_std: 0.1, layer_scale: 1.0}"""
CHANGES = (
    ("tokens: 6144 # 12 steps", "tokens: 3072"),
    ("every_steps: 4", "every_steps: 2"),
    ("init_std: 0.1", VISION),
    # layers: four matrices, seven biases, LayerScale and norms; patches, class token, positions
    (
        "parameters: 163376",
        f"parameters: 163376, vision: {4 * 24 * 24 + 2 * 24 * 40 + 11 * 24 + 40 + 24 * (48 + 1 + 1 + 17)}",
    ),
    ("peak_lr: 1e-2,", "frozen: [vision, language], peak_lr: 1e-2,"),
)
WORKER = Path(__file__).with_name("image_worker.py")


def test_straight_equals_resumed_and_the_projector_alone_trains(small: Small) -> None:
    names = ("images", "images_killed")
    recipes = [small.variant(name, *CHANGES) for name in names]
    small.train("images", recipe=recipes[0], program=WORKER)
    small.train("images_killed", "kill=3", check=False, recipe=recipes[1], program=WORKER)
    assert "resumed at step 2" in small.train("images_killed", recipe=recipes[1], program=WORKER).stdout
    assert_same(small, *names)
    assert small.same_tensors(*names, STEPS)
    first, last = (weights(small.run_dir("images") / f"checkpoints/step-{step:06d}") for step in (STEPS - 2, STEPS))
    trained = {"projector.norm.weight", "projector.linear_fc1.weight", "projector.linear_fc2.weight"}
    assert {name for name in first if not first[name].equal(last[name])} == trained
    assert {name for name in first if name.startswith("vision.")}
    keys = read_index(small.run_dir("images") / f"checkpoints/step-{STEPS:06d}/weights").state_dict_metadata
    states = {key.split(".", 3)[3] for key in keys if key.startswith("optimizer.state.")}
    assert {name.removeprefix("module.") for name in states} == trained
    assert make_plan(compose(str(recipes[0]))).trained == sum(first[name].numel() for name in trained)
