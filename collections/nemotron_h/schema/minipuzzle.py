"""The part `minipuzzle` of a recipe: a compression. Imports no torch, NeMo or Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.ranges import COUNT, WIDTH

#: values of keys of `MiniPuzzleSchema`
METRICS = ("mse", "kl")
ORDERS = ("importance", "random", "reversed")
SPEEDS = ("modelled", "measured")
STARTS = ("pruned", "short")


@dataclass
class GridSchema:
    """Axes in which the candidates of a compression vary: each a list of values; an empty one keeps the parent's.

    Attributes:
        attention, mamba, ffn: how many layers of a type stay.
        depth: how many layers stay in all: the most important of the types that have no list of their own.
        ffn_hidden_size: inner width of every feed-forward layer.
        hidden_size, mamba_num_heads, mamba_head_dim: further widths, as Minitron-SSM (2504.11409) prunes them.
        num_experts: routed experts of every mixture; a token passes as many as before.
        expert_hidden_size, shared_expert_hidden_size: inner widths of each routed expert, and of the shared one.
    """

    attention: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    mamba: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    ffn: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    depth: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    ffn_hidden_size: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    hidden_size: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    mamba_num_heads: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    mamba_head_dim: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    num_experts: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    expert_hidden_size: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))
    shared_expert_hidden_size: list[int] = field(default_factory=list, metadata=within(least=0, most=WIDTH))


@dataclass
class BudgetSchema:
    """Cost that a candidate may have: memory of inference, parameters, or both.

    Attributes:
        memory_gib: most GiB of weights, keys and values, and states, for `sequences` of `context` tokens.
        parameters: most parameters; an integer, or text such as 4.5B.
        least_parameters: fewest parameters: smaller candidates are not looked at.
        context, sequences: of the memory.
        weights, kv_cache, states: precisions of the memory: fp32, bf16, fp8 or fp4.
        speedup: least tokens per second of generation over the parent's; null asks for none.
        speedup_by: `modelled` (bytes that a token reads: weights, keys and values, states), or `measured` here.
    """

    memory_gib: float | None = number(None, above=0, most=1e9)
    parameters: str | None = None
    least_parameters: str | None = None
    context: int | None = number(None, least=1, most=COUNT)
    sequences: int = number(1, least=1, most=COUNT)
    weights: str = "bf16"
    kv_cache: str = "bf16"
    states: str = "fp32"
    speedup: float | None = number(None, above=0, most=1e6)
    speedup_by: str = "modelled"


@dataclass
class MiniPuzzleSchema:
    """A compression: the recipe's model is the parent, its data, optimizer and length are those of the distillation.

    Attributes:
        parent: a run's folder, one of its checkpoints, or one of the Hub, as `init.checkpoint`.
        layer_samples, neuron_samples: sequences of the training data that importance is measured on.
        layer_metric: what removing a layer changes: `mse` of the activations before the output, or `kl` of the logits.
        order: what stays: the most important (`importance`), or the control of a report, `random` or `reversed`.
        grid, budget: which candidates there are.
        score_tokens: held-out tokens that every candidate is scored on, and as many others that the report is of.
        keep: how many of the best are looked at further, by accuracy and agreement with the parent.
        evaluate: a command that prints a JSON object of task scores in its last line, `{checkpoint}` standing for the
            checkpoint; it then chooses `short` of the `keep`, and the winner. Null: the rank chooses, and the accuracy
            after the short distillation. It runs where it is typed, or with `--allow-evaluate`.
        short: how many candidates are distilled for a short time.
        short_tokens: length of each of those.
        start: the long distillation starts from the `pruned` winner, or from its `short` distillation.
    """

    parent: str = MISSING
    layer_samples: int = number(least=1, most=COUNT)
    neuron_samples: int = number(least=1, most=COUNT)
    layer_metric: str = "mse"
    order: str = "importance"
    grid: GridSchema = field(default_factory=GridSchema)
    budget: BudgetSchema = field(default_factory=BudgetSchema)
    score_tokens: str = MISSING
    keep: int = number(least=1, most=COUNT)
    evaluate: str | None = None
    short: int = number(least=1, most=COUNT)
    short_tokens: str = MISSING
    start: str = "pruned"
