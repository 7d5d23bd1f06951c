"""Floating-point operations per token of any model of the family, by part. Pure arithmetic.

Conventions: a multiply-add is 2 operations. Matmuls, the convolution and the attention core count; norms,
activations, the softmax and the optimizer do not (under 1 % together). The causal core is counted as what a causal
kernel has to do, the triangle with its diagonal: (L + 1) / 2 keys per query on average. The state-space scan is counted
in its chunked form (Dao and Gu 2024) with whole [chunk, chunk] matrices, as the kernels multiply them. A backward pass
is two matmuls for every one of the forward, so training is three times the forward. What a backward computes again is
no work of the model and not counted, here or in an MFU; `recomputed_per_token` has it.

With adapters (`nemotron_h.model.adapters`) the weights are frozen, and the backward of a matrix is one matmul, the
gradient of its input (also that of the first layer's, as training computes it); where activations multiply, in scan and
attention core, it stays two. So it is of the parts that are frozen (`optim.frozen`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemotron_h.architecture.blocks.block import Operation
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.frozen import OUTPUT, frozen_parts
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.schema.recipe import AdapterSchema

#: tokens of a chunk of the scan that counts: mamba-ssm's on a GPU (`nemotron_h.ops.select.KERNEL_CHUNK`). Our kernels'
#: are half as long and compute less, which makes a step faster and is no work of the model
CHUNK = 128


@dataclass(frozen=True)
class FlopsByPart:
    """Operations per token.

    Attributes:
        mamba_projections: input and output projections of the Mamba-2 mixers.
        convolution: their causal convolutions.
        ssd: their scans.
        attention_projections: queries, keys, values and output.
        attention_core: scores and weighted values.
        ffn: both matrices of every feed-forward layer.
        router: scores of the experts.
        experts: matrices of the experts that a token passes, and of the shared one.
        linear_layers: matrices of the layers that are one.
        mtp: all of the block that predicts further tokens, and the output matrix once more for each.
        head: the output matrix. The embedding is a lookup and costs nothing.
        adapters: LoRA's or DoRA's own matmuls.
        vision, projector: of the image encoder, and of what follows it, spread over the tokens of a sequence.
    """

    mamba_projections: float = 0.0
    convolution: float = 0.0
    ssd: float = 0.0
    attention_projections: float = 0.0
    attention_core: float = 0.0
    ffn: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    linear_layers: float = 0.0
    mtp: float = 0.0
    head: float = 0.0
    adapters: float = 0.0
    vision: float = 0.0
    projector: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def linear(self) -> float:
        """Return the FLOPs of the layers' projections, which FP8 can take (paper 2.3), without the output matrix."""
        return self.mamba_projections + self.attention_projections + self.ffn + self.experts + self.linear_layers

    @property
    def rest(self) -> float:
        """Return all but `linear`: BF16 matmuls, convolution and scan."""
        return self.total - self.linear

    def shares(self) -> dict[str, float]:
        """Return part -> share of the total."""
        return {f.name: getattr(self, f.name) / self.total for f in fields(self)}


def flops_per_token(
    definition: ModelDefinition,
    seq_length: int,
    training: bool = True,
    chunk: int = CHUNK,
    adapter: AdapterSchema | None = None,
    micro_batch: int = 1,
    frozen: Collection[str] = (),
    tiles: float | None = None,
) -> FlopsByPart:
    """Return the operations per token of a sequence.

    Args:
        definition: any of the family: hybrid, Mamba-2 alone, Transformer.
        seq_length: tokens per sequence; the attention core grows with it.
        training: forward and backward; else the forward.
        chunk: tokens per chunk of the scan.
        adapter: what is trained, of a run with frozen weights; None or of kind `none` trains all.
        micro_batch: sequences per forward pass, over which DoRA's norms of the matrices are spread.
        frozen: parts that do not train (`nemotron_h.architecture.frozen`).
        tiles: of a sequence; None is as many as it holds.
    """
    adapter = adapter or AdapterSchema()
    adapted, frozen = adapter.kind != "none", frozen_parts(frozen, definition) if frozen else ()
    d, parts = definition, dict.fromkeys((f.name for f in fields(FlopsByPart)), 0.0)
    steps = [
        (count, step, block.name in frozen)
        for block, count in Counter(d.blocks).items()
        for step in block.operations(seq_length, chunk)
    ]
    for count, step, still in (*steps, (1, Operation("head", 2 * d.hidden_size * d.vocab_size), OUTPUT in frozen)):
        backward = 2 if step.of_activations or not (adapted or still) else 1
        parts[step.part] += count * step.forward * (1 + backward * training)
        if adapted and step.matrix and step.matrix.name in adapter.targets:
            sides, passed = step.matrix.outputs + step.matrix.inputs, step.matrix.active
            parts["adapters"] += count * 2 * adapter.rank * sides * passed * (1 + 2 * training)
            if adapter.kind == "dora":  # B A, once for all tokens of a forward
                parts["adapters"] += count * 2 * adapter.rank * step.matrix.size / (micro_batch * seq_length)
    if d.mtp_steps and not adapted:
        layers = sum(step.forward for block in d.mtp_blocks for step in block.operations(seq_length, chunk))
        ends = 2 * d.hidden_size * (2 * d.hidden_size + d.vocab_size)
        parts["mtp"] = d.mtp_steps * (layers + ends) * (1 + 2 * training)
    if d.encoder:
        count = d.encoder.tiles(seq_length) if tiles is None else tiles
        still = (VISION, PROJECTOR) if adapted else frozen
        parts |= {part: n * count / seq_length for part, n in d.encoder.flops_per_tile(training, still).items()}
    return FlopsByPart(**parts)


def mean_flops(definition: ModelDefinition, lengths: Mapping[int, float], **settings: Any) -> FlopsByPart:
    """Return the operations per token of a run that has sequences of several lengths.

    Args:
        lengths: tokens of a sequence -> share of the tokens.
        settings: as of `flops_per_token`.
    """
    parts = [(share, flops_per_token(definition, length, **settings)) for length, share in lengths.items()]
    return FlopsByPart(**{f.name: sum(s * getattr(part, f.name) for s, part in parts) for f in fields(FlopsByPart)})


def recomputed_per_token(
    definition: ModelDefinition,
    seq_length: int,
    layers: Mapping[str, bool],
    adapter: AdapterSchema | None = None,
) -> float:
    """Return the operations per token that a backward pass does again.

    Args:
        layers: name of a kind -> whether its layers keep their input only; of `logits` whether they are.
        adapter: as in `flops_per_token`; DoRA's norms are left out.
    """
    total = 0.0
    for block, count in Counter(definition.blocks).items():
        for step in block.operations(seq_length, CHUNK) if layers.get(block.name) else ():
            total += count * step.forward
            if adapter and adapter.kind != "none" and step.matrix and step.matrix.name in adapter.targets:
                total += count * 2 * adapter.rank * (step.matrix.outputs + step.matrix.inputs) * step.matrix.active
    if definition.encoder and layers.get(VISION):
        tiles = definition.encoder.tiles(seq_length) / seq_length
        total += tiles * definition.encoder.flops_per_tile(training=False)[VISION]
    return total + (2 * definition.hidden_size * definition.vocab_size if layers.get("logits") else 0)
