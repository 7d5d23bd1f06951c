"""The recipe that a run writes runs again: the same configuration, the same losses bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
from small_run import Small

from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow
OF_THE_RECIPE = ["optim.peak_lr=2e-2", "data.seed=7"]
BESIDE = ["trainer.max_steps=3", "optim.warmup_steps=1"]


def test_the_recipe_of_a_run_reproduces_it(small: Small) -> None:
    small.train("first", *OF_THE_RECIPE, *BESIDE)
    written = small.run_dir("first") / "recipe.yaml"
    beside = small.run_dir("first") / "checkpoints" / "step-000003" / "recipe.yaml"
    first = compose(str(written))
    assert first == compose(str(beside))
    assert dataclasses.replace(first, overrides=[]) == compose(str(small.recipe("first")), OF_THE_RECIPE)
    assert first.overrides == BESIDE

    elsewhere = f"log.explicit_log_dir={small.run_dir('second')}"
    small.train("second", elsewhere, recipe=written)
    assert small.steps("second") == small.steps("first")
    assert sorted(small.steps("first")) == [1, 2, 3]
    second = compose(str(small.run_dir("second") / "recipe.yaml"))
    assert second == dataclasses.replace(first, overrides=[*BESIDE, elsewhere])
