"""Floating-point operations per token of any model of the family, by part. Pure arithmetic.

Conventions: a multiply-add is 2 operations. Matmuls, the convolution and the attention core count; norms,
activations, the softmax and the optimizer do not (under 1 % together). The causal core is counted as what a causal
kernel has to do, the triangle with its diagonal: (L + 1) / 2 keys per query on average. The state-space scan is counted
in its chunked form (Dao and Gu 2024) with whole [chunk, chunk] matrices, as the kernels multiply them. A backward pass
is two matmuls for every one of the forward, so training is three times the forward. What a backward computes again is
no work of the model and not counted, here or in an MFU; `recomputed_per_token` has it.

With adapters (`nemotron_h.model.adapters`) the weights are frozen, and the backward of a matrix is one matmul, the
gradient of its input (also that of the first layer's, as training computes it); where activations multiply, in scan and
attention core, it stays two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemotron_h.architecture.adapters import shape_of
from nemotron_h.architecture.definition import ATTENTION, LAYER_NAMES, MAMBA, ModelDefinition
from nemotron_h.schema.recipe import AdapterSchema

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
        adapters: LoRA's or DoRA's own matmuls.
    """

    mamba_projections: float = 0.0
    convolution: float = 0.0
    ssd: float = 0.0
    attention_projections: float = 0.0
    attention_core: float = 0.0
    ffn: float = 0.0
    head: float = 0.0
    adapters: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def linear(self) -> float:
        """Return the FLOPs of the layers' projections, which FP8 can take (paper 2.3), without the output matrix."""
        return self.mamba_projections + self.attention_projections + self.ffn

    @property
    def rest(self) -> float:
        """Return all but `linear`: BF16 matmuls, convolution and scan."""
        return self.total - self.linear

    def shares(self) -> dict[str, float]:
        """Return part -> share of the total."""
        return {f.name: getattr(self, f.name) / self.total for f in fields(self)}


def ssd_flops(definition: ModelDefinition, chunk: int = CHUNK) -> float:
    """Return the forward operations per token of one scan.

    C B^T per group, the decayed [chunk, chunk] matrix times x per head, B^T x into the chunk's state, and C times the
    incoming state. Passing states between chunks is elementwise.
    """
    d = definition
    within = 2 * chunk * (d.mamba_num_groups * d.mamba_state_dim + d.d_inner)
    return within + 4 * d.mamba_state_dim * d.d_inner


@dataclass(frozen=True)
class _Step:
    """Operation of a layer's forward.

    Attributes:
        part: of `FlopsByPart`.
        forward: operations per token.
        matrix: name of the weight that adapters can be put on, or "".
        of_activations: whether both factors are activations, not one of them a weight.
    """

    part: str
    forward: float
    matrix: str = ""
    of_activations: bool = False


def _steps(d: ModelDefinition, symbol: str, seq_length: int, chunk: int) -> list[_Step]:
    """Return the operations of a layer, in order."""

    def matrix(part: str, name: str) -> _Step:
        outputs, inputs = shape_of(name, d)
        return _Step(part, 2 * outputs * inputs, name)

    if symbol == MAMBA:
        return [
            matrix("mamba_projections", "in_proj"),
            _Step("convolution", 2 * d.conv_channels * d.conv_kernel),
            _Step("ssd", ssd_flops(d, min(chunk, seq_length)), of_activations=True),
            matrix("mamba_projections", "out_proj"),
        ]
    if symbol == ATTENTION:
        core = 4 * d.num_attention_heads * d.head_dim * (seq_length + 1) / 2
        return [
            matrix("attention_projections", "linear_qkv"),
            _Step("attention_core", core, of_activations=True),
            matrix("attention_projections", "linear_proj"),
        ]
    return [matrix("ffn", "linear_fc1"), matrix("ffn", "linear_fc2")]


def flops_per_token(
    definition: ModelDefinition,
    seq_length: int,
    training: bool = True,
    chunk: int = CHUNK,
    adapter: AdapterSchema | None = None,
    micro_batch: int = 1,
) -> FlopsByPart:
    """Return the operations per token of a sequence.

    Args:
        definition: any of the family: hybrid, Mamba-2 alone, Transformer.
        seq_length: tokens per sequence; the attention core grows with it.
        training: forward and backward; else the forward.
        chunk: tokens per chunk of the scan.
        adapter: what is trained, of a run with frozen weights; None or of kind `none` trains all.
        micro_batch: sequences per forward pass, over which DoRA's norms of the matrices are spread.
    """
    adapter = adapter or AdapterSchema()
    frozen = adapter.kind != "none"
    d, parts = definition, dict.fromkeys((f.name for f in fields(FlopsByPart)), 0.0)
    steps = [(d.count(symbol), step) for symbol in set(d.pattern) for step in _steps(d, symbol, seq_length, chunk)]
    for count, step in (*steps, (1, _Step("head", 2 * d.hidden_size * d.vocab_size))):
        backward = 2 if step.of_activations or not frozen else 1
        parts[step.part] += count * step.forward * (1 + backward * training)
        if frozen and step.matrix in adapter.targets:
            outputs, inputs = shape_of(step.matrix, d)
            parts["adapters"] += count * 2 * adapter.rank * (inputs + outputs) * (1 + 2 * training)
            if adapter.kind == "dora":  # B A, once for all tokens of a forward
                parts["adapters"] += count * 2 * adapter.rank * inputs * outputs / (micro_batch * seq_length)
    return FlopsByPart(**parts)


def recomputed_per_token(
    definition: ModelDefinition, seq_length: int, layers: dict[str, bool], adapter: AdapterSchema | None = None
) -> float:
    """Return the operations per token that a backward pass does again.

    Args:
        layers: layer type (`mamba`, `attention`, `ffn`) -> whether its layers keep their input only.
        adapter: as in `flops_per_token`; DoRA's norms are left out.
    """
    d, total = definition, 0.0
    for symbol in set(d.pattern):
        for step in _steps(d, symbol, seq_length, CHUNK) if layers[LAYER_NAMES[symbol]] else ():
            total += d.count(symbol) * step.forward
            if adapter and adapter.kind != "none" and step.matrix in adapter.targets:
                total += d.count(symbol) * 2 * adapter.rank * sum(shape_of(step.matrix, d))
    return total
