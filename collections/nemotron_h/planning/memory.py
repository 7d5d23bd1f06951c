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
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from nemotron_h.architecture.adapters import trained_parameters
from nemotron_h.architecture.blocks.block import Block, LayerMemory
from nemotron_h.architecture.definition import ModelDefinition, pipeline_layers, stage_blocks
from nemotron_h.architecture.frozen import EMBEDDING, OUTPUT, frozen_parameters
from nemotron_h.architecture.gemms import encoder_gemms, gemm_table
from nemotron_h.architecture.rank import Layout, Rank, padded_vocabulary
from nemotron_h.planning.muon import MOMENT_BYTES, saved_bytes, working_bytes
from nemotron_h.planning.vision import encoder_memory
from nemotron_h.schema.nemo_names import recompute_fields
from nemotron_h.schema.recipe import AdapterSchema, RecomputeSchema

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
#: logits of one model that a loss in chunks holds at once (ops/output_matmul.py: CHUNK_ELEMENTS), and those of them
#: that a distillation has in float32 (ops/distillation_loss.py: BLOCK_ELEMENTS)
LOSS_CHUNK = {"cpu": 1 << 25, "cuda": 1 << 28}
LOSS_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 26}
#: logits that a cross entropy has in float32 at once (ops/cross_entropy.py: BLOCK_ELEMENTS)
CROSS_ENTROPY_BLOCK = 1 << 20
#: ours: workspaces of cuBLAS that Transformer Engine and torch allocate once
GPU_WORKSPACE = 96 * 2**20


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
        activations: kept for the backward pass at the peak, by layer type, for `vision` and `projector`, and for the
            `head` (logits and loss), of all micro-batches in flight.
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


