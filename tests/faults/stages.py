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
TOKENS = "tokens: 6144 # 12 steps"

COMPRESSION = """
stage: minipuzzle
tokens: 2048 # 4 steps
minipuzzle:
  parent: {parent}
  layer_samples: 2
  neuron_samples: 4
  grid: {{mamba: [1, 2], ffn: [1, 2], ffn_hidden_size: [64, 96]}}
  budget: {{parameters: 140K, least_parameters: 110K}}
  score_tokens: 512
  keep: 2
  short: 2
  short_tokens: 1024
"""


def _two_ranks(small: Small, name: str) -> Path:
    patience = f"trainer.strategy.collective_timeout='00:00:{PATIENCE_S}'"
    return small.variant(name, (TOKENS, f'{TOKENS}\nparallel: {{devices: 2}}\noverrides: ["{patience}"]'))


def _compression(small: Small, name: str) -> Path:
    return small.variant(
        name,
        ("- /base/pretrain", "- /base/distill"),
        (TOKENS, COMPRESSION.format(parent=small.run_dir("straight"))),
        ("1e-2, final_lr: 1e-4, warmup_tokens: 1024", "3e-3, final_lr: 1e-4, warmup_tokens: 512"),
        ("every_steps: 4", "every_steps: 2"),
    )


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: of the stage; "_" stands for a blank in tables.
        recipe: writes that of a run by its name; None prepares data.
        entry: of `nemo llm`; "minipuzzle" of `nemotron-h`.
        every: steps between checkpoints.
        data: writes and prepares what it reads, beside the texts.
        blend: that it reads.
        outside: the installed command in a process of its own, disturbed by signals, files and limits alone.
        disk: size of the file system that fills: three checkpoints and what is beside them.
        place: name that all its runs have, one after the other: their files say where they lie.
    """

    name: str
    recipe: Callable[[Small, str], Path] | None
    entry: str = "pretrain"
    ranks: int = 1
    steps: int = 12
    every: int = 4
    data: Callable[[Small], None] | None = None
    blend: str = "words"
    outside: bool = False
    disk: str = "12m"
    place: str = ""

    @property
    def trains(self) -> bool:
        """Tell whether it is one run with checkpoints of its own."""
        return self.recipe is not None and self.entry != "minipuzzle"

    @property
    def twin(self) -> str:
        """Return the stage whose undisturbed run is its own too."""
        return self.name.removeprefix("nemo_")

    def command(self, small: Small, name: str) -> list[str]:
        """Return the command of a run, and write its recipe."""
        if self.recipe is None:
            root = str(small.folder / name)
            return ["nemotron-h", "data", "prepare", "--blend", str(small.folder / "words.yaml"), "--root", root]
        path = self.recipe(small, name)
        path.write_text(path.read_text().replace("micro_batch_size: 2", "micro_batch_size: 4"))  # half the time
        if not self.trains:
            return ["nemotron-h", "minipuzzle", str(path)]
        return ["nemo", "llm", self.entry, "--factory", f"nemotron_h_recipe(path={path})", "--yes"]

    def folder(self, small: Small, name: str) -> Path:
        """Return the folder that a run writes."""
        return small.folder / name / ("words" if self.recipe is None else "small")


TUNING = {"steps": TUNING_STEPS, "every": 3, "data": write_talk, "blend": "talk"}
STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", Small.recipe),
        Stage("pretrain_2_ranks", _two_ranks, ranks=2),
        Stage("sft", sft_recipe, "finetune", **TUNING),
        Stage("preference", preference_recipe, "finetune", 1, PREFERENCE_STEPS, 3, write_pairs, "pairs"),
        Stage("distill", distill_recipe, "distill", steps=DISTILL_STEPS, every=3),
        Stage("prepare", None, steps=0),
        Stage("minipuzzle", _compression, "minipuzzle", steps=2, every=2, disk="240m", place="puzzle"),
        Stage("nemo_pretrain", Small.recipe, outside=True),
        Stage("nemo_sft", sft_recipe, "finetune", outside=True, **TUNING),
    )
}
