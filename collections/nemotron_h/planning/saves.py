"""Cost of checkpoints: bytes, files, seconds, and the interval at which they cost little. Pure arithmetic.

Each rank copies its own shard to host memory beside the next step, and writes it while training goes on. A shard is the
rank's share of its optimizer states and of the weights that it holds with other data-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.rank import Layout
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import brief, gib
from nemotron_h.planning.gpus import Gpu
from nemotron_h.planning.memory import rank_trained, weight_bytes
from nemotron_h.planning.muon import saved_bytes

#: float32 in a checkpoint whatever the optimizer keeps: main weight and two moments, a tensor each
STATES, STATE_BYTES = 3, 4
#: ours: seconds between the start of a save and its copy. Measured: 0.05 to 0.18 after the first two, 876 tensors on
#: two ranks of one machine; not measured over many nodes
AGREEMENT_S = 0.2
#: ours, an assumption: GB/s that a node writes, all nodes at once
STORAGE_GB_S = 1.0
#: bytes for each of which a rank writes a file, and how many at most (platform/checkpoint_writer.py)
FILE_BYTES, MOST_FILES = 1 << 28, 8
#: bytes of the index for each piece of a tensor, ours: 420 to 460 in checkpoints of an 86 M model in three layouts
INDEX_BYTES = 440
#: parameters of a bucket of gradients, of which each rank has a range: megatron-core's default, at least so many per
#: data-parallel rank
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
#: share of the training time that saving may cost
SHARE = 0.01
#: interruptions that nobody planned, and the GPU-hours that they came in: Llama 3 405B, 54 days on 16,384 H100
#: (arXiv 2407.21783, 3.3.4)
FAILURES, FAILURE_GPU_HOURS = 419, 54 * 24 * 16_384


@dataclass(frozen=True)
class SaveCost:
    """Cost of the checkpoints of a run.

    Attributes:
        bytes, rank_bytes, node_bytes: of one checkpoint: in all, of the rank with most, of a full node. The last two
            are staged in pinned host memory too.
        node_memory: host memory of a node in bytes; None where it is not known.
        nodes: how many there are.
        files: of tensors.
        index_bytes: of the index of their pieces.
        copy_seconds: until a rank's shard is in host memory; the update of the next step waits for it.
        write_seconds: until the checkpoint is on disk, while training goes on.
        storage_gb_s: assumed, of one node.
        step_seconds: of a step.
        every_steps: of the recipe.
        failure_seconds: mean time between failures of so many GPUs.
    """

    bytes: int
    rank_bytes: int
    node_bytes: int
    node_memory: float | None
    nodes: int
    files: int
    index_bytes: int
    copy_seconds: float
    write_seconds: float
    storage_gb_s: float
    step_seconds: float
    every_steps: int
    failure_seconds: float

    @property
    def interval_seconds(self) -> float:
        """Return the seconds of training between the recipe's checkpoints."""
        return self.every_steps * self.step_seconds

    @property
    def stopped_seconds(self) -> float:
        """Return the seconds that training stops for a save: to plan it, and for a copy that outlasts the next step."""
        return AGREEMENT_S + max(0.0, self.copy_seconds - self.step_seconds)

    @property
    def share(self) -> float:
        """Return the share of the time that the recipe's checkpoints stop training for."""
        return self.stopped_seconds / (self.interval_seconds + self.stopped_seconds)

    @property
    def least_steps(self) -> int:
        """Return the shortest interval, in steps, that costs under `SHARE` and lets each write end before the next."""
        seconds = max(self.stopped_seconds * (1 - SHARE) / SHARE, self.write_seconds)
        return max(1, math.ceil(seconds / self.step_seconds))

    @property
    def needed_gb_s(self) -> float:
        """Return the bandwidth of all nodes, in GB/s, with which a write takes as long as the recipe's interval."""
        return self.bytes / 1e9 / self.interval_seconds

    @property
    def lost_seconds(self) -> float:
        """Return the training that a failure costs on average: half an interval, and what is written then."""
        return self.interval_seconds / 2 + self.write_seconds

    @property
    def young_steps(self) -> int:
        """Return Young's interval, in steps: the square root of 2 x stop x time between failures (Young 1974, the first
        order of Daly 2006), which loses least to both, and no shorter than a write.
        """
        seconds = max(math.sqrt(2 * self.stopped_seconds * self.failure_seconds), self.write_seconds)
        return max(1, math.ceil(seconds / self.step_seconds))

    @property
    def warnings(self) -> list[str]:
        """Return what is too short or too small, with what to set."""
        found = []
        if self.interval_seconds < self.write_seconds:
            found.append(
                f"checkpoint.every_steps = {self.every_steps} is {brief(self.interval_seconds)}, and a write takes "
                f"{brief(self.write_seconds)}: each save waits for the one before; set {self.least_steps:,} or more"
            )
        if self.node_memory is not None and self.node_bytes > self.node_memory:
            found.append(
                f"a node stages {gib(self.node_bytes)} and has {gib(self.node_memory)} of memory: take more GPUs"
            )
        return found


