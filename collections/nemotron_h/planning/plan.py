"""All that can be said of a recipe before a GPU is touched, as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from nemotron_h.architecture.adapters import trained_parameters
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.frozen import frozen_parameters
from nemotron_h.architecture.gemms import GemmGroup, encoder_gemms, fold, gemm_table
from nemotron_h.architecture.rank import Layout, padded_vocabulary
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import BYTES, count_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.phases import Horizon
from nemotron_h.planning.flops import FlopsByPart, flops_per_token, mean_flops
from nemotron_h.planning.gpus import Gpu, gpu
from nemotron_h.planning.inference import InferenceMemory, Serving, inference_memory
from nemotron_h.planning.layouts import Remedy, Row, exchanged_bytes, layout_of, remedies, step_flops, sweep
from nemotron_h.planning.memory import HostInputs, StageMemory, checkpoint_bytes, host_inputs, plan_memory
from nemotron_h.planning.muon import MuonCost, muon_cost
from nemotron_h.planning.saves import SaveCost, save_cost
from nemotron_h.planning.schedule import Schedule, default_mfu, plan_schedule
from nemotron_h.planning.teacher_logits import token_bytes
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig


@dataclass(frozen=True)
class Plan:
    """A recipe's plan.

    Attributes:
        name: of the recipe.
        definition: its model.
        layout: of the training run.
        gpu: that it is planned for.
        mfu: model FLOPs utilisation assumed, of the peak of the recipe's precision.
        mfu_source: where that is from.
        flops: per token, forward and backward, on average over the run's sequences.
        flops_of: tokens of a sequence -> operations per token there, forward and backward.
        teacher_flops: of a distillation's teacher per token, forward alone; None where none is loaded.
        teacher_logits: bytes of the cache of a teacher's logits that the recipe names; 0 where it names none.
        muon: cost of a step of Muon; None for AdamW.
        stages: memory of one rank of every pipeline stage.
        host_inputs: layers' inputs of one rank in host memory; None where they stay on the GPU.
        remedies: settings that make it fit; empty where it does, or nothing tried helps.
        schedule: steps, phases, time.
        checkpoint: bytes on disk of one checkpoint.
        keep: checkpoints that stay on disk; -1 is all.
        saves: cost of the checkpoints in time, host memory and bandwidth.
        context: tokens of a sequence in inference.
        inference: bytes of a BF16 model with one sequence of so many tokens.
        inference_fp4: the same in FP4 (paper 3): weights and keys and values.
        gemms: matmuls of the layers and their precision.
    """

    name: str
    definition: ModelDefinition
    layout: Layout
    gpu: Gpu
    mfu: float
    mfu_source: str
    flops: FlopsByPart
    flops_of: dict[int, float]
    teacher_flops: FlopsByPart | None
    teacher_logits: int
    muon: MuonCost | None
    stages: list[StageMemory]
    host_inputs: HostInputs | None
    remedies: list[Remedy]
    schedule: Schedule
    checkpoint: dict[str, int]
    keep: int
    saves: SaveCost
    context: int
    inference: InferenceMemory
    inference_fp4: InferenceMemory
    gemms: list[GemmGroup]

    @property
    def largest(self) -> StageMemory:
        """Return the stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def trained(self) -> int:
        """Return the parameters that are trained: the adapters', or all but the frozen ones."""
        still = frozen_parameters(self.definition, self.layout.untrained)
        return trained_parameters(self.layout.adapter, self.definition) - still

    @property
    def fits(self) -> bool:
        """Return True if the largest stage fits the GPU, and what a node keeps for its GPUs its own memory."""
        memory = self.saves.node_memory
        return self.largest.peak <= self.gpu.memory and (memory is None or self.node_host_bytes <= memory)

    @property
    def node_host_bytes(self) -> int:
        """Return the host memory of a node for layers' inputs and, beside them, for its shards in a save."""
        if self.host_inputs is None:
            return 0
        return self.host_inputs.bytes * min(self.gpu.per_node, self.layout.ranks) + self.saves.node_bytes

    @property
    def exchanged(self) -> int:
        """Return the bytes that a rank sends to context-parallel ranks in a step."""
        return exchanged_bytes(self.definition, self.layout)

    def layers(self) -> dict[str, dict[str, int]]:
        """Return layer type -> number of layers and their parameters together."""
        blocks = self.definition.blocks
        return {
            kind.name: {
                "layers": self.definition.count(kind.letter),
                "parameters": sum(block.parameters for block in blocks if block.letter == kind.letter),
            }
            for kind in self.definition.kinds
        }

    def sweep(self) -> list[Row]:
        """Return other layouts of the same batch on the same GPUs, fastest first."""
        return sweep(self.definition, self.layout, self.gpu, self.schedule.tokens_per_second)

    def _saves(self) -> dict[str, Any]:
        derived = ("interval_seconds", "share", "least_steps", "needed_gb_s", "lost_seconds", "young_steps", "warnings")
        return {**asdict(self.saves), **{name: getattr(self.saves, name) for name in derived}}

    def _teacher(self) -> dict[str, Any] | None:
        model = self.layout.teacher
        if model is None:
            return None
        return {"model": model.name, "parameters": model.parameters, "flops_per_token": self.teacher_flops.total}

    def _vision(self) -> dict[str, Any] | None:
        encoder = self.definition.encoder
        if encoder is None:
            return None
        return {
            "encoder": encoder.widths.name,
            "parameters": encoder.parameters,
            "projector_parameters": encoder.projector.parameters,
            "tokens_per_tile": encoder.tokens_per_tile,
            "tiles_per_sequence": encoder.tiles(self.layout.seq_length),
            "flops_per_tile": encoder.flops_per_tile(frozen=self.layout.untrained),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; bytes, seconds and operations are numbers."""
        schedule = self.schedule
        return {
            "recipe": self.name,
            "model": self.definition.name,
            "pattern": self.definition.pattern,
            "parameters": self.definition.parameters,
            "active_parameters": self.definition.active_parameters,
            "mtp_parameters": self.definition.mtp_parameters,
            "vision": self._vision(),
            "planned_only": self.definition.planned_only(),
            "trained_parameters": self.trained,
            "layers": self.layers(),
            "flops_per_token": {**asdict(self.flops), "total": self.flops.total, "linear": self.flops.linear},
            "flops_per_token_of_length": {str(length): flops for length, flops in self.flops_of.items()},
            "teacher": self._teacher(),
            "muon": None if self.muon is None else asdict(self.muon),
            "layout": {**asdict(replace(self.layout, teacher=None)), "ranks": self.layout.ranks},
            "exchanged_bytes": self.exchanged,
            "gpu": asdict(self.gpu),
            "memory": {
                "stages": [{**asdict(stage), "peak": stage.peak} for stage in self.stages],
                "peak": self.largest.peak,
                "limit": self.gpu.memory,
                "fits": self.fits,
                "host_inputs": None if self.host_inputs is None else asdict(self.host_inputs),
                "node_host_bytes": self.node_host_bytes,
                "remedies": [asdict(remedy) for remedy in self.remedies],
            },
            "schedule": {
                "tokens": schedule.tokens,
                "steps": schedule.steps,
                "warmup_steps": schedule.warmup_steps,
                "phases": [{**asdict(span), "date": _date(schedule.date(span.first_step))} for span in schedule.phases],
                "end": _date(schedule.date(schedule.steps)),
                "mfu": self.mfu,
                "mfu_source": self.mfu_source,
                "tokens_per_second": schedule.tokens_per_second,
                "step_seconds": schedule.step_seconds,
                "seconds": schedule.seconds,
                "gpu_hours": schedule.gpu_hours,
                "checkpoints": schedule.checkpoints,
            },
            "checkpoint_bytes": self.checkpoint,
            "saves": self._saves(),
            "teacher_logits_bytes": self.teacher_logits,
            "inference": {
                "context": self.context,
                "bf16": {**asdict(self.inference), "total": self.inference.total},
                "fp4": {**asdict(self.inference_fp4), "total": self.inference_fp4.total},
            },
            "gemms": [{**asdict(group.gemm), "layers": group.layers} for group in self.gemms],
        }


def _date(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat(timespec="minutes")


def make_plan(
    recipe: RecipeConfig,
    gpu_name: str = "h100",
    mfu: float | None = None,
    start: datetime | None = None,
    context: int | None = None,
    storage: float | None = None,
) -> Plan:
    """Plan a recipe.

    Args:
        recipe: composed and checked.
        gpu_name: a name of `configs/gpus.yaml`.
        mfu: utilisation of the peak of the recipe's precision, in (0, 1]; None takes `default_mfu`.
        start: when the run begins.
        context: tokens of a sequence in inference; None takes the training's.
        storage: GB/s that a node writes; None takes `planning.saves.STORAGE_GB_S`.
    Errors:
        UserError: unknown GPU, a utilisation outside of (0, 1], or a bandwidth that is none.
    """
    origin = f"recipe {recipe.name}"
    definition = definition_of(recipe, origin)
    device = gpu(gpu_name)
    layout = layout_of(recipe)
    assumed, source = default_mfu(recipe.precision) if mfu is None else (mfu, "--mfu")
    if not 0 < assumed <= 1:
        raise UserError(f"--mfu = {assumed}", hint="a utilisation lies in (0, 1]: 0.4 is 40 %")
    context = recipe.data.seq_length if context is None else context
    if context < 1:
        raise UserError(f"--context = {context}", hint="give the tokens of a sequence, 1 or more")
    frozen = recipe.optim.frozen
    trained = {"adapter": recipe.adapter, "micro_batch": recipe.data.micro_batch_size, "frozen": frozen}
    stages, teacher = plan_memory(definition, layout), layout.teacher
    fits = max(stage.peak for stage in stages) <= device.memory
    tokens_per_step = recipe.data.seq_length * recipe.data.global_batch_size
    table = gemm_table(
        definition,
        recipe.precision,
        layout.tensor,
        tokens=layout.seq_length // layout.context * layout.micro_batch,
        bf16_edge_layers=layout.bf16_edge_layers,
        sequence_parallel=layout.sequence,
        expert_parallel=layout.expert,
    )
    tiles = definition.encoder.tiles(layout.seq_length) * layout.micro_batch if definition.encoder else 0
    schedule = plan_schedule(
        tokens=count_of(recipe.tokens, "tokens", origin),
        tokens_per_step=tokens_per_step,
        warmup_tokens=count_of(recipe.optim.warmup_tokens, "optim.warmup_tokens", origin),
        phases=load_blend(recipe.data.blend).phases,
        tokens_per_second=layout.ranks * device.peak(recipe.precision) * assumed / step_flops(definition, layout),
        gpus=layout.ranks,
        checkpoint_every=recipe.checkpoint.every_steps,
        start=start,
    )
    muon = muon_cost(definition, layout)
    by_muon = muon.parameters if muon else 0
    checkpoint = checkpoint_bytes(definition, recipe.precision, recipe.adapter, by_muon, frozen)
    size, every = sum(checkpoint.values()), recipe.checkpoint.every_steps
    return Plan(
        name=recipe.name,
        definition=definition,
        layout=layout,
        gpu=device,
        mfu=assumed,
        mfu_source=source,
        flops=mean_flops(definition, layout.lengths, **trained),
        flops_of={length: flops_per_token(definition, length, **trained).total for length in layout.lengths},
        teacher_flops=None if teacher is None else mean_flops(teacher, layout.lengths, training=False),
        teacher_logits=_cache_bytes(recipe, definition, layout, origin),
        muon=muon,
        stages=stages,
        host_inputs=host_inputs(definition, layout),
        remedies=[] if fits else remedies(definition, layout, device),
        schedule=schedule,
        checkpoint=checkpoint,
        keep=recipe.checkpoint.keep,
        saves=save_cost(definition, layout, device, size, schedule.step_seconds, every, storage),
        context=context,
        inference=inference_memory(definition, Serving(context)),
        inference_fp4=inference_memory(definition, Serving(context, weight_bytes=BYTES["fp4"], kv_bytes=BYTES["fp4"])),
        gemms=[*fold(encoder_gemms(definition, recipe.precision, layout.tensor, tiles)), *fold(table)],
    )


def _cache_bytes(recipe: RecipeConfig, definition: ModelDefinition, layout: Layout, origin: str) -> int:
    """Return the bytes of the teacher's logits on disk, where the recipe reads them from there."""
    if recipe.stage != "distill" or not recipe.distill.teacher_logits:
        return 0
    data = recipe.data
    steps = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size).steps
    windows = (steps + recipe.log.validation_batches) * data.global_batch_size
    vocabulary = padded_vocabulary(definition, layout.tensor)
    return windows * data.seq_length * token_bytes(recipe.distill.top_k, vocabulary, recipe.precision)


def parts_by_stage(stages: Sequence[StageMemory]) -> list[str]:
    """Return the names of all parts, in the order of a table."""
    names: dict[str, None] = {}
    for stage in stages:
        names.update(dict.fromkeys(stage.parts()))
    last = [name for name in ("working", "buffers") if name in names]
    return [name for name in names if name not in last] + last
