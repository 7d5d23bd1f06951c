"""Layouts of a recipe: the one it has, what would make it fit, and a table of others. Pure arithmetic."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from omegaconf import OmegaConf

from nemotron_h.architecture.adapters import check_adapter
from nemotron_h.architecture.context import check_addressed, check_context_parallel, context_sizes
from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict, stage_blocks
from nemotron_h.architecture.frozen import LANGUAGE, frozen_parameters, frozen_parts
from nemotron_h.architecture.gemms import check_gemms
from nemotron_h.architecture.rank import Layout
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.definition import read_model
from nemotron_h.checkpoint.hub_cache import path_of
from nemotron_h.core.errors import UserError
from nemotron_h.core.hub import is_hub
from nemotron_h.core.units import count_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.planning.flops import mean_flops, recomputed_per_token
from nemotron_h.planning.gpus import Gpu
from nemotron_h.planning.memory import WEIGHT_BYTES, largest_stage
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.nemo_names import recompute_fields
from nemotron_h.schema.recipe import RECOMPUTE, ModelSchema, RecipeConfig, RecomputeSchema

#: ours: share of the time that each doubling of tensor parallelism within a node costs (its collectives, and matmuls
#: that get smaller)
TENSOR_COST = 0.04
#: ours: the same for context parallelism; not measured
CONTEXT_COST = 0.05
#: ours: the same for expert parallelism, whose exchanges of tokens go over the ranks of a stage; not measured
EXPERT_COST = 0.03


def recompute_choices(definition: ModelDefinition) -> dict[str, dict[str, str]]:
    """Return what a sweep tries, from the least recomputation to the most: name -> kind of layers -> setting."""
    counts = {**definition.layer_counts(), VISION: bool(definition.encoder)}
    kinds = [kind for kind, count in counts.items() if count and kind in RECOMPUTE]
    ffns = [kind for kind in kinds if "activation" in RECOMPUTE[kind]]
    experts = [kind.name for kind in definition.kinds if kind.distributed]
    choices = {
        "none": {},
        "ffn activation": dict.fromkeys(ffns, "activation"),
        "ffn layer": dict.fromkeys(ffns, "layer"),
        "experts layer": dict.fromkeys(experts, "layer"),
        "all layers": dict.fromkeys(kinds, "layer"),
    }
    return {name: settings for name, settings in choices.items() if settings or name == "none"}


def _recomputed(layout: Layout, settings: dict[str, str]) -> tuple[str, Layout]:
    """Return settings as a command line takes them, and the layout with them."""
    text = " ".join(f"recompute.{kind}={value}" for kind, value in settings.items())
    return text, replace(layout, **{f"recompute_{kind}": value for kind, value in settings.items()})


def layout_of(recipe: RecipeConfig) -> Layout:
    """Return the layout of a composed recipe on GPUs; its ranks and its batch divide (`nemotron_h.recipe.checks`)."""
    parallel, data = recipe.parallel, recipe.data
    short = tuple(short_lengths(recipe).items())
    replicas = parallel.nodes * parallel.devices // (parallel.tensor * parallel.pipeline * parallel.context)
    return Layout(
        seq_length=data.seq_length,
        micro_batch=data.micro_batch_size,
        documents=data.document_reset or bool(short),
        short=short,
        micro_batches=data.global_batch_size // (replicas * data.micro_batch_size),
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=replicas,
        expert=parallel.expert,
        sequence=parallel.sequence,
        distributed_optimizer=parallel.distributed_optimizer,
        precision=recipe.precision,
        bf16_edge_layers=recipe.precision_options.bf16_edge_layers,
        optimizer=recipe.optim.name,
        moments=recipe.optim.moments,
        gradients=recipe.optim.gradients,
        **recompute_fields(replace(recipe.recompute, logits="chunks") if recipe.distill else recipe.recompute),
        adapter=recipe.adapter,
        untrained=_untrained(recipe),
        teacher=teacher_of(recipe),
    )


def short_lengths(recipe: RecipeConfig) -> dict[int, float]:
    """Return tokens of a short sequence -> share of the run's tokens, over all phases of the recipe's blend."""
    phases = load_blend(recipe.data.blend).phases
    if not any(phase.short for phase in phases):
        return {}
    tokens = count_of(recipe.tokens, "tokens", f"recipe {recipe.name}")
    horizon, lengths = Horizon(tokens, recipe.data.seq_length * recipe.data.global_batch_size), {}
    for span in phase_spans(phases, horizon):
        if (short := phases[span.index].short) is not None:
            share = lengths.get(short.seq_length, 0.0) + short.share * span.steps / horizon.steps
            lengths[short.seq_length] = share
    return lengths


def _untrained(recipe: RecipeConfig) -> tuple[str, ...]:
    frozen = recipe.optim.frozen
    if LANGUAGE not in frozen:  # a plan builds its definition once
        return tuple(frozen)
    return frozen_parts(frozen, definition_of(recipe, f"recipe {recipe.name}"))


def teacher_of(recipe: RecipeConfig) -> ModelDefinition | None:
    """Return the model that a distillation loads beside its student: of the checkpoint that the recipe names, or, where
    that is not on this machine, the shipped model of the run's name. None where none is loaded.

    Errors:
        UserError: the checkpoint is not here, and no shipped model has its name.
    """
    if recipe.stage != "distill" or recipe.distill.teacher_logits:
        return None
    path, origin = path_of(recipe.distill.teacher), f"recipe {recipe.name}: distill.teacher"
    models = Path(str(files("nemotron_h.configs"))) / "model"
    shipped = models / f"{path.name}.yaml"
    if is_hub(recipe.distill.teacher):  # Nemotron-H-56B-Base-8K is a nemotron_h_56b
        name = re.sub(r"\W+", "_", path.name.partition("--")[2].lower())
        shipped = next((f for f in sorted(models.glob("*.yaml"), reverse=True) if name.startswith(f.stem)), shipped)
    # a run that was only begun, or whose checkpoints were removed, tells nothing yet
    tells = path.is_file() or (path / folders.RECORD).is_file() or folders.newest(path) is not None
    if not tells and not shipped.is_file():
        raise UserError(
            f"{origin}: {path} is no checkpoint on this machine, and no shipped model is called {path.name!r}: its "
            "size is not known",
            hint="name the teacher's checkpoint, or a run named as its model: distill.teacher=runs/nemotron_h_56b",
        )
    read = read_model(path if tells else shipped, origin)
    typed = OmegaConf.merge(OmegaConf.structured(ModelSchema), read)  # YAML takes 1e-5 for text
    return definition_from_dict(OmegaConf.to_container(typed), origin)


def step_flops(definition: ModelDefinition, layout: Layout) -> float:
    """Return the operations of a step per token: forward and backward, and of a teacher the forward."""
    adapted = {"adapter": layout.adapter, "micro_batch": layout.micro_batch, "frozen": layout.untrained}
    own = mean_flops(definition, layout.lengths, **adapted).total
    return own if layout.teacher is None else own + mean_flops(layout.teacher, layout.lengths, training=False).total


def empty_flops(definition: ModelDefinition, layout: Layout) -> float:
    """Return the operations of a step per token that heads take which are filled up for context-parallel ranks."""
    split = layout.tensor, layout.context
    return 3 * sum(
        share * block.empty_flops(length, *split)
        for length, share in layout.lengths.items()
        for block in definition.blocks
    )


def relative_speed(definition: ModelDefinition, layout: Layout) -> float:
    """Return the useful work per time of a layout, relative to one without parallelism or recomputation.

    A simple model, ours: the pipeline idles (P - 1) of (m + P - 1) of its time, every doubling of tensor or context
    parallelism costs `TENSOR_COST` or `CONTEXT_COST`, of expert parallelism `EXPERT_COST`, recomputed operations and
    those of empty heads take time as all others.
    """
    pipeline = layout.micro_batches / (layout.micro_batches + layout.pipeline - 1)
    tensor = 1 - TENSOR_COST * math.log2(layout.tensor)
    context = 1 - CONTEXT_COST * math.log2(layout.context)
    again = {name: layout.recompute(name) in ("layer", "chunks") for name in RECOMPUTE}
    model = step_flops(definition, layout)
    empty = empty_flops(definition, layout)
    passes = sum(
        share * recomputed_per_token(definition, length, again, layout.adapter)
        for length, share in layout.lengths.items()
    )
    recompute = model / (model + passes + empty)
    expert = 1 - EXPERT_COST * math.log2(layout.expert)
    return pipeline * tensor * context * expert * recompute


def exchanged_bytes(definition: ModelDefinition, layout: Layout) -> int:
    """Return the bytes that a rank sends to context-parallel ranks in a step, of the pipeline stage that sends most:
    forward and backward, forward once more of layers that are recomputed, and of a teacher forward alone; on the first
    stage the image tokens of its share of tiles, and their gradients.
    """
    encoder, tokens = definition.encoder, layout.seq_length // layout.context * layout.micro_batch

    def values(model: ModelDefinition, stage: int, trained: bool) -> int:
        passes = {block: 2 + (layout.recompute(block.name) == "layer") if trained else 1 for block in model.blocks}
        blocks = stage_blocks(model, layout.pipeline, stage)
        return sum(block.exchanged(layout.tensor, layout.context) * passes[block] for block in blocks)

    def images(stage: int) -> int:
        if stage or not encoder:
            return 0
        share = math.ceil(encoder.tiles(layout.seq_length) * layout.micro_batch / layout.context)
        trained = not layout.frozen and not {VISION, PROJECTOR} <= {*layout.untrained}
        return share * encoder.tokens_per_tile * definition.hidden_size * (1 + trained) * layout.context

    sent = max(
        tokens * (values(definition, stage, True) + (values(layout.teacher, stage, False) if layout.teacher else 0))
        + images(stage)
        for stage in range(layout.pipeline)
    )
    size = WEIGHT_BYTES[layout.base_precision] * layout.micro_batches
    return sent * size * (layout.context - 1) // layout.context


@dataclass(frozen=True)
class Remedy:
    """A change that makes a layout fit: settings as a command line takes them, and the peak with them, in bytes."""

    settings: str
    peak: int


def _spread(changed: Layout, before: Layout, ranks: int | None = None) -> Layout | None:
    """Spread the batch over the data-parallel ranks of the changed layout, or return None where that cannot be; `ranks`
    in all, None is as many as before.
    """
    ranks = ranks or before.ranks
    batch = before.micro_batch * before.micro_batches * before.data
    replicas = ranks // (changed.tensor * changed.pipeline * changed.context)
    if replicas < 1 or replicas * changed.tensor * changed.pipeline * changed.context != ranks:
        return None
    if batch % (replicas * changed.micro_batch) or (changed.tensor * changed.context * replicas) % changed.expert:
        return None
    return replace(changed, data=replicas, micro_batches=batch // (replicas * changed.micro_batch))


def tensor_sizes(definition: ModelDefinition, largest: int) -> list[int]:
    """Return the powers of two up to `largest` that every sharded dimension divides by."""
    sizes = []
    for size in (1, 2, 4, 8, 16):
        try:
            definition.validate_tensor_parallel(size, definition.name)
        except UserError:
            continue
        if size <= largest:
            sizes.append(size)
    return sizes


def _doublings(sizes: list[int]) -> list[int]:
    """Return the powers of two among sizes, up to 64 (ours: that of the longest published run, Nemotron 3 Super's)."""
    return [size for size in sizes if size in (1, 2, 4, 8, 16, 32, 64)]


def expert_sizes(definition: ModelDefinition, ranks: int) -> list[int]:
    """Return the powers of two of the ranks of a pipeline stage that experts split over; 1 without experts."""
    counts = [getattr(block, key) for block in definition.blocks for key in block.distributed]
    common = math.gcd(ranks, *counts) if counts else 1
    return [size for size in (2**power for power in range(common.bit_length())) if common % size == 0]


def _changes(definition: ModelDefinition, layout: Layout, per_node: int) -> Iterator[list[tuple[str, Layout | None]]]:
    """Yield kinds of change, each from the smallest step to the largest."""
    yield [_recomputed(layout, settings) for settings in recompute_choices(definition).values() if settings]
    if layout.recompute_logits == "none":
        yield [_recomputed(layout, {"logits": "chunks"})]
    if not layout.recompute_offload and any(layout.recompute(kind.name) == "layer" for kind in definition.kinds):
        yield [("recompute.offload=true", replace(layout, recompute_offload=True))]
    smaller = [n for n in range(layout.micro_batch - 1, 0, -1) if layout.micro_batch % n == 0]
    yield [
        (
            f"data.micro_batch_size={n}",
            replace(layout, micro_batch=n, micro_batches=layout.micro_batches * layout.micro_batch // n),
        )
        for n in smaller
    ]
    if layout.tensor > 1 and not layout.sequence:
        yield [("parallel.sequence=true", replace(layout, sequence=True))]
    yield [
        (f"parallel.tensor={n} parallel.sequence=true", _spread(replace(layout, tensor=n, sequence=True), layout))
        for n in tensor_sizes(definition, per_node)
        if n > layout.tensor
    ]
    yield [
        (f"parallel.expert={n}", replace(layout, expert=n))
        for n in expert_sizes(definition, layout.ranks // layout.pipeline)
        if n > layout.expert
    ]
    yield [
        (f"parallel.context={n}", _spread(replace(layout, context=n), layout))
        for n in _doublings(context_sizes(definition, layout.tensor))
        if n > layout.context
    ]
    yield [
        (f"parallel.pipeline={n}", _spread(replace(layout, pipeline=n), layout))
        for n in (2, 4, 8, 16)
        if layout.pipeline < n <= definition.num_layers
    ]
    if layout.distributed_optimizer:
        batch = layout.micro_batches * layout.data
        yield [
            (
                f"--gpus {layout.ranks * n}",
                replace(layout, data=layout.data * n, micro_batches=batch // layout.data // n),
            )
            for n in (2, 4, 8, 16, 32, 64)
            if layout.micro_batches % n == 0
        ]


def refusal(definition: ModelDefinition, layout: Layout) -> str:
    """Return the reason why training does not take the layout; empty where it does."""
    for model in (definition, *([] if layout.teacher is None else [layout.teacher])):
        try:
            check_context_parallel(model, layout.context, "", tensor=layout.tensor, sequence=False)
        except UserError:
            return f"{model.name}'s heads do not split over context parallel {layout.context}"
        try:
            tokens = layout.micro_batch * layout.seq_length
            check_addressed(model, tokens, "", tensor=layout.tensor, context=layout.context)
        except UserError:
            return f"{tokens:,} tokens on a rank are more than mamba-ssm's kernels address"
    if definition.has_experts and layout.tensor > 1 and not layout.sequence:
        return "experts take tensor parallel with sequence parallel alone"
    if layout.seq_length % (parts := layout.context * (layout.tensor if layout.sequence else 1)):
        return f"{layout.seq_length} tokens do not split over {parts} ranks"
    try:
        check_adapter(layout.adapter, definition, "adapter", pipeline=layout.pipeline)
    except UserError:
        return "a pipeline stage has no layer with an adapter"
    for model in (definition, *([] if layout.teacher is None else [layout.teacher])):
        try:
            check_gemms(
                model,
                layout.precision,
                seq_length=layout.seq_length,
                micro_batch_size=layout.micro_batch,
                tensor_parallel=layout.tensor,
                sequence_parallel=layout.sequence,
                context_parallel=layout.context,
                bf16_edge_layers=layout.bf16_edge_layers,
            )
        except UserError:
            return "FP8 does not take the widths of one rank"
    return ""


def remedies(definition: ModelDefinition, layout: Layout, gpu: Gpu) -> list[Remedy]:
    """Return changes to settings, each of which makes the layout fit the GPU; empty where none of those tried does.

    The smallest step of every kind (recompute, offload, micro-batch, sequence, tensor and pipeline parallel, more GPUs)
    that suffices; with all layers recomputed on top where no single kind does.
    """
    for prefix, base in (("", layout), _everything(definition, layout)):
        found = []
        for kind in _changes(definition, base, gpu.per_node):
            for settings, changed in kind:
                if changed is None or refusal(definition, changed):
                    continue
                peak = largest_stage(definition, changed).peak
                if peak <= gpu.memory:
                    found.append(Remedy(f"{prefix}{settings}", peak))
                    break
        if found:
            return found
    return []


def _everything(definition: ModelDefinition, layout: Layout) -> tuple[str, Layout]:
    settings, changed = _recomputed(layout, recompute_choices(definition)["all layers"])
    return f"{settings} ", changed


@dataclass(frozen=True)
class Row:
    """A layout of a sweep.

    Attributes:
        layout: what it is.
        recompute: name of its recomputation, a key of `recompute_choices`.
        peak: bytes of its largest stage.
        fits: whether the GPU holds that.
        tokens_per_second: of all GPUs, by `relative_speed`.
        step_seconds: of one step.
        refused: why training does not take the layout, empty where it does.
    """

    layout: Layout
    recompute: str
    peak: int
    fits: bool
    tokens_per_second: float
    step_seconds: float
    refused: str


def sweep(definition: ModelDefinition, layout: Layout, gpu: Gpu, tokens_per_second: float) -> list[Row]:
    """Return layouts of the same batch on the same number of GPUs, fastest first.

    Args:
        layout: the recipe's own; `tokens_per_second` is what it reaches, the others follow by `relative_speed`.
    """
    own = relative_speed(definition, layout)
    tokens = layout.seq_length * layout.micro_batch * layout.micro_batches * layout.data
    rows = []
    models = [definition, *([] if layout.teacher is None else [layout.teacher])]
    sizes = set.intersection(*(set(tensor_sizes(model, gpu.per_node)) for model in models))
    choices = recompute_choices(definition)
    for tensor in sorted(sizes):
        contexts = {layout.context, *_doublings(context_sizes(definition, tensor))}
        for pipeline in (n for n in (1, 2, 4, 8) if n <= min(model.num_layers for model in models)):
            for context in sorted(contexts):
                shape = replace(
                    layout, tensor=tensor, pipeline=pipeline, context=context, sequence=tensor > 1, expert=1
                )
                spread = _spread(shape, layout)
                if spread is None:
                    continue
                base = RecomputeSchema(logits=layout.recompute_logits, offload=layout.recompute_offload)
                plain = replace(spread, **recompute_fields(base))
                experts = expert_sizes(definition, layout.ranks // pipeline)
                for (name, settings), expert in itertools.product(choices.items(), experts):
                    _, tried = _recomputed(replace(plain, expert=expert), settings)
                    peak = largest_stage(definition, tried).peak
                    speed = tokens_per_second * relative_speed(definition, tried) / own
                    refused = refusal(definition, tried)
                    rows.append(Row(tried, name, peak, peak <= gpu.memory, speed, tokens / speed, refused))
    order = list(choices)
    return sorted(rows, key=lambda row: (-row.tokens_per_second, order.index(row.recompute)))


def fewest_gpus(definition: ModelDefinition, layout: Layout, gpu: Gpu) -> int | None:
    """Return the smallest power of two of GPUs on which `sweep` has a layout of the same batch that fits and that
    training takes; None where there is none.
    """
    models = [definition, *([] if layout.teacher is None else [layout.teacher])]
    sizes = sorted(set.intersection(*(set(tensor_sizes(model, gpu.per_node)) for model in models)), reverse=True)
    batch = layout.micro_batch * layout.micro_batches * layout.data
    _, recomputed = _everything(definition, layout)
    # bytes that every layout holds: the weights; where all are trained, twice float32 or more
    still = frozen_parameters(definition, layout.untrained)
    parameters = definition.parameters + definition.vision_parameters
    least = parameters * 2 if layout.frozen else parameters * 8 - still * 6
    for gpus in (2**power for power in range((batch * 8 * max(sizes)).bit_length())):
        if least > gpus * gpu.memory:
            continue
        # the most of them needs the least memory
        for tensor, pipeline in itertools.product(sizes, (8, 4, 2, 1)):
            for context in reversed(_doublings(context_sizes(definition, tensor))):
                axes = {"tensor": tensor, "pipeline": pipeline, "context": context}
                shape = replace(recomputed, **axes, sequence=tensor > 1, expert=1)
                spread = _spread(shape, layout, gpus)
                if (
                    spread is None
                    or pipeline > min(model.num_layers for model in models)
                    or refusal(definition, spread)
                ):
                    continue
                spread = replace(spread, expert=max(expert_sizes(definition, gpus // pipeline)))
                if largest_stage(definition, spread).peak <= gpu.memory:
                    return gpus
    return None


def best(rows: list[Row]) -> Row | None:
    """Return the fastest row that fits and that training takes; of equally fast ones that which recomputes least."""
    return next((row for row in rows if row.fits and not row.refused), None)
