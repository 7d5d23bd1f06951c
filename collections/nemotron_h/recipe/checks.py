"""Checks of a composed recipe: each names the key, the recipe, and the nearest value that fits."""

from __future__ import annotations

import dataclasses
import functools
import importlib

from omegaconf import OmegaConf

from nemotron_h.architecture.context import check_context_parallel
from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.architecture.frozen import check_frozen
from nemotron_h.architecture.gemms import FP8_FORMATS, check_gemms
from nemotron_h.architecture.vision import VISION, check_text_only
from nemotron_h.checkpoint.definition import check_repairable
from nemotron_h.core.errors import UserError
from nemotron_h.core.hub import is_hub, parse
from nemotron_h.core.spikes import LEAST
from nemotron_h.core.strict import check_folder, check_name, check_one_of, leaves, nearest
from nemotron_h.core.units import count_of, parse_count, seconds_of
from nemotron_h.data.blend import CONVERSATIONS, IMAGES, PAIRS, TEXTS, load_blend
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.data.short_rows import check_short_rows
from nemotron_h.recipe.overrides import check_overrides
from nemotron_h.schema.recipe import (
    BLEND_CHANGES,
    EXPONENTIAL,
    FP8_BACKENDS,
    NEWTON_SCHULZ,
    OPTIMIZER_CHANGES,
    OPTIMIZERS,
    PHASE_ORDERS,
    PIPELINES,
    PRECISIONS,
    RECOMPUTE,
    SCHEDULES,
    STAGES,
    STARTS,
    STATE_DTYPES,
    TRACKERS,
    CheckpointSchema,
    ExpertsSchema,
    LogSchema,
    OptimSchema,
    PrecisionOptionsSchema,
    RecipeConfig,
)

#: stage -> what its blend holds; the others read texts
READS = {"sft": CONVERSATIONS, "preference": PAIRS, "reason": PAIRS}
#: stage -> the keys that it reads and not every stage does; `recipe/stages` checks them, in a file per stage
OWN_KEYS = {
    "sft": ("adapter", "data.max_tiles", "data.tiling", "data.too_long"),
    "preference": ("adapter", "data.too_long", "preference"),
    "distill": ("distill",),
    "minipuzzle": ("distill", "minipuzzle"),
    "puzzle": ("distill", "puzzle"),
    "hybridise": ("distill", "hybridise"),
    "reason": ("data.too_long", "preference", "reason"),
}


def check(recipe: RecipeConfig, origin: str, trains: bool = True) -> None:
    """Check all that a type cannot: names, ranges, schedule, layout, phases, and sources without a value.

    Args:
        origin: the recipe or file to name in an error.
        trains: False takes models too that can be planned and not trained.
    Errors:
        UserError: names the key, the origin and what would fit.
    """
    if recipe.overrides:
        check_overrides(recipe.overrides, origin)
    definition = definition_of(recipe, origin)
    if trains:
        check_trainable(definition, origin)
    check_names(recipe, origin)
    check_checkpoint(recipe.checkpoint, origin)
    check_repairable(
        recipe.init.repair_embeddings and definition.tied_embeddings, f"{origin}: init.repair_embeddings = true"
    )
    check_stage(recipe, definition, origin)
    check_recompute(recipe, definition, origin)
    check_schedule(recipe, origin)
    check_steps(recipe, origin)
    check_optimizer_state(recipe, origin)
    check_optimizer(recipe, origin)
    check_layout(recipe, definition, origin)
    check_experts(recipe, definition, origin)
    if recipe.precision in FP8_FORMATS:
        check_gemms(
            definition,
            recipe.precision,
            seq_length=recipe.data.seq_length,
            micro_batch_size=recipe.data.micro_batch_size,
            tensor_parallel=recipe.parallel.tensor,
            sequence_parallel=recipe.parallel.sequence,
            context_parallel=recipe.parallel.context,
            bf16_edge_layers=recipe.precision_options.bf16_edge_layers,
            origin=origin,
        )
    check_sources(recipe, origin)
    check_blend(recipe, origin)


