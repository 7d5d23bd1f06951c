"""A compression of a tiny model in seconds: text, a trained parent, a recipe, and runs that start in no time."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from forks import Forks
from rich.console import Console
from small_run import TALK, WORKER

from nemotron_h.core.errors import UserError
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run, write_recipe
from nemotron_h.recipe.compose import compose

BLEND = """
name: words
tokenizer: {kind: bpe, vocab_size: 300}
sources:
  low: {category: web, format: jsonl, path: low.jsonl, licence: ours, validation: 0.3}
  high: {category: math, format: jsonl, path: high.jsonl, licence: ours, validation: 0.3}
phases:
  - {name: all, weights: {web: 60, math: 40}}
"""

MODEL = """
model:
  name: tiny
  family: nemotron_h
  pattern: M-M*-M-
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 8
  mamba_num_heads: 8
  mamba_head_dim: 8
  mamba_num_groups: 2
  mamba_state_dim: 16
  vocab_size: 300
  conv_kernel: 4
  init_std: 0.1
  expect: {mamba: 3, attention: 1, ffn: 3, parameters: 62344}
"""

SHARED = """
precision: bf16
data: {{blend: {folder}/words.yaml, root: {folder}/data, seq_length: 32, global_batch_size: 8, micro_batch_size: 8}}
log: {{dir: {folder}/runs, validate_every_steps: 100, validation_batches: 1}}
"""

PARENT = """
# @package _global_
defaults: [/base/pretrain, _self_]
name: parent
tokens: 15360 # 60 steps
optim: {peak_lr: 1e-2, final_lr: 1e-3, warmup_tokens: 1024}
checkpoint: {every_steps: 60}
"""

COMPRESSION = """
# @package _global_
defaults: [/base/distill, _self_]
name: small
stage: minipuzzle
tokens: 2048 # 8 steps
optim: {{peak_lr: 3e-3, final_lr: 1e-4, warmup_tokens: 256}}
checkpoint: {{every_steps: 2}}
minipuzzle:
  parent: {folder}/runs/parent
  layer_samples: 4
  neuron_samples: 8
  grid: {{mamba: [2, 3], ffn: [2, 3], ffn_hidden_size: [32, 48]}}
  budget: {{parameters: 52K, least_parameters: 44K}}
  score_tokens: 512
  keep: 4
  short: 2
  short_tokens: 1024
"""


@functools.cache
def composed(recipe_file: Path, overrides: tuple[str, ...]):
    """The recipe; composing it takes longer than most stages."""
    return compose(str(recipe_file), overrides)


def words(rng: random.Random, letters: str, documents: int) -> list[str]:
    """Documents of made-up words."""
    known = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(40)]
    return [" ".join(rng.choices(known, k=rng.randint(5, 60))) for _ in range(documents)]


@dataclass
class Tiny:
    """A folder with prepared text, a trained parent in `runs/parent`, and the recipe of its compression.

    Attributes:
        options: of `worker.py`, for the runs that `launch` starts from now on, by the run's name.
        started: names of the runs that it started.
        of_the_whole: those of the whole pipeline, in which nothing was done yet.
    """

    folder: Path
    forks: Forks
    options: dict[str, list[str]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    of_the_whole: tuple[str, ...] = ()

    @property
    def recipe_file(self) -> Path:
        """Of the compression, whose folder is `runs/small`."""
        return self.folder / "small.yaml"

    @property
    def root(self) -> Path:
        """Of the compression."""
        return self.folder / "runs" / "small"

    def made(self, *overrides: str, **arguments: object):
        """The compression, ready to run; what it says goes to `console.file` of it."""
        from nemotron_h.compression.minipuzzle import MiniPuzzle

        recipe = copy.deepcopy(composed(self.recipe_file, overrides))
        return MiniPuzzle(recipe, Console(file=io.StringIO(), width=300), **arguments)

    def train(self, recipe_file: Path, *options: str) -> None:
        """Run a recipe, as `nemo llm` does."""
        code = self.forks.run(str(WORKER), str(recipe_file), *options, folder=recipe_file.parent, name=recipe_file.stem)
        if code:
            said = recipe_file.with_suffix(".err").read_text()
            raise UserError(f"{recipe_file.stem} ended with exit code {code}: {said[-3000:]}")

    def prepare_talk(self) -> None:
        """Conversations, as blend `talk.yaml`."""
        lines = words(random.Random(2), "abcdefgh", 200)
        talks = [
            {"messages": [{"role": "user", "content": a[:40]}, {"role": "assistant", "content": b[:60]}]}
            for a, b in zip(lines[::2], lines[1::2], strict=True)
        ]
        (self.folder / "talk.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
        (self.folder / "talk.yaml").write_text(TALK)
        prepared(self.folder, "talk")

    def launch(self, run: Run, title: str, steps: int, console: Console, place: Place = HERE) -> None:
        """In place of `launch.runs.train`, which pays half a minute of imports."""
        self.started.append(run.name)
        write_recipe(run)
        self.train(run.recipe_file, *self.options.get(run.name, []))

    def launch_several(self, runs: list[tuple[Run, int]], at_once: int, console: Console, env: object) -> None:
        """In place of `launch.several.train_several`."""
        assert 1 < at_once <= len(runs)
        for run, steps in runs:
            self.launch(run, run.name, steps, console)


def prepared(folder: Path, name: str) -> None:
    """Prepare the blend `<name>.yaml`."""
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.prepare.pipeline import prepare

    blend = load_blend(str(folder / f"{name}.yaml"))
    prepare(blend, root=folder / "data", workers=1, console=Console(file=io.StringIO()))


def write(folder: Path, forks: Forks) -> Tiny:
    """Prepare the text, write the recipes and train the parent."""
    rng = random.Random(1)
    for name, letters in (("low", "abcdefgh"), ("high", "stuvwxyz")):
        lines = [json.dumps({"text": text}) + "\n" for text in words(rng, letters, 200)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "words.yaml").write_text(BLEND)
    prepared(folder, "words")
    shared = MODEL + SHARED.format(folder=folder)
    (folder / "parent.yaml").write_text(PARENT + shared)
    (folder / "small.yaml").write_text(COMPRESSION.format(folder=folder) + shared)
    made = Tiny(folder, forks)
    made.train(folder / "parent.yaml")
    return made
