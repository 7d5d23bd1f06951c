"""Stages of a campaign: small runs of each, undisturbed ones to compare with, and the commands that make them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from small_run import (
    DISTILL_STEPS,
    PREFERENCE_STEPS,
    TUNING_STEPS,
    Small,
    distill_recipe,
    preference_recipe,
    sft_recipe,
    write_pairs,
    write_talk,
)

#: a rank that waits longer for another gives up
PATIENCE_S = 15


def _two_ranks(small: Small, name: str) -> Path:
    patience = f"trainer.strategy.collective_timeout='00:00:{PATIENCE_S}'"
    tokens = "tokens: 6144 # 12 steps"
    return small.variant(name, (tokens, f'{tokens}\nparallel: {{devices: 2}}\noverrides: ["{patience}"]'))


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        recipe: writes that of a run by its name; None prepares data.
        entry: of `nemo llm`.
        data: writes and prepares what it reads, beside the texts.
    """

    name: str
    recipe: Callable[[Small, str], Path] | None
    entry: str = "pretrain"
    ranks: int = 1
    steps: int = 12
    every: int = 4
    data: Callable[[Small], None] | None = None

    def command(self, small: Small, name: str) -> list[str]:
        """Return the command of a run, and write its recipe."""
        if self.recipe is None:
            root = str(small.folder / name)
            return ["nemotron-h", "data", "prepare", "--blend", str(small.folder / "words.yaml"), "--root", root]
        return ["nemo", "llm", self.entry, "--factory", f"nemotron_h_recipe(path={self.recipe(small, name)})", "--yes"]

    def folder(self, small: Small, name: str) -> Path:
        """Return the folder that a run writes."""
        return small.folder / name / ("words" if self.recipe is None else "small")


STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", Small.recipe),
        Stage("pretrain, 2 ranks", _two_ranks, ranks=2),
        Stage("sft", sft_recipe, "finetune", steps=TUNING_STEPS, every=3, data=write_talk),
        Stage("preference", preference_recipe, "finetune", steps=PREFERENCE_STEPS, every=3, data=write_pairs),
        Stage("distill", distill_recipe, "distill", steps=DISTILL_STEPS, every=3),
        Stage("prepare", None, steps=0),
    )
}
