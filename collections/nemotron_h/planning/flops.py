"""Floating-point operations per token of any model of the family, by part. Pure arithmetic.

Conventions: a multiply-add is 2 operations. Matrix products, the convolution and the attention core count; norms,
activations, the softmax and the optimizer do not (under 1 % together). The causal core is counted as what a causal
kernel has to do, the triangle with its diagonal: (L + 1) / 2 keys per query on average. The state-space scan is counted
in its chunked form (Dao and Gu 2024) with whole [chunk, chunk] matrices, as the kernels multiply them. A backward pass
is two products for every one of the forward, so training is three times the forward. What a backward computes again is
no work of the model and not counted, here or in an MFU; `recomputed_per_token` has it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemotron_h.model.definition import ATTENTION, FFN, MAMBA, ModelDefinition

#: tokens of a chunk of the scan on a GPU (`nemotron_h.ops.select.KERNEL_CHUNK`)
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
        ffn: both matrices of every FFN.
        head: the output matrix. The embedding is a lookup and costs nothing.
    """

    mamba_projections: float = 0.0
    convolution: float = 0.0
    ssd: float = 0.0
    attention_projections: float = 0.0
    attention_core: float = 0.0
    ffn: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def linear(self) -> float:
        """The layers' linear projections: what FP8 can take (paper 2.3). The output matrix is not among them."""
        return self.mamba_projections + self.attention_projections + self.ffn

    @property
    def rest(self) -> float:
        """All but `linear`: BF16 products, convolution and scan."""
        return self.total - self.linear

    def __mul__(self, factor: float) -> FlopsByPart:
        return FlopsByPart(*(getattr(self, f.name) * factor for f in fields(self)))

    def shares(self) -> dict[str, float]:
        """Part -> share of the total."""
        return {f.name: getattr(self, f.name) / self.total for f in fields(self)}


def ssd_flops(definition: ModelDefinition, chunk: int = CHUNK) -> float:
    """Forward operations per token of one scan.

    C B^T per group, the decayed [chunk, chunk] matrix times x per head, B^T x into the chunk's state, and C times the
    incoming state. Passing states between chunks is elementwise.
    """
    d = definition
    within = 2 * chunk * (d.mamba_num_groups * d.mamba_state_dim + d.d_inner)
    return within + 4 * d.mamba_state_dim * d.d_inner


def flops_per_token(
    definition: ModelDefinition, seq_length: int, training: bool = True, chunk: int = CHUNK
) -> FlopsByPart:
    """Operations per token of a sequence.

    Args:
        definition: any of the family: hybrid, Mamba-2 alone, Transformer.
        seq_length: tokens per sequence; the attention core grows with it.
        training: forward and backward; else the forward.
        chunk: tokens per chunk of the scan.
    """
    d = definition
    mamba, attention, ffn = (d.count(symbol) for symbol in (MAMBA, ATTENTION, FFN))
    parts = {"head": 2 * d.hidden_size * d.vocab_size}
    if mamba:
        parts["mamba_projections"] = mamba * 2 * d.hidden_size * (d.in_proj_size + d.d_inner)
        parts["convolution"] = mamba * 2 * d.conv_channels * d.conv_kernel
        parts["ssd"] = mamba * ssd_flops(d, min(chunk, seq_length))
    if attention:
        query, key_value = d.num_attention_heads * d.head_dim, 2 * d.num_query_groups * d.head_dim
        parts["attention_projections"] = attention * 2 * d.hidden_size * (2 * query + key_value)
        parts["attention_core"] = attention * 4 * query * (seq_length + 1) / 2
    if ffn:
        parts["ffn"] = ffn * 4 * d.hidden_size * d.ffn_hidden_size
    forward = FlopsByPart(**parts)
    return forward * 3 if training else forward


def recomputed_per_token(definition: ModelDefinition, seq_length: int, layers: dict[str, bool]) -> float:
    """Operations per token that a backward pass does again.

    Args:
        layers: layer type (`mamba`, `attention`, `ffn`) -> whether its layers keep their input only.
    """
    forward = flops_per_token(definition, seq_length, training=False)
    by_type = {
        "mamba": forward.mamba_projections + forward.convolution + forward.ssd,
        "attention": forward.attention_projections + forward.attention_core,
        "ffn": forward.ffn,
    }
    return sum(by_type[name] for name, again in layers.items() if again)