def save_cost(
    definition: ModelDefinition,
    layout: Layout,
    gpu: Gpu,
    size: int,
    step_seconds: float,
    every_steps: int,
    storage_gb_s: float | None = None,
) -> SaveCost:
    """Return the cost of a run's checkpoints.

    Args:
        size: bytes of a checkpoint.
        step_seconds: of a step.
        every_steps: the recipe's interval.
        storage_gb_s: of a node's writes; None takes `STORAGE_GB_S`.
    Errors:
        UserError: no bandwidth.
    """
    storage = STORAGE_GB_S if storage_gb_s is None else storage_gb_s
    if not storage > 0:
        raise UserError(f"--storage = {storage}", hint="give the GB/s that a node writes, such as 2")
    rank = max(rank_bytes(definition, layout, stage) for stage in range(layout.pipeline))
    node = rank * min(gpu.per_node, layout.ranks)
    return SaveCost(
        bytes=size,
        rank_bytes=rank,
        node_bytes=node,
        node_memory=None if gpu.node_memory_gb is None else gpu.node_memory_gb * 1e9,
        nodes=math.ceil(layout.ranks / gpu.per_node),
        files=layout.ranks * min(MOST_FILES, math.ceil(rank / FILE_BYTES)),
        index_bytes=pieces(definition, layout) * INDEX_BYTES,
        copy_seconds=rank / (gpu.to_host_gb_s * 1e9),
        write_seconds=node / (storage * 1e9),
        storage_gb_s=storage,
        step_seconds=step_seconds,
        every_steps=every_steps,
        failure_seconds=FAILURE_GPU_HOURS / FAILURES / layout.ranks * 3600,
    )


def rank_bytes(definition: ModelDefinition, layout: Layout, stage: int) -> int:
    """Return the bytes of one rank's shard: weights and states, shared with the data-parallel ranks."""
    others, experts = rank_trained(definition, layout, stage)
    every = replace(layout, distributed_optimizer=True)  # weights are shared out whatever the optimizer
    return math.ceil(
        sum(
            (weight_bytes(layout, part) + part[0] * STATES * STATE_BYTES) / ranks
            for part, ranks in ((others, every.shards), (experts, every.expert_shards))
        )
        - saved_bytes(definition, every, stage)
    )


def pieces(definition: ModelDefinition, layout: Layout) -> int:
    """Return the entries of the index: a tensor is cut by the tensor-parallel ranks that split it, its states also
    where a rank's range of a bucket ends. With Muon they are fewer: matrices have one state less.
    """
    tensors = _tensors(definition, layout)
    cuts = 0
    for stage in range(layout.pipeline) if layout.distributed_optimizer else ():
        (others, exact), (experts, exact_experts) = rank_trained(definition, layout, stage)
        apart = layout.base_precision != "fp32"  # weights in float32 have a bucket of their own
        buckets = _buckets(layout, stage, others, layout.shards) + bool(exact and apart)
        cuts += buckets * (layout.shards - 1) * layout.tensor
        if experts:
            shards = layout.expert_shards
            buckets = _buckets(layout, stage, experts, shards) + bool(exact_experts and apart)
            cuts += buckets * (shards - 1) * layout.expert
    return tensors + STATES * (tensors + cuts)


def _tensors(definition: ModelDefinition, layout: Layout) -> int:
    """Return the pieces of a checkpoint's tensors, of weights or of a state of the optimizer."""
    if layout.frozen:
        matrices = [matrix for block in definition.blocks for matrix in block.matrices() if layout.adapted(matrix.name)]
        rows = 2 if layout.adapter.kind == "dora" else 1  # of the matrix: B, lengths
        return sum(matrix.experts * (1 + rows) if matrix.experts else 1 + rows * layout.tensor for matrix in matrices)
    # a norm before each layer and the final one; embedding and output beside what the layers have
    layers = sum(1 + block.pieces(layout.tensor) for block in (*definition.blocks, *definition.mtp_blocks))
    return layers + 1 + (1 if definition.tied_embeddings else 2) * layout.tensor


def _buckets(layout: Layout, stage: int, parameters: int, ranks: int) -> int:
    """Return the buckets of a stage's gradients that so many ranks share."""
    if layout.backend == "cpu" or stage > 0:  # reduced at once; megatron-core makes buckets of the first stage's alone
        return 1
    return max(1, parameters // max(BUCKET, BUCKET_PER_RANK * ranks))