def definition_of(recipe: RecipeConfig, origin: str) -> ModelDefinition:
    """Return the recipe's model, validated against its own `expect`."""
    return definition_from_dict(OmegaConf.to_container(OmegaConf.structured(recipe.model)), origin)


def check_trainable(definition: ModelDefinition, origin: str) -> None:
    """Refuse a model of which a part can be planned and not trained."""
    for key, value in definition.planned_only().items():
        raise UserError(
            f"{origin}: model.{key} = {value} of model {definition.name}: training does not have it, megatron-core "
            "0.15.3 builds no hybrid with it",
            hint=f"leave it out of configs/model/{definition.name}.yaml and count model.expect anew, or take "
            "model=nano_30b_a3b, which has the other layers; nemotron-h plan takes it as it is",
        )


def check_stage(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Refuse keys that other stages read, then check what is this stage's own."""
    for key in sorted({key for keys in OWN_KEYS.values() for key in keys}.difference(OWN_KEYS.get(recipe.stage, ()))):
        value, default = (functools.reduce(getattr, key.split("."), each) for each in (recipe, RecipeConfig()))
        if value != default:
            stages = [stage for stage, keys in OWN_KEYS.items() if key in keys]
            raise UserError(
                f"{origin}: {key} is unused: stage is {recipe.stage}",
                hint=f"leave it out: it is for {' and '.join(stages)}",
            )
    if recipe.stage in ("distill", *PIPELINES):
        check_text_only(definition, f"{origin}: stage {recipe.stage}")
    if recipe.stage in OWN_KEYS:
        importlib.import_module(f"nemotron_h.recipe.stages.{recipe.stage}").check(recipe, definition, origin)


def check_optimizer_state(recipe: RecipeConfig, origin: str) -> None:
    """Allow bfloat16 in the optimizer beside bfloat16 weights alone, which only the distributed optimizer keeps."""
    check_distributed_optimizer(recipe.parallel.distributed_optimizer, recipe.precision != "fp32", f"{origin}: ")
    for key, value in (("moments", recipe.optim.moments), ("gradients", recipe.optim.gradients)):
        if value == "bf16" and recipe.precision == "fp32":
            raise UserError(
                f"{origin}: optim.{key} = 'bf16' with precision = 'fp32'",
                hint=f"leave optim.{key} out, or set precision to one with bfloat16 weights, such as bf16",
            )


def check_optimizer(recipe: RecipeConfig, origin: str) -> None:
    """Check that Muon has what it needs, and that its keys have a user."""
    optim, adapter = recipe.optim, recipe.adapter.kind
    check_one_of("optim.newton_schulz", optim.newton_schulz, NEWTON_SCHULZ, f"{origin}: ")
    check_muon(optim.name, recipe.parallel.distributed_optimizer, optim.moments, f"{origin}: ")
    if optim.frozen and adapter != "none":
        raise UserError(
            f"{origin}: optim.frozen = {list(optim.frozen)} with adapter.kind = {adapter!r}: adapters freeze all",
            hint="leave one of them out",
        )
    if optim.name == "adamw":
        for key in ("momentum", "newton_schulz", "qk_clip"):
            if (value := getattr(optim, key)) != getattr(OptimSchema(), key):
                raise UserError(
                    f"{origin}: optim.{key} = {value} is unused: optim.name is adamw",
                    hint=f"leave optim.{key} out, or set optim.name: muon",
                )
        return
    if optim.qk_clip is not None and (keys := [key for key in ("qkv_bias", "qk_norm") if getattr(recipe.model, key)]):
        raise UserError(
            f"{origin}: optim.qk_clip = {optim.qk_clip} shrinks the projections of queries and keys, which are not all "
            f"of the logits with model.{' and model.'.join(keys)}",
            hint="leave optim.qk_clip out",
        )
    if adapter != "none":
        raise UserError(
            f"{origin}: optim.name = 'muon' with adapter.kind = {adapter!r}: no matrix of a layer is trained",
            hint="leave optim.name out: adapters are trained by AdamW",
        )


def check_muon(name: str, distributed: bool, moments: str, where: str = "") -> None:
    """Refuse an unknown optimizer, and Muon without the distributed optimizer's float32 states."""
    check_one_of("optim.name", name, OPTIMIZERS, where)
    if name != "muon":
        return
    if not distributed:
        raise UserError(
            f"{where}optim.name = 'muon' with parallel.distributed_optimizer = false",
            hint="leave parallel.distributed_optimizer out: on one data-parallel rank nothing is split",
        )
    if moments != "fp32":
        raise UserError(
            f"{where}optim.moments = {moments!r} with optim.name = 'muon', whose momentum is float32",
            hint="leave optim.moments out: Muon has one moment where AdamW has two",
        )


def check_optimizer_change(value: str | None, where: str = "") -> None:
    """Refuse an unknown `resume.optimizer_change`; `where` stands before the key."""
    if value is not None:
        check_one_of("resume.optimizer_change", value, OPTIMIZER_CHANGES, where)


def check_distributed_optimizer(distributed: bool, bf16: bool, where: str = "") -> None:
    """Refuse the whole optimizer for bfloat16 weights: the run would end at its first checkpoint."""
    if bf16 and not distributed:
        raise UserError(
            f"{where}parallel.distributed_optimizer = false with bfloat16 weights: megatron-core cannot write a "
            "checkpoint of that optimizer where float32 weights stand beside them, as a Mamba-2 layer's do",
            hint="leave it out: on one data-parallel rank nothing is split; or set precision: fp32",
        )


def check_blend_change(value: str | None, where: str = "") -> None:
    """Refuse an unknown `resume.blend_change`, naming the nearest known one; `where` stands before the key."""
    if value is not None:
        check_one_of("resume.blend_change", value, BLEND_CHANGES, where)


def check_names(recipe: RecipeConfig, origin: str) -> None:
    """Check names, folders, and values that are one of a few words."""
    check_name("name", recipe.name, f"{origin}: ")
    check_name("model.name", recipe.model.name, f"{origin}: ")
    check_folder("log.dir", recipe.log.dir, f"{origin}: ")
    if recipe.data.root is not None:
        check_folder("data.root", recipe.data.root, f"{origin}: ")
    for key, checkpoint in named_checkpoints(recipe).items():
        if is_hub(checkpoint):
            parse(checkpoint, f"{origin}: {key}")
    for key, value, allowed in (
        ("stage", recipe.stage, [*STAGES, *PIPELINES]),
        ("precision", recipe.precision, PRECISIONS),
        ("precision_options.fp8_backend", recipe.precision_options.fp8_backend, FP8_BACKENDS),
        ("optim.moments", recipe.optim.moments, STATE_DTYPES),
        ("optim.gradients", recipe.optim.gradients, STATE_DTYPES),
        ("optim.schedule", recipe.optim.schedule, SCHEDULES),
    ):
        check_one_of(key, value, allowed, f"{origin}: ")
    check_trackers(recipe.log, origin)
    check_blend_change(recipe.resume.blend_change, f"{origin}: ")
    check_optimizer_change(recipe.resume.optimizer_change, f"{origin}: ")
    if not recipe.precision.startswith("fp8"):
        for key, value in dataclasses.asdict(PrecisionOptionsSchema()).items():
            if getattr(recipe.precision_options, key) != value:
                raise UserError(
                    f"{origin}: precision_options.{key} is unused: precision is {recipe.precision}",
                    hint="leave it out, or set precision: fp8_current_scaling or fp8_blockwise",
                )


def named_checkpoints(recipe: RecipeConfig) -> dict[str, str]:
    """Return key -> the checkpoint or run that a recipe names there."""
    named = {
        "init.checkpoint": recipe.init.checkpoint,
        "distill.teacher": recipe.distill and recipe.distill.teacher,
        **{f"{stage}.{key}": (part := getattr(recipe, stage)) and getattr(part, key) for stage, key in STARTS.items()},
        "preference.reference": recipe.preference and recipe.preference.reference,
    }
    return {key: checkpoint for key, checkpoint in named.items() if checkpoint}


def check_trackers(log: LogSchema, origin: str) -> None:
    """Check that trackers are known, each once, and that the project has a user and a name."""
    for tracker in log.trackers:
        check_one_of("log.trackers", tracker, TRACKERS, f"{origin}: ")
    if len(set(log.trackers)) < len(log.trackers):
        raise UserError(f"{origin}: log.trackers = {log.trackers} names one twice")
    if log.project is not None:
        if not log.project.strip():
            raise UserError(f"{origin}: log.project = {log.project!r} is no name", hint="leave it out, or write a name")
        if not {"wandb", "mlflow"} & set(log.trackers):
            raise UserError(
                f"{origin}: log.project is unused: log.trackers = {log.trackers}",
                hint="leave it out, or add wandb or mlflow to log.trackers",
            )


def check_checkpoint(checkpoint: CheckpointSchema, origin: str) -> None:
    """Check that a checkpoint is kept, and that `leave_after` is a duration."""
    if checkpoint.keep == 0:
        raise UserError(f"{origin}: checkpoint.keep = 0 keeps none", hint="set it to 1 or more, or -1 for all")
    if checkpoint.leave_after is not None:
        seconds_of(checkpoint.leave_after, f"{origin}: checkpoint.leave_after: ")


def check_recompute(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check that values are known, and for layer types that the model has."""
    counts = {**definition.layer_counts(), "logits": 1, VISION: bool(definition.encoder)}
    for kind, allowed in RECOMPUTE.items():
        key, value = f"recompute.{kind}", getattr(recipe.recompute, kind)
        check_one_of(key, value, allowed, f"{origin}: ")
        if value != "none" and not counts[kind]:
            unused = f"{origin}: {key} = {value!r} is unused: {definition.name} has no {kind} layers"
            raise UserError(unused, hint=f"leave {key} out")
    kinds = [kind.name for kind in definition.kinds]
    if recipe.recompute.offload and "layer" not in {getattr(recipe.recompute, kind) for kind in kinds}:
        layers = " ".join(f"recompute.{kind}=layer" for kind in kinds)
        raise UserError(f"{origin}: recompute.offload = true is unused: no layer is recomputed", hint=f"add {layers}")


def check_experts(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check that experts split over their ranks, and that keys of experts are for a model that has some."""
    parallel = recipe.parallel
    ranks = parallel.nodes * parallel.devices // parallel.pipeline
    check_expert_layout(
        definition, origin, expert=parallel.expert, tensor=parallel.tensor, sequence=parallel.sequence, ranks=ranks
    )
    if not definition.has_experts:
        for key, default in dataclasses.asdict(ExpertsSchema()).items():
            if (value := getattr(recipe.experts, key)) != default:
                raise UserError(
                    f"{origin}: experts.{key} = {value} is unused: model {definition.name} has no experts",
                    hint=f"leave experts.{key} out",
                )
    elif not parallel.distributed_optimizer and max(parallel.expert, parallel.tensor) > 1:
        raise UserError(
            f"{origin}: parallel.distributed_optimizer = false with parallel.expert = {parallel.expert} and "
            f"parallel.tensor = {parallel.tensor}: no other layout could read the states of the experts' optimizer",
            hint="leave parallel.distributed_optimizer out",
        )


def check_expert_layout(
    definition: ModelDefinition, origin: str, *, expert: int, tensor: int, sequence: bool, ranks: int
) -> None:
    """Check that experts split over their ranks, and that tokens do before they are sent to them.

    Args:
        expert, tensor, sequence: as `ParallelSchema`.
        ranks: of a pipeline stage.
    """
    definition.validate_expert_parallel(expert, ranks, origin)
    if definition.has_experts and tensor > 1 and not sequence:
        raise UserError(
            f"{origin}: parallel.tensor = {tensor} without parallel.sequence: each tensor-parallel rank would send all "
            "tokens to their experts",
            hint="set parallel.sequence: true",
        )


def check_schedule(recipe: RecipeConfig, origin: str) -> None:
    """Check learning rates, and that warm-up and decay fit into the run."""
    optim = recipe.optim
    tokens = count_of(recipe.tokens, "tokens", origin)
    warmup = count_of(optim.warmup_tokens, "optim.warmup_tokens", origin)
    if warmup >= tokens:
        raise UserError(
            f"{origin}: optim.warmup_tokens ({warmup:,}) is not shorter than the run ({tokens:,} tokens)",
            hint=f"warm up for less than {tokens:,} tokens, usually 1 % of the run or less",
        )
    check_learning_rates(optim.peak_lr, optim.final_lr, f"{origin}: ", exponential=optim.schedule == EXPONENTIAL)
    if optim.schedule == "cosine":
        if optim.decay_tokens is not None:
            raise UserError(
                f"{origin}: optim.decay_tokens is unused: a cosine decays from the warm-up to the end of the run",
                hint="leave it out, or set optim.schedule: wsd",
            )
        return
    if optim.decay_tokens is None:
        raise UserError(
            f"{origin}: optim.decay_tokens is missing",
            hint=f"optim.schedule: {optim.schedule} needs the length of its decay, such as 3.6T",
        )
    decay = count_of(optim.decay_tokens, "optim.decay_tokens", origin)
    if warmup + decay > tokens:
        raise UserError(
            f"{origin}: optim.warmup_tokens and optim.decay_tokens ({warmup:,} and {decay:,}) are longer than the run "
            f"({tokens:,} tokens)",
            hint=f"decay for {tokens - warmup:,} tokens or less",
        )


def check_learning_rates(peak_lr: float, final_lr: float, where: str = "", exponential: bool = False) -> None:
    """Check a schedule's peak and final rate; `where` stands before the key in an error."""
    if not peak_lr > 0:
        raise UserError(f"{where}optim.peak_lr = {peak_lr} is not positive")
    if not 0 <= final_lr <= peak_lr:
        raise UserError(
            f"{where}optim.final_lr = {final_lr} is not between 0 and optim.peak_lr = {peak_lr}",
            hint=f"the paper's 1 % of the peak is {peak_lr / 100:g}",
        )
    if exponential and final_lr == 0:
        raise UserError(
            f"{where}optim.final_lr is 0, which an exponential decay never reaches",
            hint=f"a 256th of the peak is {peak_lr / 256:.2g}; or set optim.schedule: wsd",
        )


def check_steps(recipe: RecipeConfig, origin: str) -> None:
    """Check that the run has the steps to measure, and those that spikes are told from."""
    data = recipe.data
    steps = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size).steps
    for step in recipe.precision_options.measured_steps:
        if not 1 <= step <= steps:
            raise UserError(
                f"{origin}: precision_options.measured_steps has {step}; the run has steps 1 to {steps:,}",
                hint="leave it out, or raise tokens",
            )
    if recipe.optim.skip_spikes and steps <= LEAST:
        raise UserError(
            f"{origin}: optim.skip_spikes is unused: the run has {steps:,} steps, and a spike takes {LEAST} before it",
            hint="leave it out, or raise tokens",
        )


def check_layout(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check that model, ranks, sequence and batch divide as the layout says."""
    data, parallel = recipe.data, recipe.parallel
    definition.validate_tensor_parallel(parallel.tensor, origin)
    definition.validate_pipeline_parallel(parallel.pipeline, origin)
    if recipe.optim.frozen:
        check_frozen(recipe.optim.frozen, definition, f"{origin}: optim.frozen", pipeline=parallel.pipeline)
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            f"{origin}: parallel.sequence is unused: parallel.tensor is 1, and sequences are split over those ranks",
            hint="set parallel.sequence: false, or parallel.tensor to 2 or more",
        )
    if parallel.sequence:
        _divides("data.seq_length", data.seq_length, "parallel.tensor (parallel.sequence)", parallel.tensor, origin)
    check_context_parallel(
        definition,
        parallel.context,
        origin,
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        seq_length=data.seq_length,
        micro_batch=data.micro_batch_size,
    )
    ranks, model_ranks = parallel.nodes * parallel.devices, parallel.tensor * parallel.pipeline * parallel.context
    by = "parallel.tensor * parallel.pipeline" + (" * parallel.context" if parallel.context > 1 else "")
    _divides("parallel.nodes * parallel.devices", ranks, by, model_ranks, origin)
    replicas = ranks // model_ranks
    _divides(
        "data.global_batch_size",
        data.global_batch_size,
        f"data.micro_batch_size * data-parallel size ({data.micro_batch_size} * {replicas})",
        data.micro_batch_size * replicas,
        origin,
        f"; parallel.nodes * parallel.devices = {ranks} leaves {replicas} data-parallel ranks, "
        f"data.micro_batch_size may be at most {data.global_batch_size // replicas}"
        if 1 < replicas <= data.global_batch_size
        else "",
    )


def _divides(key: str, value: int, by: str, size: int, origin: str, also: str = "") -> None:
    if value % size:
        fits = max(1, (2 * value + size) // (2 * size)) * size
        hint = f"the nearest is {fits}{also}"
        raise UserError(f"{origin}: {key} = {value} is not a multiple of {by} = {size}", hint=hint)


def check_sources(recipe: RecipeConfig, origin: str) -> None:
    """Check that every source is stated for a key, or a part, that exists."""
    values = dataclasses.asdict(recipe)
    for name, stated, content in (
        ("sources", recipe.sources, values),
        ("model.sources", recipe.model.sources, values["model"]),
    ):
        keys = [key for key, _ in leaves(content)]
        known = {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 2)}
        for key in stated:
            if key not in known:
                raise UserError(f"{origin}: {name} has {key!r}, which is no key", hint=nearest(key, known).strip())


def check_blend(recipe: RecipeConfig, origin: str) -> None:
    """Check that the blend exists, is of the stage's kind, and has a step for each phase in a run of this length."""
    data = recipe.data
    check_one_of("data.phase_order", data.phase_order, PHASE_ORDERS, f"{origin}: ")
    if data.phase_order != "blend" and recipe.stage != "pretrain":
        raise UserError(
            f"{origin}: data.phase_order = {data.phase_order} is unused: stage is {recipe.stage}",
            hint="leave it out: it is for pretrain",
        )
    horizon = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size)
    try:
        blend = load_blend(data.blend)
        rows = [span.steps * data.global_batch_size for span in phase_spans(blend.phases, horizon)]
        check_short_rows(blend.phases, rows, data.seq_length, data.phase_order)
    except UserError as error:
        raise UserError(f"{origin}: data.blend = {data.blend}: {error.message}", hint=error.hint) from error
    for name, source in blend.sources.items():
        if source.extend and parse_count(source.extend.tokens) > data.seq_length:
            raise UserError(
                f"{origin}: data.seq_length = {data.seq_length:,} is shorter than the samples of source {name}, which "
                f"are extended to {parse_count(source.extend.tokens):,} tokens",
                hint="raise data.seq_length, or lower extend.tokens in the blend",
            )
    reads, holds = READS.get(recipe.stage, TEXTS), blend.holds()
    if holds == IMAGES and recipe.stage == "sft" and recipe.model.vision is None:
        raise UserError(
            f"{origin}: data.blend = {data.blend} holds {holds}, and {recipe.model.name} reads text alone",
            hint="give the model an encoder, vision=internvit_300m (docs/vision.md), or name another blend",
        )
    if holds != reads and (holds, recipe.stage) != (IMAGES, "sft"):
        raise UserError(
            f"{origin}: data.blend = {data.blend} holds {holds}, and stage {recipe.stage} reads {reads}",
            hint="name another blend; docs/sft.md shows one of conversations, docs/preference.md one of pairs",
        )
