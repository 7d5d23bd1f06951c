"""Train the shrunken twins of recipes, one after the other in this process: `twins.py FOLDER RECIPE...`.

A twin is the recipe with small widths, the head of its pattern, a small vocabulary and one rank; its family, precision,
schedule and optimizer stay. Each writes the losses of its three steps to `FOLDER/losses.jsonl`; recipes whose twins
differ in rates and multipliers alone have one of them trained for all.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

from nemotron_h.platform import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from megatron.core import num_microbatches_calculator, parallel_state  # noqa: E402

from nemotron_h.architecture.blocks.registry import KINDS  # noqa: E402
from nemotron_h.architecture.definition import Expect, ModelDefinition  # noqa: E402
from nemotron_h.data.blend import load_blend  # noqa: E402
from nemotron_h.data.prepare.pipeline import prepare  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.training.stages.pretrain import build  # noqa: E402

STEPS, BATCH, LENGTH, VOCABULARY = 3, 2, 32, 512
#: 16 divides every product's sizes, as FP8 wants it
SMALL = {
    "hidden_size": 64,
    "vocab_size": VOCABULARY,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
    "mamba_num_heads": 16,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden_size": 32,
    "shared_expert_hidden_size": 64,
    "expert_scaling": 2.5,
}
BLEND = f"""
name: words
tokenizer: {{kind: bpe, vocab_size: {VOCABULARY}}}
sources:
  words: {{category: web, format: jsonl, path: words.jsonl, licence: ours, validation: 0.2}}
phases:
  - {{name: all, weights: {{web: 100}}}}
"""


class Losses(pl.Callback):
    """Keeps the loss of every step, and the share of weight tensors that training changed."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moved = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = [weight.detach().clone() for weight in pl_module.parameters()]

    def on_train_end(self, trainer, pl_module) -> None:
        moved = [not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True)]
        self.moved = sum(moved) / len(moved)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))


def head_of(family: str, pattern: str) -> str:
    """The pattern's head that follows its family's rules: to the first attention layer and its FFN, or two pairs."""
    if family == "nemotron_h":
        return pattern[: pattern.index("*") + 2]
    return pattern[:4]


def shrunken(name: str) -> list[str]:
    """The overrides that make a recipe's twin."""
    recipe = compose(name)
    model, pattern = recipe.model, head_of(recipe.model.family, recipe.model.pattern)
    needed = {"hidden_size", "vocab_size", *(key for letter in pattern for key in KINDS[letter].widths)}
    widths = {key: value for key, value in SMALL.items() if key in needed}
    kept = ("family", "conv_kernel", "position_embedding", "rope_base", "rope_percent", "norm_epsilon", "init_std")
    kept += ("mamba_norm", "multipliers", "tied_embeddings")
    nothing = {key: 0 for kind in KINDS.values() for key in kind.widths}
    shape = {**nothing, **widths, **{key: getattr(model, key) for key in kept}, "pattern": pattern}
    expect = asdict(ModelDefinition(name="twin", expect=Expect(), **shape).counts())
    step = BATCH * LENGTH
    values = {
        **{f"model.{key}": value for key, value in widths.items()},
        "model.pattern": f"'{pattern}'",  # a bare * is YAML's sign of an alias
        **{f"model.expect.{key}": value for key, value in expect.items()},
        "tokens": STEPS * step,
        "data.seq_length": LENGTH,
        "data.global_batch_size": BATCH,
        "data.micro_batch_size": 1,
        "optim.warmup_tokens": step,
        **({"optim.decay_tokens": step} if recipe.optim.decay_tokens else {}),
        **{f"parallel.{key}": 1 for key in ("nodes", "devices", "tensor", "pipeline", "expert")},
        "parallel.sequence": "false",
        "log.validate_every_steps": STEPS,
        "log.validation_batches": 0,
        "log.trackers": "[]",
    }
    return [f"{key}={value}" for key, value in values.items()]


def kind_of(name: str) -> tuple[str, ...]:
    """What a recipe's twin is, but for numbers."""
    recipe = compose(name)
    model, optim = recipe.model, recipe.optim
    parts = (optim.name, optim.schedule, optim.moments, optim.gradients, recipe.precision)
    return (model.family, head_of(model.family, model.pattern), model.position_embedding, *parts)


def data_in(folder: Path) -> Path:
    """A prepared blend of a few hundred made-up documents; the blend's file."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghstuvwxyz", k=rng.randint(2, 6))) for _ in range(80)]
    documents = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(200)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    blend = folder / "words.yaml"
    blend.write_text(BLEND)
    prepare(load_blend(blend), folder / "data", workers=1)
    return blend


def train(name: str, blend: Path, folder: Path) -> Losses:
    """What the twin's three steps did."""
    places = [f"data.blend={blend}", f"data.root={folder / 'data'}", f"log.dir={folder / 'runs'}"]
    task = build(compose(name, [*shrunken(name), *places]))
    losses = Losses()
    task.trainer.callbacks.append(losses)
    fdl.build(task)()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    return losses


def main(folder: Path, names: list[str]) -> None:
    """Prepare, then train every twin."""
    blend = data_in(folder)
    trained: dict[tuple[str, ...], Losses] = {}
    for name in names:
        kind = kind_of(name)
        seen = trained[kind] = trained.get(kind) or train(name, blend, folder)
        record = {"recipe": name, "losses": seen.losses, "moved": seen.moved}
        with (folder / "losses.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
