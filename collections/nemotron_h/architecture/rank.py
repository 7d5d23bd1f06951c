"""Layouts of a model over ranks, and the sizes of one rank's tensors. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from nemotron_h.architecture.blocks.block import Block, LayerMemory, Matrix
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.schema.recipe import AdapterSchema

#: operands and results that a widened matmul has in float32 at a time (ops/linear.py: BLOCK_BYTES)
WIDE_BLOCK = 4 << 20
#: elements that a norm's backward has in float32 at a time on the CPU, three times (ops/norm.py: BLOCK_ELEMENTS)
NORM_BLOCK = 1 << 18
#: as `make_vocab_size_divisible_by`, NeMo's and Megatron's default: per tensor-parallel rank
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Layout:
    """Layout and precision of a training run: the keys of a recipe that its memory depends on.

    Attributes:
        tensor, pipeline, data: ranks per axis.
        expert: ranks, of the tensor-, context- and data-parallel ones of a stage, that routed experts are split over.
        context: context-parallel ranks, over which the tokens of a sequence are split.
        sequence: sequence parallelism over the tensor-parallel ranks.
        distributed_optimizer: the optimizer's state is sharded over `data`.
        seq_length, micro_batch: tokens per sequence, sequences per forward pass of one rank.
        documents: rows hold several documents that attention keeps apart.
        short: (tokens of a sequence, share of the run's tokens) of rows that are several shorter sequences.
        micro_batches: forward passes per step of one rank.
        precision: as the recipe's.
        bf16_edge_layers: with FP8, layers at each end that stay in BF16.
        optimizer: `adamw` or `muon`.
        moments, gradients: dtypes of Adam's moments and of gradient sums, as the recipe's `optim`.
        recompute_mamba, recompute_ffn, ...: as the recipe's `recompute`, by kind of layer.
        recompute_offload: inputs of recomputed layers are in host memory.
        adapter: what is trained in place of the weights; of kind `none`, the weights.
        untrained: parts that do not train, of `architecture.frozen.frozen_parts`.
        backend: `gpu` or `cpu`.
        widened: on the CPU bfloat16 matmuls go through float32 (ops/linear.py: widens_bfloat16).
        copied: on the CPU torch's own matmuls write float32 results first (ops/linear.py: lacks_bfloat16_units).
        teacher: of a distillation that loads it: a model that is split as the trained one, and only runs forward.
    """

    seq_length: int
    micro_batch: int = 1
    documents: bool = False
    short: tuple[tuple[int, float], ...] = ()
    micro_batches: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    precision: str = "bf16"
    bf16_edge_layers: int = 2
    optimizer: str = "adamw"
    moments: str = "fp32"
    gradients: str = "fp32"
    recompute_mamba: str = "none"
    recompute_ffn: str = "none"
    recompute_attention: str = "none"
    recompute_parallel: str = "none"
    recompute_swiglu: str = "none"
    recompute_experts: str = "none"
    recompute_linear: str = "none"
    recompute_logits: str = "none"
    recompute_vision: str = "none"
    recompute_offload: bool = False
    adapter: AdapterSchema = field(default_factory=AdapterSchema)
    untrained: tuple[str, ...] = ()
    backend: str = "gpu"
    widened: bool = False
    copied: bool = False
    teacher: ModelDefinition | None = None

    @property
    def lengths(self) -> dict[int, float]:
        """Return tokens of a sequence -> share of the run's tokens."""
        return {self.seq_length: 1 - sum(share for _, share in self.short), **dict(self.short)}

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def shards(self) -> int:
        """Return the ranks with the same weights, over which the optimizer's state is sharded."""
        return self.data * self.context if self.distributed_optimizer else 1

    @property
    def expert_shards(self) -> int:
        """Return the same of the routed experts."""
        return self.tensor * self.context * self.data // self.expert if self.distributed_optimizer else 1

    @property
    def base_precision(self) -> str:
        """Return the precision of the weights: FP8 keeps them in bfloat16."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def fp8(self) -> bool:
        """Tell whether the GEMMs keep their inputs in FP8. On the CPU FP8 is emulated, in bfloat16's sizes."""
        return self.precision.startswith("fp8") and self.backend == "gpu"

    @property
    def frozen(self) -> bool:
        """Tell whether adapters are trained and the weights are not."""
        return self.adapter.kind != "none"

    def adapted(self, matrix: str) -> bool:
        """Tell whether a matrix has an adapter."""
        return self.frozen and matrix in self.adapter.targets

    def recompute(self, kind: str) -> str:
        """Return the recompute setting of a kind of layers, by its name."""
        return getattr(self, f"recompute_{kind}", "none")


def padded_vocabulary(definition: ModelDefinition, tensor: int) -> int:
    """Return the rows of the embedding and output matrices over all tensor-parallel ranks, padding included."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return math.ceil(definition.vocab_size / multiple) * multiple


class Rank:
    """Sizes of one rank's tensors for one micro-batch, in bytes.

    Args:
        definition: the model, or a layer of an encoder, which has a hidden size of its own.
        layout: its tokens are those of the residual stream.
    """

    def __init__(self, definition: ModelDefinition | Block, layout: Layout) -> None:
        self.d, self.layout = definition, layout
        self.layers: dict[tuple[Block, bool], LayerMemory] = {}
        d, t = definition, layout.tensor
        self.cpu = layout.backend == "cpu"
        self.float32 = layout.base_precision == "fp32"
        self.e = 4 if self.float32 else 2
        self.tokens = layout.seq_length // layout.context * layout.micro_batch
        whole = self.tokens * d.hidden_size * self.e
        #: the residual stream, and the same gathered from all tensor-parallel ranks
        self.residual = whole // t if layout.sequence else whole
        self.gathered = whole if layout.sequence and t > 1 else 0
        self.whole = whole
        #: tokens whose residual stream this rank holds
        self.own_tokens = self.tokens // (t if layout.sequence else 1)
        self.norm_rows = self.tokens // (t if layout.sequence else 1) * 4
        self.norm_blocks = 3 * 4 * min(NORM_BLOCK, self.own_tokens * d.hidden_size) if self.cpu else 0

    @property
    def offloaded(self) -> bool:
        """Tell whether inputs of recomputed layers are in host memory. On the CPU they are in any case."""
        return self.layout.recompute_offload and not self.cpu

    @property
    def logits(self) -> int:
        """Return the bytes of this rank's logits."""
        return self.tokens * padded_vocabulary(self.d, self.layout.tensor) // self.layout.tensor * self.e

    def act(self, width: int) -> int:
        """Return the bytes of an activation [tokens, width / tensor]."""
        return self.tokens * width // self.layout.tensor * self.e

    def weight(self, matrix: Matrix) -> int:
        """Return what the backward of a layer's matmul allocates beside the gradient of its input.

        That is the gradient of the weight before it is summed (on a GPU the matmul sums it itself,
        model/module.py: fuse_weight_gradients), and the copy of oneDNN's float32 matmuls (ops/linear.py), the
        narrower factor. A frozen weight has neither; its adapter has a gradient of the input of its own, which is
        added, and DoRA's lengths have those of the output.
        """
        if self.layout.frozen:
            return self.adapter_backward(matrix)
        if not self.cpu:
            return 0
        outputs, inputs = matrix.on_rank(self.layout.tensor)
        if matrix.split and self.layout.tensor > 1:
            return outputs * inputs * self.e  # Megatron's own matmul
        copy = self.rows(matrix) * min(outputs, inputs) * 4 if self.float32 else 0
        return outputs * inputs * self.e + copy + self.wide(outputs * inputs)

    def wide(self, elements: int) -> int:
        """Return the float32 bytes of a widened matmul with a matrix of so many elements: it, and a block of rows."""
        return 4 * elements + WIDE_BLOCK if self.layout.widened and self.cpu and not self.float32 else 0

    def saved_input(self, matrix: Matrix, size: int, layer_in_fp8: bool) -> int:
        """Return the bytes of a matmul's input as it is kept: one byte a value where it is quantised.

        For a frozen weight it is not kept, for its adapter it is, in the activations' precision, with what the adapter
        keeps beside.
        """
        if self.layout.frozen:
            return size + self.adapter_kept(matrix, size) if self.layout.adapted(matrix.name) else 0
        return size // self.e if layer_in_fp8 else size

    def rows(self, matrix: Matrix) -> int:
        """Return the tokens that pass a matrix: with experts, of an even load, those of all of a rank's."""
        return self.tokens if matrix.split else self.own_tokens * matrix.active

    def outputs(self, matrix: Matrix) -> int:
        """Return the bytes of a matmul's output."""
        if not matrix.split:
            return self.rows(matrix) * matrix.outputs * self.e
        return self.residual if matrix.split == "inputs" else self.act(matrix.outputs)

    def adapter_kept(self, matrix: Matrix, size: int) -> int:
        """Return what an adapter keeps beside its input: A x; dropout's mask; of DoRA the output before scaling."""
        adapter = self.layout.adapter
        kept = self.rows(matrix) * adapter.rank * self.e
        if adapter.dropout:
            kept += size // (1 if self.cpu else self.e)
        return kept + (self.outputs(matrix) if adapter.kind == "dora" else 0)

    def lengths(self, matrices: Iterable[Matrix]) -> int:
        """Return what DoRA allocates in a forward for the lengths of the largest matrix: its rows and their squares."""
        if self.layout.adapter.kind != "dora":
            return 0
        shapes = [matrix.on_rank(self.layout.tensor) for matrix in matrices if self.layout.adapted(matrix.name)]
        return 2 * 4 * max((outputs * inputs for outputs, inputs in shapes), default=0)

    def adapter_backward(self, matrix: Matrix) -> int:
        """Return the adapter's gradient of the input, beside the frozen weight's; DoRA's two of the output."""
        if not self.layout.adapted(matrix.name):
            return 0
        if not matrix.split:
            size = self.rows(matrix) * matrix.inputs * self.e
        else:
            size = self.act(matrix.inputs) if matrix.split == "inputs" else self.residual
        return size + (2 * self.outputs(matrix) if self.layout.adapter.kind == "dora" else 0)

    def input(self, matrix: Matrix, fp8: bool) -> int:
        """Return what any layer keeps first: its input, the normalised input of its first matrix, the norm's rows."""
        return self.residual + self.saved_input(matrix, self.residual, fp8) + self.norm_rows

    def layer(self, index: int) -> LayerMemory:
        """Return a layer's memory under the recompute settings."""
        block, edge = self.d.blocks[index], self.layout.bf16_edge_layers
        fp8 = self.layout.fp8 and edge <= index < self.d.num_layers - edge
        if (block, fp8) not in self.layers:
            memory = block.memory(self, fp8)
            if self.layout.recompute(block.name) == "layer":
                # The input alone is kept; the backward runs the forward again, its output included, before its own.
                again = memory.kept + memory.backward
                memory = LayerMemory(self.residual, again, memory.between)
                if self.offloaded:  # beside the input, that of the layer before is fetched
                    memory = LayerMemory(0, again + 2 * self.residual, memory.between)
            self.layers[block, fp8] = memory
        return self.layers[block, fp8]