def rank_parameters(
    definition: ModelDefinition, layout: Layout, stage: int, but: Collection[str] = ()
) -> tuple[int, int]:
    """Return the parameters of one rank of a stage: all of them, and how many of these stay in float32.

    Args:
        but: parts that are left out (`nemotron_h.architecture.frozen`).
    """
    d, t = definition, layout.tensor
    total = in_float32 = 0
    for block in stage_blocks(d, layout.pipeline, stage):
        if block.name not in but:
            total += _on_rank(block, layout)
            in_float32 += block.float32_parameters(t)
    matrix, last = padded_vocabulary(d, t) // t * d.hidden_size, stage == layout.pipeline - 1
    shared = d.tied_embeddings and layout.pipeline == 1  # the embedding of a stage of its own is a second one
    total += matrix * (stage == 0 and EMBEDDING not in but)
    total += (matrix * (not shared) + d.hidden_size) * (last and OUTPUT not in but)
    if d.mtp_pattern and last:
        ends = d.hidden_size * (2 * d.hidden_size // t + 3) + matrix * (stage > 0)  # it embeds the tokens again
        total += ends + sum(_on_rank(block, layout) for block in d.mtp_blocks)
        in_float32 += sum(block.float32_parameters(t) for block in d.mtp_blocks)
    if d.encoder and stage == 0:
        total += d.encoder.rank_parameters(t, but)
    return total, in_float32


def _on_rank(block: Block, layout: Layout) -> int:
    """Return the parameters of a layer that one rank holds."""
    whole, experts = block.whole_parameters(), block.expert_parameters
    return whole + (block.parameters - whole - experts) // layout.tensor + experts // layout.expert


def rank_experts(definition: ModelDefinition, layout: Layout, stage: int, but: Collection[str] = ()) -> int:
    """Return the parameters of routed experts among those of one rank of a stage; `but` as of `rank_parameters`."""
    blocks = [block for block in stage_blocks(definition, layout.pipeline, stage) if block.name not in but]
    blocks += definition.mtp_blocks if stage == layout.pipeline - 1 else ()
    return sum(block.expert_parameters // layout.expert for block in blocks)


def rank_adapters(definition: ModelDefinition, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the adapters' numbers of one rank of a stage: all of them, and how many of these stay in float32."""
    return _adapters(definition, layout, stage, (False, True))


def _adapters(definition: ModelDefinition, layout: Layout, stage: int, routed: tuple[bool, ...]) -> tuple[int, int]:
    """Return `rank_adapters` of the matrices that routed experts have, of the others, or of both."""
    total = in_float32 = 0
    for block in stage_blocks(definition, layout.pipeline, stage):
        for matrix in block.matrices():
            if layout.adapted(matrix.name) and bool(matrix.experts) in routed:
                outputs, inputs = matrix.on_rank(layout.tensor)
                count = matrix.experts // layout.expert if matrix.experts else 1
                lengths = outputs if layout.adapter.kind == "dora" else 0
                total += count * (layout.adapter.rank * (outputs + inputs) + lengths)
                in_float32 += count * lengths
    return total, in_float32


def rank_trained(definition: ModelDefinition, layout: Layout, stage: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what one rank of a stage trains, beside routed experts and of them, each (all, of these in float32)."""
    if layout.frozen:
        return _adapters(definition, layout, stage, (False,)), _adapters(definition, layout, stage, (True,))
    total, in_float32 = rank_parameters(definition, layout, stage, layout.untrained)
    experts = rank_experts(definition, layout, stage, layout.untrained)
    return (total - experts, in_float32), (experts, 0)


def _fp8_weights(definition: ModelDefinition, layout: Layout, stage: int) -> int:
    """Return the weights of one rank of a stage whose matmuls FP8 takes."""
    table = gemm_table(
        definition,
        layout.precision,
        layout.tensor,
        tokens=1,
        bf16_edge_layers=layout.bf16_edge_layers,
        expert_parallel=layout.expert,
    )
    layers = pipeline_layers(definition.num_layers, layout.pipeline)[stage]
    return sum(gemm.n * gemm.k * gemm.count for gemm in table if gemm.dtype == "FP8" and gemm.layer in layers)


class _TrainingRank(Rank):
    """Sizes of one rank's tensors, with those of the output layer, the loss and the buffers."""

    def head(self) -> LayerMemory:
        """Return the final norm, output matrix and loss."""
        if self.layout.recompute_logits == "chunks":
            return self.chunked_head()
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
            product += self.wide(rows * d.hidden_size) if self.layout.tensor == 1 else 0
        # The loss is computed in the logits' memory, by ours on the CPU, by Transformer Engine's on a GPU. On the
        # CPU torch's scatter copies 16-bit logits to float32.
        loss = 2 * self.logits if self.cpu and not self.float32 else 0
        return LayerMemory(entry + self.logits + small, max(product, loss))

    def chunked_head(self) -> LayerMemory:
        """Return `head` where output matmul and loss run over chunks of tokens: the backward holds one chunk's logits,
        the gradients of all states and, in float32, of the output matrix (ops/cross_entropy.py).
        """
        d = self.d
        rows, where = padded_vocabulary(d, self.layout.tensor) // self.layout.tensor, "cpu" if self.cpu else "cuda"
        chunk, matrix = min(self.tokens, max(1, LOSS_CHUNK[where] // rows)), rows * d.hidden_size
        logits = chunk * rows
        block = 0 if self.float32 else 4 * min(max(CROSS_ENTROPY_BLOCK, rows), logits)
        if self.cpu and not self.float32:
            block = 4 * logits  # a copy of torch's scatter
        states = chunk * d.hidden_size * self.e
        trained = self.whole
        if not self.layout.frozen:
            trained += 4 * matrix
            # on the CPU the gradient of the output matrix is summed through a copy
            states = max(states, matrix * self.e + (states if self.float32 else 0)) if self.cpu else states
        kept = 2 * self.residual + self.norm_rows + self.gathered + self.tokens * 32
        return LayerMemory(kept, trained + logits * self.e + max(block, states))

    def distilling_head(self, teacher_states: int) -> LayerMemory:
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
        return LayerMemory(kept, max(2 * chunk * rows * self.e + max(block, product), matrix * self.e))

    def forward_peak(self, layers: range) -> int:
        """Return the peak bytes of a pass without gradients in one of these layers, from its input to its output."""
        rank = _TrainingRank(self.d, replace(self.layout, **recompute_fields(RecomputeSchema())))
        return max((rank.layer(index).kept + rank.residual for index in layers), default=0)

    def buffers(self, stage: int) -> int:
        """Return the bytes that are allocated once: Megatron's buffer for gathered inputs; on a GPU the GEMMs'
        workspaces and the stand-ins for weight gradients, one of each shape, that Transformer Engine returns where the
        matmul has summed them; and what layers hold until their next forward.
        """
        layers = pipeline_layers(self.d.num_layers, self.layout.pipeline)[stage]
        between = sum(self.layer(index).between for index in layers)
        if self.cpu:
            return 2 * self.gathered + between  # the buffer, and gloo's copy
        table = gemm_table(self.d, self.layout.precision, self.layout.tensor, tokens=1)
        shapes = {(gemm.n, gemm.k) for gemm in table if gemm.layer in layers}
        if stage == 0:
            shapes |= {(gemm.n, gemm.k) for gemm in encoder_gemms(self.d, self.layout.precision, self.layout.tensor, 1)}
        last = stage == self.layout.pipeline - 1
        if self.layout.frozen:
            shapes = set()
        return GPU_WORKSPACE + sum(n * k for n, k in shapes) * self.e + (self.gathered if last else 0) + between


def stage_memory(definition: ModelDefinition, layout: Layout, stage: int) -> StageMemory:
    """Return the memory of one rank of a pipeline stage."""
    rank = _TrainingRank(definition, layout)
    base = rank_parameters(definition, layout, stage)
    adapters = rank_adapters(definition, layout, stage)
    trained = adapters if layout.frozen else rank_parameters(definition, layout, stage, layout.untrained)
    others, experts = rank_trained(definition, layout, stage)
    state_bytes = LEAN_OPTIMIZER_BYTES if layout.moments == "bf16" else OPTIMIZER_BYTES
    weights = weight_bytes(layout, base) + weight_bytes(layout, adapters)
    beside = 0
    if layout.teacher is not None:
        beside = weight_bytes(layout, rank_parameters(layout.teacher, layout, stage))
        beside += _fp8_weights(layout.teacher, layout, stage) if layout.fp8 else 0  # as stored: no backward
    if layout.fp8:
        weights += 2 * _fp8_weights(definition, layout, stage)  # as stored and transposed
    states = StageMemory(
        stage=stage,
        weights=weights,
        gradients=_sized(layout, trained, {"fp32": 4, "bf16": GRADIENT_BYTES[layout.gradients]}),
        optimizer=math.ceil(
            _sized(layout, others, state_bytes) / layout.shards
            + _sized(layout, experts, state_bytes) / layout.expert_shards
            - saved_bytes(definition, layout, stage)
        ),
        buffers=rank.buffers(stage),
        teacher=beside,
    )
    return max(_moments(definition, layout, states, rank), key=lambda moment: moment.peak)


def weight_bytes(layout: Layout, parameters: tuple[int, int]) -> int:
    """Return the bytes of weights, (all, of these in float32)."""
    return _sized(layout, parameters, WEIGHT_BYTES)


def _sized(layout: Layout, parameters: tuple[int, int], by_precision: dict[str, int]) -> int:
    """Return the bytes of parameters, (all, of these in float32)."""
    total, in_float32 = parameters
    return (total - in_float32) * by_precision[layout.base_precision] + in_float32 * by_precision["fp32"]


def _moments(
    definition: ModelDefinition, layout: Layout, states: StageMemory, rank: _TrainingRank
) -> Iterator[StageMemory]:
    """Yield the states of a stage with what is held on top, at each moment that may be the peak."""
    stage, last = states.stage, states.stage == layout.pipeline - 1
    layers = pipeline_layers(definition.num_layers, layout.pipeline)[stage]
    in_flight = min(layout.micro_batches, layout.pipeline - stage)  # one forward, one backward (1F1B)
    teacher = None if layout.teacher is None else _TrainingRank(layout.teacher, layout)
    sent = rank.residual + (0 if teacher is None else teacher.residual)
    kept: dict[str, int] = {}
    encoder = encoder_memory(definition, layout) if stage == 0 else []
    for part, layer in encoder:
        kept[part] = kept.get(part, 0) + layer.kept * in_flight
    held = {name: size // in_flight * (in_flight - 1) for name, size in kept.items()}
    for part, layer in encoder:
        if not layer.kept:  # without a backward, and before the language model's forward
            yield replace(states, activations=held, working=layer.backward, at=part)
    blocks = [definition.blocks[index] for index in layers]
    still = rank
    if layout.untrained and not layout.frozen:  # parts that do not train keep what weights beside adapters do
        still = _TrainingRank(definition, replace(layout, adapter=AdapterSchema(kind="lora")))

    def of(part: str) -> _TrainingRank:
        return still if part in layout.untrained else rank

    passed = [(block.name, of(block.name).layer(index)) for block, index in zip(blocks, layers, strict=True)]
    for name, layer in passed:
        kept[name] = kept.get(name, 0) + layer.kept * in_flight
    newest = rank.residual if rank.offloaded else 0  # leaves the device when the next layer runs
    if not last and rank.cpu:  # on a GPU its memory is freed once it is sent (model/module.py)
        kept["stage output"] = sent * in_flight
    # between stages the next input is received before it is needed
    received = sent if layout.pipeline > 1 else 0
    if teacher is not None:
        # before the student's forward of the last micro-batch in flight
        held = {name: size // in_flight * (in_flight - 1) for name, size in kept.items()}
        theirs = teacher.forward_peak(pipeline_layers(teacher.d.num_layers, layout.pipeline)[stage])
        yield replace(states, activations=held, working=theirs + received, at="teacher")
    if last and definition.mtp_steps:
        kept["mtp"] = _mtp_activations(definition, rank) * in_flight
    if last:
        head = of(OUTPUT).distilling_head(teacher.whole) if teacher else of(OUTPUT).head()
        working = head.backward + received + newest
        yield replace(states, activations={**kept, "head": head.kept}, working=working, at="head")
    for block in dict.fromkeys(blocks):
        lengths = rank.lengths(block.matrices())
        yield replace(states, activations=dict(kept), working=lengths + received + newest, at=block.name)
    # the gradient of an output matrix that is the embedding waits for that of the embedding
    waits = 0
    if definition.tied_embeddings and layout.pipeline == 1 and not layout.frozen:
        waits = padded_vocabulary(definition, layout.tensor) // layout.tensor * definition.hidden_size * rank.e
    for name, layer in reversed(passed):
        yield replace(states, activations=dict(kept), working=layer.backward + received + waits, at=name)
        kept[name] -= layer.kept
    for part, layer in reversed(encoder):
        yield replace(states, activations=dict(kept), working=layer.backward * (layer.kept > 0) + waits, at=part)
        kept[part] -= layer.kept
    if waits:
        yield replace(states, working=3 * waits, at="head")  # both, and their sum
    step = max(_optimizer_step(definition, layout, states), working_bytes(definition, layout, stage))
    yield replace(states, working=step, at="optimizer")


@dataclass(frozen=True)
class HostInputs:
    """Inputs of recomputed layers that one rank has in host memory, of the stage that has most.

    Attributes:
        size: bytes of each.
        count: how many, of all micro-batches in flight.
    """

    size: int
    count: int

    @property
    def bytes(self) -> int:
        """Return the bytes of all: PyTorch pins powers of two."""
        return (1 << (self.size - 1).bit_length()) * self.count


def host_inputs(definition: ModelDefinition, layout: Layout) -> HostInputs | None:
    """Return the inputs that `recompute.offload` keeps in host memory; None where it does not."""
    rank = _TrainingRank(definition, layout)
    if not rank.offloaded:
        return None
    recomputed = [layout.recompute(block.name) == "layer" for block in definition.blocks]
    counts = (
        sum(recomputed[layers.start : layers.stop]) * min(layout.micro_batches, layout.pipeline - stage)
        for stage, layers in enumerate(pipeline_layers(definition.num_layers, layout.pipeline))
    )
    return HostInputs(rank.residual, max(counts))


def _mtp_activations(definition: ModelDefinition, rank: _TrainingRank) -> int:
    """Return what the block that predicts further tokens keeps, for every step: the joined inputs and their norms, its
    layers, and a head.
    """
    layers = sum(block.memory(rank, False).kept for block in definition.mtp_blocks)
    return definition.mtp_steps * (layers + 4 * rank.residual + 2 * rank.norm_rows + rank.head().kept)


def _optimizer_step(definition: ModelDefinition, layout: Layout, states: StageMemory) -> int:
    """Return the bytes of the optimizer's step: clipping copies the largest gradient; gloo scatters the sums of
    gradients through a copy of all of them.

    Moments in bfloat16 are float32 for a part of the weights at a time. Beside float32 moments, gradient sums in
    bfloat16 are float32 for all.
    """
    largest = padded_vocabulary(definition, layout.tensor) // layout.tensor * definition.hidden_size * 4
    if layout.frozen:
        matrices = (matrix for block in definition.blocks for matrix in block.matrices())
        sides = [max(matrix.on_rank(layout.tensor)) for matrix in matrices if layout.adapted(matrix.name)]
        largest = layout.adapter.rank * max(sides) * 4
    shards = layout.shards
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
    definition: ModelDefinition,
    precision: str,
    adapter: AdapterSchema | None = None,
    muon: int = 0,
    frozen: Collection[str] = (),
) -> dict[str, int]:
    """Return bytes on disk of a checkpoint, in all: `weights`, and `optimizer` (main weights and moments in float32).
    Of a run with adapters it holds those alone.

    Args:
        muon: parameters that Muon updates, which have one moment.
        frozen: parts that do not train (`nemotron_h.architecture.frozen`), which the optimizer has no state of.
    """
    base = "fp32" if precision == "fp32" else "bf16"
    trained = trained_parameters(adapter or AdapterSchema(), definition)
    states = trained - frozen_parameters(definition, frozen)
    return {"weights": trained * WEIGHT_BYTES[base], "optimizer": states * 12 - muon * MOMENT_BYTES}
