"""Memory of one rank in training, by part, for a layout. Pure arithmetic.

What a rank holds at its peak is
    weights + gradients + optimizer + buffers      (always there)
  + activations                                    (kept for the backward pass at that moment)
  + working                                        (what the operation that runs just then allocates on top).
The sizes follow the code that runs. On the CPU that is Megatron's layers over the plain operations of `nemotron_h.ops`;
they agree with the allocator's measured peak (tests/planning). On a GPU it is Transformer Engine's layers, cuDNN
attention and mamba-ssm's fused kernel, from what those keep for their backward; the CUDA context, NCCL and
fragmentation come on top, for which the margin between a GPU's nominal and its real memory stands (configs/gpus.yaml).

The peak lies where the last forward has just ended or in the backward of one of the layers; each is computed, and the
largest counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from nemotron_h.architecture.adapters import ROW_PARALLEL, TARGETS, shape_of, trained_parameters
from nemotron_h.architecture.definition import ATTENTION, FFN, LAYER_NAMES, MAMBA, ModelDefinition, pipeline_layers
from nemotron_h.architecture.gemms import gemm_table
from nemotron_h.schema.recipe import AdapterSchema

BACKENDS = ("gpu", "cpu")

#: bytes of a weight, and of what the optimizer keeps for it (float32 main weight where the weight is not, two moments)
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}
#: the same with moments in bfloat16: of a bfloat16 weight's main weight the 16 bits that it lacks; a float32 weight is
#: its own, and Transformer Engine's Adam keeps a copy of it all the same (platform/lean_adam.py)
LEAN_OPTIMIZER_BYTES = {"fp32": 8, "bf16": 6}
#: of a bfloat16 weight's sum of gradients
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
#: elements whose moments the lean optimizer has in float32 at a time (platform/lean_adam.py: PIECE)
LEAN_PIECE = 1 << 28
#: operands and results that a widened matmul has in float32 at a time (ops/linear.py: BLOCK_BYTES)
WIDE_BLOCK = 4 << 20

#: as `make_vocab_size_divisible_by`, NeMo's and Megatron's default: per tensor-parallel rank
VOCABULARY_MULTIPLE = 128
#: tokens per chunk of the kernels' scan (ops/select.py), and of ours, with the size of ours' segments (ops/ssd.py)
KERNEL_CHUNK, CPU_CHUNK, CPU_SEGMENT_ELEMENTS = 128, 32, 1 << 18
#: widths of one rank that the fused kernel takes are multiples of this (model/mixer.py)
FUSED_ALIGNMENT = 8
#: logits of one model that the loss of a distillation holds at once, and those of them in float32
#: (ops/distillation_loss.py: CHUNK_ELEMENTS, BLOCK_ELEMENTS)
LOSS_CHUNK = {"cpu": 1 << 25, "cuda": 1 << 28}
LOSS_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}
#: ours: workspaces of cuBLAS that Transformer Engine and torch allocate once
GPU_WORKSPACE = 96 * 2**20


@dataclass(frozen=True)
class Layout:
    """Layout of a training: the keys of a recipe that memory depends on.

    Attributes:
        tensor, pipeline, data: ranks per axis.
        context: context-parallel ranks; planned only, training refuses more than 1.
        sequence: sequence parallelism over the tensor-parallel ranks.
        distributed_optimizer: the optimizer's state is sharded over `data`.
        seq_length, micro_batch: tokens per sequence, sequences per forward pass of one rank.
        documents: rows hold several documents that attention keeps apart.
        micro_batches: forward passes per step of one rank.
        precision: as the recipe's.
        bf16_edge_layers: with FP8, layers at each end that stay in BF16.
        moments, gradients: dtypes of Adam's moments and of gradient sums, as the recipe's `optim`.
        recompute_mamba, recompute_ffn, recompute_attention: as the recipe's `recompute`.
        adapter: what is trained in place of the weights; of kind `none`, the weights.
        backend: `gpu` or `cpu`.
        widened: on the CPU bfloat16 matmuls go through float32 (ops/linear.py: widens_bfloat16).
        copied: on the CPU torch's own have their results in float32 first (ops/linear.py: lacks_bfloat16_units).
        teacher: of a distillation that loads it: a model that is split as the trained one, and only runs forward.
    """

    seq_length: int
    micro_batch: int = 1
    documents: bool = False
    micro_batches: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence: bool = False
    distributed_optimizer: bool = True
    precision: str = "bf16"
    bf16_edge_layers: int = 2
    moments: str = "fp32"
    gradients: str = "fp32"
    recompute_mamba: str = "none"
    recompute_ffn: str = "none"
    recompute_attention: str = "none"
    adapter: AdapterSchema = field(default_factory=AdapterSchema)
    backend: str = "gpu"
    widened: bool = False
    copied: bool = False
    teacher: ModelDefinition | None = None

    @property
    def ranks(self) -> int:
        """Return all ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def base_precision(self) -> str:
        """Return the precision of the weights: FP8 keeps them in bfloat16."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def fp8(self) -> bool:
        """Return True if the GEMMs keep their inputs in FP8. On the CPU FP8 is emulated, in bfloat16's sizes."""
        return self.precision.startswith("fp8") and self.backend == "gpu"

    @property
    def frozen(self) -> bool:
        """Return True if adapters are trained and the weights are not."""
        return self.adapter.kind != "none"

    def adapted(self, matrix: str) -> bool:
        """Return True if a matrix has an adapter."""
        return self.frozen and matrix in self.adapter.targets

    def recompute(self, symbol: str) -> str:
        """Return the recompute setting of a layer type."""
        return getattr(self, f"recompute_{LAYER_NAMES[symbol]}")


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage at its peak.

    Attributes:
        stage: number of the stage, from 0.
        weights: with the vocabulary's padding, and with FP8 the copies that Transformer Engine caches.
        gradients: their sums.
        optimizer: main weights and moments of this rank's share.
        buffers: what is allocated once and stays: communication and GEMM workspaces.
        teacher: weights of a distillation's teacher, as `weights`.
        activations: kept for the backward pass at the peak, by layer type and for the `head` (logits and loss), of all
            micro-batches in flight.
        working: what the operation at the peak allocates.
        at: where the peak lies: `head`, a layer type, `teacher` (its forward), or `optimizer`.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    teacher: int = 0
    activations: dict[str, int] = field(default_factory=dict)
    working: int = 0
    at: str = ""

    @property
    def states(self) -> int:
        """Return the bytes that stay between steps."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.teacher

    @property
    def peak(self) -> int:
        """Return the sum of all parts."""
        return self.states + sum(self.activations.values()) + self.working

    def parts(self) -> dict[str, int]:
        """Return part -> bytes, in the order of a table; zero parts left out."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "teacher": self.teacher,
            **{f"activations: {name}": size for name, size in self.activations.items()},
            "working": self.working,
            "buffers": self.buffers,
        }
        return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer and micro-batch.

    Attributes:
        kept: between its forward and its backward.
        backward: on top of that, at the worst moment of its backward.
    """

    kept: int
    backward: int


def padded_vocabulary(definition: ModelDefinition, tensor: int) -> int:
    """Return the rows of the embedding and output matrices over all tensor-parallel ranks."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return math.ceil(definition.vocab_size / multiple) * multiple


