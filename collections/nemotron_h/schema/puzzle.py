"""The part `puzzle` of a recipe: a compression whose layers differ. Imports no torch, NeMo or Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.ranges import COUNT, WIDTH

#: values of keys of `PuzzleSchema` and `CostSchema`
MERGES = ("aligned", "mean", "gates")
MEASURES = ("kl", "loss", "accuracy")
TIMES = ("measured", "modelled", "none")


@dataclass
class LibrarySchema:
    """Variants of each layer beside itself: every combination of its kind's widths; an empty list keeps the parent's.

    Attributes:
        num_query_groups: key-value heads that a layer's are merged to.
        ffn_hidden_size, mamba_num_heads, mamba_head_dim: widths that the most important channels are left of.
        num_experts, expert_hidden_size, shared_expert_hidden_size: likewise, of experts.
        linear: kinds of layers that a linear one may replace, by name.
        no_op: kinds of layers that may be left out, by name.
    """

    num_query_groups: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    ffn_hidden_size: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    mamba_num_heads: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    mamba_head_dim: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    num_experts: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    expert_hidden_size: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    shared_expert_hidden_size: list[int] = field(default_factory=list, metadata=within(least=1, most=WIDTH))
    linear: list[str] = field(default_factory=list)
    no_op: list[str] = field(default_factory=list)


@dataclass
class LocalSchema:
    """Training of the variants, each on its own, on what the parent's layer reads and writes (2411.19146, 3).

    Attributes:
        tokens: that each variant reads.
        tokens_of: of some of them by name, as `{"linear": "1M", "num_query_groups=1": "2M"}`.
        batch: windows of a step.
        lr: at the start; it falls to 0 as a cosine.
    """

    tokens: str = MISSING
    tokens_of: dict[str, str] = field(default_factory=dict)
    batch: int = number(16, least=1, most=COUNT)
    lr: float = number(1e-3, above=0, most=1)


@dataclass
class CostSchema:
    """Scenario that costs are of, and the limits that the child keeps; at least one limit.

    Attributes:
        batch, prompt, output: sequences at once, tokens that each reads, tokens that each generates.
        weights, kv_cache, states: precisions of the memory: fp32, bf16, fp8 or fp4.
        times: `measured`: a layer of each variant is timed here; `modelled`: the least that a GPU's peak rates allow;
            `none`: no limit needs times.
        gpu: of modelled times: its name in configs/gpus.yaml.
        parameters: most parameters; an integer, or text such as 4.5B.
        memory_gib: most GiB of weights, keys and values, and states of the batch at its full length.
        latency_seconds: most seconds from prompt to last token of a batch.
        tokens_per_second: least tokens, read and generated, of a batch in its time (2411.19146, B).
        speedup: least ratio of the parent's latency to the child's.
    """

    batch: int = number(1, least=1, most=COUNT)
    prompt: int = number(least=1, most=COUNT)
    output: int = number(least=1, most=COUNT)
    weights: str = "bf16"
    kv_cache: str = "bf16"
    states: str = "fp32"
    times: str = "measured"
    gpu: str | None = None
    parameters: str | None = None
    memory_gib: float | None = number(None, above=0, most=1e9)
    latency_seconds: float | None = number(None, above=0, most=1e9)
    tokens_per_second: float | None = number(None, above=0, most=1e12)
    speedup: float | None = number(None, above=0, most=1e6)


@dataclass
class PuzzleSchema:
    """A compression: the recipe's model is the parent, its data, optimizer and length are those of the healing.

    Attributes:
        parent: a run's folder, one of its checkpoints, or one of the Hub, as `init.checkpoint`.
        layer_samples, neuron_samples: sequences of the training data that importance is measured on.
        layer_metric: what removing a layer changes, `mse` or `kl`; told, and not used by the search.
        merge: key-value heads are merged `aligned` (2412.20677), as the plain `mean` of neighbours, or aligned and by
            `gates` while the variant trains.
        library: the variants.
        local: their training.
        score_tokens: held-out tokens that every variant is scored on, and as many others that the report is of.
        measure: by which the search chooses: `kl` from the parent, `loss`, or `accuracy` of the next token.
        costs: scenario and limits.
        homogeneous: kinds of layers of which all that stay are the same variant, by name.
        solutions: how many children the search finds; the best one is made.
        alpha: each shares at most this part of its layers with every better one (2411.19146, B).
        refine_tokens: that each two neighbours among the chosen variants are trained on together; null is none.
        long_tokens, long_seq_length: of a second healing at longer windows; null is none.
    """

    parent: str = MISSING
    layer_samples: int = number(least=1, most=COUNT)
    neuron_samples: int = number(least=1, most=COUNT)
    layer_metric: str = "mse"
    merge: str = "aligned"
    library: LibrarySchema = field(default_factory=LibrarySchema)
    local: LocalSchema = field(default_factory=LocalSchema)
    score_tokens: str = MISSING
    measure: str = "kl"
    costs: CostSchema = field(default_factory=CostSchema)
    homogeneous: list[str] = field(default_factory=list)
    solutions: int = number(3, least=1, most=COUNT)
    alpha: float = number(0.8, above=0, most=1)
    refine_tokens: str | None = None
    long_tokens: str | None = None
    long_seq_length: int | None = number(None, least=1, most=COUNT)
