"""The part `hybridise` of a recipe: attention becomes Mamba-2 in rounds. Imports no torch, NeMo or Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.ranges import COUNT, WIDTH

#: values of keys of `HybridiseSchema`
CHOICES = ("every", "kl")
STARTS = ("transplant", "random")


@dataclass
class MixersSchema:
    """Training of each new mixer by itself, on what the attention in its place reads.

    Attributes:
        matrices: tokens on which its matrix learns the attention's (MOHAWK, 2408.10189, the first stage); null is none.
        mixers: tokens on which its output then learns the attention's (the second stage); null is none.
        batch: windows of a step.
        lr: at the start of each; it falls to 0 as a cosine.
    """

    matrices: str | None = None
    mixers: str | None = None
    batch: int = number(16, least=1, most=COUNT)
    lr: float = number(1e-3, above=0, most=1)


@dataclass
class GenerationSchema:
    """Scenario that throughput and states are of.

    Attributes:
        batch, prompt, output: sequences at once, tokens that each reads, tokens that each generates.
    """

    batch: int = number(least=1, most=COUNT)
    prompt: int = number(least=1, most=COUNT)
    output: int = number(least=1, most=COUNT)


@dataclass
class HybridiseSchema:
    """A hybrid of a Transformer: the recipe's model is the parent, its data, optimizer and length are those of each
    round's distillation.

    Attributes:
        parent: a run's folder, one of its checkpoints, or one of the Hub, as `init.checkpoint`.
        attention: shares of the parent's attention layers that stay, one of each round, falling. Each round begins with
            what the one before it made.
        choice: which stay, of those that are still there: `every` spreads them evenly, the last one stays; `kl` lets
            those go in whose place a mixer moves the next token's distribution least.
        groups: of every mixer; null is one for each query head.
        start: mixers begin from the attention's weights, `transplant`, or, as a control, from sampled projections,
            `random`.
        local: training of each mixer by itself.
        frozen_tokens: of a distillation before each round's own, in which mixers alone train; null is none.
        frozen_lr: its peak; `optim.final_lr` falls with it. Null is `optim.peak_lr`.
        score_tokens: held-out tokens that choices are made on, and as many others that the report is of.
        generation: what throughput is measured on.
        then: recipes of stage sft or preference, by name or path: each begins from the result before it.
    """

    parent: str = MISSING
    attention: list[float] = field(default_factory=list, metadata=within(least=0, below=1))
    choice: str = "every"
    groups: int | None = number(None, least=1, most=WIDTH)
    start: str = "transplant"
    local: MixersSchema = field(default_factory=MixersSchema)
    frozen_tokens: str | None = None
    frozen_lr: float | None = number(None, above=0, most=10)
    score_tokens: str = MISSING
    generation: GenerationSchema = field(default_factory=GenerationSchema)
    then: list[str] = field(default_factory=list)
