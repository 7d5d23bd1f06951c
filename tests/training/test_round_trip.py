"""The recipe that a run writes runs again: the same configuration, the same losses bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
from small_run import Small

from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow
CHANGED = ["trainer.max_steps=3", "optim.peak_lr=2e-2", "optim.warmup_steps=1", "data.seed=7"]


def test_the_recipe_of_a_run_reproduces_it(small: Small) -> None:
    small.train("first", *CHANGED)
    written = small.run_dir("first") / "recipe.yaml"
    beside = small.run_dir("first") / "checkpoints" / "step-000003" / "recipe.yaml"
    first = compose(str(written))
    assert first == compose(str(beside))
    assert dataclasses.replace(first, overrides=[]) == compose(str(small.recipe("first")))
    assert first.overrides == CHANGED

    elsewhere = f"log.explicit_log_dir={small.run_dir('second')}"
    small.train("second", elsewhere, recipe=written)
    assert small.steps("second") == small.steps("first")
    assert sorted(small.steps("first")) == [1, 2, 3]
    second = compose(str(small.run_dir("second") / "recipe.yaml"))
    assert second == dataclasses.replace(first, overrides=[*CHANGED, elsewhere])