def rank_parameters(definition: ModelDefinition, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the parameters of one rank of a stage: (all, of these in float32 in any precision)."""
    d, t = definition, layout.tensor
    total = in_float32 = 0
    for index in pipeline_layers(d.num_layers, layout.pipeline)[stage]:
        symbol = d.pattern[index]
        norm = d.hidden_size  # the input norm is on every tensor-parallel rank, all else is split
        total += norm + (d.layer_parameters(symbol) - norm) // t
        in_float32 += 3 * d.mamba_num_heads // t if symbol == MAMBA else 0
    matrix = padded_vocabulary(d, t) // t * d.hidden_size
    total += matrix * (stage == 0) + (matrix + d.hidden_size) * (stage == layout.pipeline - 1)
    return total, in_float32


def rank_adapters(definition: ModelDefinition, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the adapter parameters of one rank of a stage: (all, of these in float32 in any precision)."""
    total = in_float32 = 0
    for index in pipeline_layers(definition.num_layers, layout.pipeline)[stage]:
        for matrix, symbol in TARGETS.items():
            if symbol != definition.pattern[index] or not layout.adapted(matrix):
                continue
            outputs, inputs = _rank_shape(definition, layout, matrix)
            lengths = outputs if layout.adapter.kind == "dora" else 0
            total += layout.adapter.rank * (outputs + inputs) + lengths
            in_float32 += lengths
    return total, in_float32


def _rank_shape(definition: ModelDefinition, layout: Layout, matrix: str) -> tuple[int, int]:
    """Return the outputs and inputs of a rank's part of a matrix."""
    outputs, inputs = shape_of(matrix, definition)
    return (outputs, inputs // layout.tensor) if matrix in ROW_PARALLEL else (outputs // layout.tensor, inputs)


def _fp8_weights(definition: ModelDefinition, layout: Layout, stage: int) -> int:
    """Return the weights of one rank of a stage whose matmuls FP8 takes."""
    table = gemm_table(definition, layout.precision, layout.tensor, tokens=1, bf16_edge_layers=layout.bf16_edge_layers)
    layers = pipeline_layers(definition.num_layers, layout.pipeline)[stage]
    return sum(gemm.n * gemm.k for gemm in table if gemm.dtype == "FP8" and gemm.layer in layers)


class _Rank:
    """Sizes of one rank's tensors for one micro-batch, in bytes."""

    def __init__(self, definition: ModelDefinition, layout: Layout) -> None:
        self.d, self.layout = definition, layout
        self.layers: dict[tuple[str, bool], _Layer] = {}
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
        self.norm_rows = self.tokens // (t if layout.sequence else 1) * 4
        self.logits = self.tokens * padded_vocabulary(d, t) // t * self.e

    def act(self, width: int) -> int:
        """Return the bytes of an activation [tokens, width / tensor]."""
        return self.tokens * width // self.layout.tensor * self.e

    def weight(self, matrix: str) -> int:
        """Return the bytes that the backward of a layer's matmul allocates beside the gradient of its input: the
        gradient of the weight before it is summed (on a GPU the matmul sums it itself, model/gpu_options.py:
        fuse_weight_gradients), and the copy of oneDNN's float32 matmuls (ops/linear.py), the narrower factor. A frozen
        weight has neither; its adapter has a gradient of the input of its own, which is added, and DoRA's lengths have
        those of the output.
        """
        outputs, inputs = shape_of(matrix, self.d)
        if self.layout.frozen:
            return self.adapter_backward(matrix)
        if not self.cpu:
            return 0
        plain = self.float32 and self.layout.tensor == 1
        copy = self.tokens * min(outputs, inputs) * 4 if plain else 0
        return outputs * inputs // self.layout.tensor * self.e + copy + self.wide(outputs * inputs)

    def wide(self, elements: int) -> int:
        """Return the float32 bytes during a widened matmul with so many elements: the matrix, a block of rows."""
        through = self.layout.widened and self.cpu and not self.float32 and self.layout.tensor == 1
        return 4 * elements + WIDE_BLOCK if through else 0

    def saved_input(self, matrix: str, size: int, layer_in_fp8: bool) -> int:
        """Return the bytes of a GEMM's input as it is kept: one byte a value where it is quantised. For a frozen weight
        it is not kept, for its adapter it is, in the activations' precision, with what the adapter keeps beside.
        """
        if self.layout.frozen:
            return size + self.adapter_kept(matrix, size) if self.layout.adapted(matrix) else 0
        return size // self.e if layer_in_fp8 else size

    def outputs(self, matrix: str) -> int:
        """Return the bytes of a matmul's output."""
        return self.residual if matrix in ROW_PARALLEL else self.act(shape_of(matrix, self.d)[0])

    def adapter_kept(self, matrix: str, size: int) -> int:
        """Return the bytes that an adapter keeps beside its input: A x, dropout's mask, DoRA's unscaled output."""
        adapter = self.layout.adapter
        kept = self.tokens * adapter.rank * self.e
        if adapter.dropout:
            kept += size // (1 if self.cpu else self.e)
        return kept + (self.outputs(matrix) if adapter.kind == "dora" else 0)

    def lengths(self, matrices: Iterable[str]) -> int:
        """Return the bytes of DoRA's lengths of the largest matrix in a forward: its rows and their squares."""
        if self.layout.adapter.kind != "dora":
            return 0
        shapes = [_rank_shape(self.d, self.layout, matrix) for matrix in matrices if self.layout.adapted(matrix)]
        return 2 * 4 * max((outputs * inputs for outputs, inputs in shapes), default=0)

    def adapter_backward(self, matrix: str) -> int:
        """Return the bytes of the adapter's input gradient, beside the frozen weight's; DoRA's two of the output."""
        if not self.layout.adapted(matrix):
            return 0
        size = self.act(shape_of(matrix, self.d)[1]) if matrix in ROW_PARALLEL else self.residual
        return size + (2 * self.outputs(matrix) if self.layout.adapter.kind == "dora" else 0)

    def layer(self, index: int) -> _Layer:
        """Return a layer under the recompute settings."""
        symbol = self.d.pattern[index]
        edge = self.layout.bf16_edge_layers
        fp8 = self.layout.fp8 and edge <= index < self.d.num_layers - edge
        if (symbol, fp8) not in self.layers:
            self.layers[symbol, fp8] = self._layer(symbol, fp8)
        return self.layers[symbol, fp8]

    def _layer(self, symbol: str, fp8: bool) -> _Layer:
        full = {MAMBA: self._mamba, ATTENTION: self._attention, FFN: self._ffn}[symbol](fp8)
        if self.layout.recompute(symbol) == "layer":
            # The input alone is kept; the backward runs the forward again, its output included, before its own.
            return _Layer(kept=self.residual, backward=full.kept + full.backward)
        return full

    def _input(self, matrix: str, fp8: bool) -> int:
        """Return the bytes that any layer keeps first: its input, that of its first matrix, and the norm's rows."""
        return self.residual + self.saved_input(matrix, self.residual, fp8) + self.norm_rows

    def _ffn(self, fp8: bool) -> _Layer:
        d = self.d
        inner = self.act(d.ffn_hidden_size)
        fc2 = self.saved_input("linear_fc2", inner, fp8)
        product = inner + self.weight("linear_fc2")
        kept = self._input("linear_fc1", fp8) + inner + fc2  # relu(x), and relu(x)^2, the second matmul's input
        backward = self.residual + self.gathered + product
        if self.layout.recompute_ffn == "activation":
            # the first matmul's output is kept; relu(x) and relu(x)^2 come again before the second's backward
            return _Layer(kept=self._input("linear_fc1", fp8) + inner, backward=backward + inner + fc2)
        return _Layer(kept, backward)

    def _attention(self, fp8: bool) -> _Layer:
        d, t = self.d, self.layout.tensor
        query, key = d.num_attention_heads * d.head_dim, d.num_query_groups * d.head_dim
        q, kv, out = self.act(query), self.act(2 * key), self.act(query)
        rows = self.tokens * d.num_attention_heads // t * 4  # log-sum-exp
        kept = self._input("linear_qkv", fp8) + out + rows
        if self.layout.frozen:
            given = out if self.layout.adapted("linear_proj") and not self.layout.adapter.dropout else 0
            kept += self.saved_input("linear_proj", out, fp8) - given  # the output is kept anyway
        elif fp8:
            kept += self.saved_input("linear_proj", out, True)
        documents, rows_copied = self.layout.documents, self.layout.documents and self.layout.micro_batch > 1
        if self.cpu and not rows_copied:
            # keys and values are views of the projection's output; queries are copied unless there is one group
            kept += q + kv + (q if d.num_query_groups // t > 1 or d.rotary_dim else 0)
            kept += kv // 2 if d.rotary_dim else 0
        else:
            kept += q + kv
        if rows_copied or (self.cpu and documents):
            kept += out  # of all documents, beside what the kernel keeps: joined, or back in the order of the rows
        project = self.gathered + out + self.weight("linear_proj")
        attend = out + q + kv  # gradients of the output, queries, keys and values
        split = attend + (q + kv) - 2 * q
        if not self.cpu:
            attend += 2 * q  # cuDNN sums the queries' gradient in float32
        return _Layer(kept, self.residual + max(project, attend, split))

    def _mamba(self, fp8: bool) -> _Layer:
        d = self.d
        projected, conv, inner = self.act(d.in_proj_size), self.act(d.conv_channels), self.act(d.d_inner)
        rows = self.tokens * d.mamba_num_groups // self.layout.tensor * 4
        out = self.saved_input("out_proj", inner, fp8)
        out_weight = self.gathered + inner + self.weight("out_proj")
        in_weight = self.weight("in_proj")
        # projected, the scan's output, the norm's output
        base = self._input("in_proj", fp8) + projected + inner + out + rows
        if self.fused:
            kept = base
            states = self.chunk_states()
            gram = self.tokens * KERNEL_CHUNK * d.mamba_num_groups // self.layout.tensor * 4
            steps = self.tokens * d.mamba_num_heads // self.layout.tensor * 4
            # convolution again, gradients of the projection and of x, B, C, of the norm's output and input; the states
            # of the chunks and their gradients in float32 and bfloat16; C B^T and its gradient; step sizes, decays
            kernel = 2 * conv + projected + 2 * inner + 8 * states + 2 * gram + 6 * steps - out
        else:
            kept = base + conv + (self.segment_starts() if self.cpu else 2 * rows)
            # the norm (gradients of its output, of y and of z), the scan (of z, y, x, B and C), the split of x, B, C
            scan = 2 * inner + conv + (self.scan_scratch() if self.cpu else 0)
            kernel = max(3 * inner - out, scan - out - inner, inner + 2 * conv - out - inner)
            if not self.cpu:
                kernel += 8 * self.chunk_states()
        after = -(2 * inner + (0 if self.fused else conv))  # out, y (and x, B, C) are spent
        join = 2 * projected + after  # gradients of z, x, B, C and dt, and their concatenation
        project = (
            projected + (self.residual if not self.gathered else 2 * self.gathered) + in_weight + after - projected
        )
        return _Layer(kept, self.residual + max(out_weight, kernel, join, project))

    @property
    def fused(self) -> bool:
        """Return True if mamba-ssm's fused kernel takes this rank's widths (`model.mixer.fused_obstacle`)."""
        d, t = self.d, self.layout.tensor
        return not self.cpu and not (d.conv_channels // t % FUSED_ALIGNMENT or d.in_proj_size // t % FUSED_ALIGNMENT)

    def chunk_states(self) -> int:
        """Return the elements of the states at the edges of a scan's chunks."""
        chunks = self.layout.micro_batch * math.ceil(self.layout.seq_length // self.layout.context / KERNEL_CHUNK)
        return chunks * self.d.d_inner // self.layout.tensor * self.d.mamba_state_dim

    def _segment(self) -> tuple[int, int]:
        """Return the tokens of a segment of our scan, and of its chunks (ops/ssd.py)."""
        chunk = min(CPU_CHUNK, self.layout.seq_length)
        heads = self.d.mamba_num_heads // self.layout.tensor
        tokens = max(CPU_SEGMENT_ELEMENTS // (heads * chunk), chunk)
        return max(tokens // chunk, 1) * chunk, chunk

    def scan_scratch(self) -> int:
        """Return the bytes of the scan's backward buffers, whose size does not grow with the sequence (ops/ssd.py)."""
        d, t = self.d, self.layout.tensor
        step, chunk = self._segment()
        tokens = min(step, self.tokens)
        inner, heads, width = d.d_inner // t, d.mamba_num_heads // t, d.mamba_num_groups * d.mamba_state_dim // t
        states = 2 * math.ceil(tokens / chunk + 1) * inner * d.mamba_state_dim
        return 4 * (tokens * (3 * heads * chunk + 9 * inner + 5 * width) + states)

    def segment_starts(self) -> int:
        """Return the bytes of the states that our scan keeps, one per segment of each sequence (ops/ssd.py)."""
        d, t = self.d, self.layout.tensor
        length = self.layout.seq_length
        step, chunk = self._segment()
        segments = math.ceil((length - length % chunk) / step) + (1 if length % chunk else 0)
        return self.layout.micro_batch * segments * d.d_inner // t * d.mamba_state_dim * 4

    def head(self) -> _Layer:
        """Return the final norm, output matrix and loss."""
        d = self.d
        rows = padded_vocabulary(d, self.layout.tensor)
        small = self.tokens * 32  # labels' positions, sums and losses
        entry = 2 * self.residual + self.norm_rows
        product = self.residual + self.gathered
        if self.layout.frozen:
            entry -= self.residual  # the output matrix asks for its input no more
        else:
            copied = self.cpu and self.float32 and self.layout.tensor == 1  # as in `weight`
            product += rows // self.layout.tensor * d.hidden_size * self.e
            product += self.tokens * min(rows, d.hidden_size) * 4 if copied else 0
            product += self.wide(rows * d.hidden_size)
        # The loss is computed in the logits' memory, by ours on the CPU, by Transformer Engine's on a GPU. On the
        # CPU torch's scatter copies 16-bit logits to float32.
        loss = 2 * self.logits if self.cpu and not self.float32 else 0
        return _Layer(entry + self.logits + small, max(product, loss))

    def distilling_head(self, teacher_states: int) -> _Layer:
        """Return `head` of a distillation: the loss takes its gradients in the forward, chunk by chunk of tokens, and
        keeps those of the states and of the output matrix (ops/distillation_loss.py).

        Args:
            teacher_states: bytes of the teacher's, gathered.
        """
        d = self.d
        rows, where = padded_vocabulary(d, self.layout.tensor) // self.layout.tensor, "cpu" if self.cpu else "cuda"
        chunk = min(self.tokens, max(1, LOSS_CHUNK[where] // rows))
        block = 3 * 4 * min(LOSS_BLOCK[where], chunk * rows)  # both models' logits and their gap in float32
        matrix = rows * d.hidden_size
        entry = 2 * self.residual + self.norm_rows + self.gathered + teacher_states
        product = chunk * d.hidden_size * self.e
        if self.cpu:  # the gradient of the output matrix is summed through a copy
            product = max(product, matrix * self.e + (product if self.float32 else 0))
            if self.layout.copied and not self.float32:  # the logits
                product = max(product, 4 * chunk * rows)
        kept = entry + self.whole + 4 * matrix + self.tokens * 32
        return _Layer(kept, max(2 * chunk * rows * self.e + max(block, product), matrix * self.e))

    def forward_peak(self, layers: range) -> int:
        """Return the peak bytes of a pass without gradients in one of these layers, from its input to its output."""
        again = replace(self.layout, recompute_mamba="none", recompute_ffn="none", recompute_attention="none")
        rank = _Rank(self.d, again)
        return max((rank.layer(index).kept + rank.residual for index in layers), default=0)

    def buffers(self, stage: int) -> int:
        """Return the bytes that are allocated once: Megatron's buffer for gathered inputs; on a GPU the GEMMs'
        workspaces and the stand-ins for weight gradients, one of each shape, that Transformer Engine returns where the
        matmul has summed them.
        """
        if self.cpu:
            return 2 * self.gathered  # the buffer, and gloo's copy
        layers = pipeline_layers(self.d.num_layers, self.layout.pipeline)[stage]
        table = gemm_table(self.d, self.layout.precision, self.layout.tensor, tokens=1)
        shapes = {(gemm.n, gemm.k) for gemm in table if gemm.layer in layers}
        last = stage == self.layout.pipeline - 1
        if self.layout.frozen:
            shapes = set()
        return GPU_WORKSPACE + sum(n * k for n, k in shapes) * self.e + (self.gathered if last else 0)


def stage_memory(definition: ModelDefinition, layout: Layout, stage: int) -> StageMemory:
    """Return the memory of one rank of a pipeline stage."""
    rank = _Rank(definition, layout)
    base = rank_parameters(definition, layout, stage)
    adapters = rank_adapters(definition, layout, stage)
    trained = adapters if layout.frozen else base
    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    weights = _sized(layout, base, WEIGHT_BYTES) + _sized(layout, adapters, WEIGHT_BYTES)
    beside = 0
    if layout.teacher is not None:
        beside = _sized(layout, rank_parameters(layout.teacher, layout, stage), WEIGHT_BYTES)
        beside += _fp8_weights(layout.teacher, layout, stage) if layout.fp8 else 0  # as stored: no backward
    if layout.fp8:
        weights += 2 * _fp8_weights(definition, layout, stage)  # as stored and transposed
    states = StageMemory(
        stage=stage,
        weights=weights,
        gradients=_sized(layout, trained, {"fp32": 4, "bf16": GRADIENT_BYTES[layout.gradients]}),
        optimizer=math.ceil(
            _sized(layout, trained, LEAN_OPTIMIZER_BYTES if layout.moments == "bf16" else OPTIMIZER_BYTES) / shards
        ),
        buffers=rank.buffers(stage),
        teacher=beside,
    )
    return max(_moments(definition, layout, states, rank), key=lambda moment: moment.peak)


def _sized(layout: Layout, parameters: tuple[int, int], by_precision: dict[str, int]) -> int:
    """Return the bytes of parameters, (all, of these in float32)."""
    total, in_float32 = parameters
    return (total - in_float32) * by_precision[layout.base_precision] + in_float32 * by_precision["fp32"]


def _moments(definition: ModelDefinition, layout: Layout, states: StageMemory, rank: _Rank) -> Iterator[StageMemory]:
    """Yield the states of a stage with what is held on top, at each moment that may be the peak."""
    stage, last = states.stage, states.stage == layout.pipeline - 1
    layers = pipeline_layers(definition.num_layers, layout.pipeline)[stage]
    in_flight = min(layout.micro_batches, layout.pipeline - stage)  # one forward, one backward (1F1B)
    teacher = None if layout.teacher is None else _Rank(layout.teacher, layout)
    sent = rank.residual + (0 if teacher is None else teacher.residual)
    kept: dict[str, int] = {}
    made = [(LAYER_NAMES[definition.pattern[index]], rank.layer(index)) for index in layers]
    for name, layer in made:
        kept[name] = kept.get(name, 0) + layer.kept * in_flight
    if not last and rank.cpu:  # on a GPU its memory is freed once it is sent (model/gpu_options.py)
        kept["stage output"] = sent * in_flight
    # between stages the next input is received before it is needed
    received = sent if layout.pipeline > 1 else 0
    if teacher is not None:
        # before the student's forward of the last micro-batch in flight
        held = {name: size // in_flight * (in_flight - 1) for name, size in kept.items()}
        theirs = teacher.forward_peak(pipeline_layers(teacher.d.num_layers, layout.pipeline)[stage])
        yield replace(states, activations=held, working=theirs + received, at="teacher")
    if last:
        head = rank.head() if teacher is None else rank.distilling_head(teacher.whole)
        yield replace(states, activations={**kept, "head": head.kept}, working=head.backward + received, at="head")
    for symbol in {definition.pattern[index] for index in layers}:
        lengths = rank.lengths(matrix for matrix, owner in TARGETS.items() if owner == symbol)
        yield replace(states, activations=dict(kept), working=lengths + received, at=LAYER_NAMES[symbol])
    for name, layer in reversed(made):
        yield replace(states, activations=dict(kept), working=layer.backward + received, at=name)
        kept[name] -= layer.kept
    yield replace(states, working=_optimizer_step(definition, layout, states), at="optimizer")


def _optimizer_step(definition: ModelDefinition, layout: Layout, states: StageMemory) -> int:
    """Return the bytes of the optimizer's step: clipping copies the largest gradient; gloo scatters the sums of
    gradients through a copy of all of them.

    Moments in bfloat16 are float32 for a part of the weights at a time. Beside float32 moments, gradient sums in
    bfloat16 are float32 for all.
    """
    largest = padded_vocabulary(definition, layout.tensor) // layout.tensor * definition.hidden_size * 4
    if layout.frozen:
        sides = [max(_rank_shape(definition, layout, matrix)) for matrix in layout.adapter.targets]
        largest = layout.adapter.rank * max(sides) * 4
    shards = layout.data if layout.distributed_optimizer else 1
    if layout.backend == "cpu" and layout.distributed_optimizer:
        return max(states.gradients, largest // shards)
    trained = states.gradients // GRADIENT_BYTES[layout.gradients]
    if layout.moments == "bf16":
        return 8 * min(trained, max(LEAN_PIECE, largest // 4)) // shards
    if layout.gradients == "bf16":
        return 4 * trained // shards
    return largest // shards


def plan_memory(definition: ModelDefinition, layout: Layout) -> list[StageMemory]:
    """Return the memory of one rank of every pipeline stage; the largest decides whether the layout fits."""
    return [stage_memory(definition, layout, stage) for stage in range(layout.pipeline)]


def largest_stage(definition: ModelDefinition, layout: Layout) -> StageMemory:
    """Return the stage that needs most."""
    return max(plan_memory(definition, layout), key=lambda stage: stage.peak)


def checkpoint_bytes(
    definition: ModelDefinition, precision: str, adapter: AdapterSchema | None = None
) -> dict[str, int]:
    """Return bytes on disk of a checkpoint, in all: `weights`, and `optimizer` (main weights and moments in float32).
    Of a run with adapters it holds those alone.
    """
    base = "fp32" if precision == "fp32" else "bf16"
    trained = trained_parameters(adapter or AdapterSchema(), definition)
    return {"weights": trained * WEIGHT_BYTES[base], "optimizer": trained * 12}
