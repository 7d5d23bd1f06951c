"""What makes a composed recipe impossible: each check names the key, the recipe, and the nearest value that fits."""

from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from nemotron_h.architecture.adapters import check_adapter
from nemotron_h.architecture.definition import ATTENTION, FFN, LAYER_NAMES, MAMBA, ModelDefinition, definition_from_dict
from nemotron_h.architecture.gemms import check_gemms
from nemotron_h.core.duration import seconds_of
from nemotron_h.core.errors import UserError
from nemotron_h.core.sizes import BYTES
from nemotron_h.core.strict import check_folder, check_name, check_one_of, nearest
from nemotron_h.data.blend import CONVERSATIONS, PAIRS, TEXTS, load_blend, parse_count
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.recipe.overrides import check_overrides
from nemotron_h.schema.provenance import leaves
from nemotron_h.schema.recipe import (
    AGGREGATIONS,
    BLEND_CHANGES,
    FP8_BACKENDS,
    METRICS,
    ORDERS,
    PIPELINES,
    PRECISIONS,
    PREFERENCE_LOSSES,
    RANKS,
    RECOMPUTE,
    SCHEDULES,
    SPEEDS,
    STAGES,
    STARTS,
    STATE_DTYPES,
    TOO_LONG,
    BudgetSchema,
    CheckpointSchema,
    GridSchema,
    PrecisionOptionsSchema,
    RecipeConfig,
)

#: stage -> what its blend holds; the others read texts
READS = {"sft": CONVERSATIONS, "preference": PAIRS}


def check(recipe: RecipeConfig, origin: str) -> None:
    """Check all that a type cannot: names, ranges, schedule, layout, phases, and sources without a value.

    Args:
        origin: the recipe or file to name in an error.
    Errors:
        UserError: names the key, the origin and what would fit.
    """
    check_overrides(recipe.overrides, origin)
    definition = definition_of(recipe, origin)
    check_names(recipe, origin)
    check_checkpoint(recipe.checkpoint, origin)
    check_stage(recipe, origin)
    check_minipuzzle(recipe, definition, origin)
    check_recompute(recipe, definition, origin)
    check_adapter(recipe.adapter, definition, f"{origin}: adapter", pipeline=recipe.parallel.pipeline)
    check_schedule(recipe, origin)
    check_measured_steps(recipe, origin)
    check_optimizer_state(recipe, origin)
    check_layout(recipe, definition, origin)
    check_gemms(
        definition,
        recipe.precision,
        seq_length=recipe.data.seq_length,
        micro_batch_size=recipe.data.micro_batch_size,
        tensor_parallel=recipe.parallel.tensor,
        sequence_parallel=recipe.parallel.sequence,
        bf16_edge_layers=recipe.precision_options.bf16_edge_layers,
        origin=origin,
    )
    check_sources(recipe, origin)
    check_blend(recipe, origin)


def definition_of(recipe: RecipeConfig, origin: str) -> ModelDefinition:
    """The recipe's model, validated against its own `expect`."""
    return definition_from_dict(OmegaConf.to_container(OmegaConf.structured(recipe.model)), origin)


def count_of(value: str, key: str, origin: str) -> int:
    """A token count such as 15T."""
    try:
        return parse_count(value)
    except ValueError as error:
        raise UserError(f"{origin}: {key}: {error}") from error


def check_optimizer_state(recipe: RecipeConfig, origin: str) -> None:
    """bfloat16 in the optimizer: only beside bfloat16 weights, which only the distributed optimizer keeps."""
    check_distributed_optimizer(recipe.parallel.distributed_optimizer, recipe.precision != "fp32", f"{origin}: ")
    for key, value in (("moments", recipe.optim.moments), ("gradients", recipe.optim.gradients)):
        if value == "bf16" and recipe.precision == "fp32":
            raise UserError(
                f"{origin}: optim.{key} = 'bf16' with precision = 'fp32'",
                hint=f"leave optim.{key} out, or set precision to one with bfloat16 weights, such as bf16",
            )


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
    for key, value, allowed in (
        ("stage", recipe.stage, [*STAGES, *PIPELINES]),
        ("precision", recipe.precision, PRECISIONS),
        ("precision_options.fp8_backend", recipe.precision_options.fp8_backend, FP8_BACKENDS),
        ("optim.moments", recipe.optim.moments, STATE_DTYPES),
        ("optim.gradients", recipe.optim.gradients, STATE_DTYPES),
        ("optim.schedule", recipe.optim.schedule, SCHEDULES),
    ):
        check_one_of(key, value, allowed, f"{origin}: ")
    check_blend_change(recipe.resume.blend_change, f"{origin}: ")
    if not recipe.precision.startswith("fp8"):
        for key, value in dataclasses.asdict(PrecisionOptionsSchema()).items():
            if getattr(recipe.precision_options, key) != value:
                raise UserError(
                    f"{origin}: precision_options.{key} is unused: precision is {recipe.precision}",
                    hint="leave it out, or set precision: fp8_current_scaling or fp8_blockwise",
                )


def check_checkpoint(checkpoint: CheckpointSchema, origin: str) -> None:
    """Check that a checkpoint stays, and that the time of a process is one."""
    if checkpoint.keep == 0:
        raise UserError(f"{origin}: checkpoint.keep = 0 keeps none", hint="set it to 1 or more, or -1 for all")
    if checkpoint.leave_after is not None:
        seconds_of(checkpoint.leave_after, f"{origin}: checkpoint.leave_after: ")


def check_stage(recipe: RecipeConfig, origin: str) -> None:
    """No key of another stage."""
    data = recipe.data
    check_preference(recipe, origin)
    check_distill(recipe, origin)
    if recipe.adapter.kind != "none" and recipe.stage not in ("sft", "preference"):
        raise UserError(
            f"{origin}: adapter.kind = {recipe.adapter.kind!r} is for stages sft and preference; {recipe.stage} trains "
            "all weights",
            hint="leave adapter out",
        )
    if recipe.stage in ("sft", "preference"):
        check_one_of("data.too_long", data.too_long or "", TOO_LONG, f"{origin}: ")
        if not data.document_reset:
            raise UserError(f"{origin}: data.document_reset = false", hint="packed conversations are always reset")
        if recipe.resume.blend_change is not None:
            raise UserError(
                f"{origin}: resume.blend_change is for pretraining",
                hint="start a run with other conversations from this one's weights: init.checkpoint",
            )
    elif data.too_long is not None:
        raise UserError(f"{origin}: data.too_long is unused: {recipe.stage} reads text", hint="leave it out")
    if recipe.stage in PIPELINES and recipe.init.checkpoint is not None:
        raise UserError(f"{origin}: init.checkpoint is unused: minipuzzle.parent is what is compressed")


#: stage with a part of its name -> where to begin with that part
OWN_PART = {
    "preference": "defaults: [/base/preference] has most of it",
    "minipuzzle": "defaults: [/compression: minipuzzle_tiny] has one of the files of configs/compression",
}


def has_own_part(recipe: RecipeConfig, stage: str, origin: str) -> bool:
    """Whether the recipe is of a stage whose part has its name; other stages must not have the part, this one must."""
    given = getattr(recipe, stage) is not None
    if recipe.stage != stage:
        if given:
            raise UserError(f"{origin}: {stage} is unused: stage is {recipe.stage}", hint="leave it out")
        return False
    if not given:
        raise UserError(f"{origin}: {stage} is missing", hint=OWN_PART[stage])
    return True


#: key of `minipuzzle.grid` -> the letter of the layers that it counts, or the key of the model that it narrows
GRID = {
    "attention": ATTENTION,
    "mamba": MAMBA,
    "ffn": FFN,
    "depth": "num_layers",
    "ffn_hidden_size": "ffn_hidden_size",
    "hidden_size": "hidden_size",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
}


def check_minipuzzle(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """The part `minipuzzle`, of that stage and of no other."""
    part = recipe.minipuzzle
    if not has_own_part(recipe, "minipuzzle", origin):
        return
    where = f"{origin}: "
    check_one_of("minipuzzle.rank", part.rank, RANKS, where)
    check_one_of("minipuzzle.layer_metric", part.layer_metric, METRICS, where)
    check_one_of("minipuzzle.aggregation", part.aggregation, AGGREGATIONS, where)
    check_one_of("minipuzzle.order", part.order, ORDERS, where)
    check_one_of("minipuzzle.start", part.start, STARTS, where)
    check_one_of("minipuzzle.budget.speedup_by", part.budget.speedup_by, SPEEDS, where)
    if part.short > part.keep:
        raise UserError(
            f"{where}minipuzzle.short = {part.short} is more than the {part.keep} candidates that minipuzzle.keep keeps"
        )
    if part.evaluate is not None and "{checkpoint}" not in part.evaluate:
        raise UserError(f"{where}minipuzzle.evaluate does not name {{checkpoint}}", hint="my_eval.py {checkpoint}")
    _check_budget(part.budget, origin)
    _check_grid(part.grid, definition, origin)
    _check_distillations(recipe, origin)


def _check_budget(budget: BudgetSchema, origin: str) -> None:
    if budget.memory_gib is None and budget.parameters is None:
        raise UserError(
            f"{origin}: minipuzzle.budget has no limit", hint="give memory_gib (and context), parameters, or both"
        )
    for key in ("weights", "kv_cache", "states"):
        check_one_of(f"minipuzzle.budget.{key}", getattr(budget, key), BYTES, f"{origin}: ")
    if budget.memory_gib is not None and budget.context is None:
        raise UserError(
            f"{origin}: minipuzzle.budget.context is missing: keys and values take memory by token",
            hint="give the tokens of a sequence, such as 1048576",
        )
    for key in ("parameters", "least_parameters"):
        if (value := getattr(budget, key)) is not None:
            count_of(value, f"minipuzzle.budget.{key}", origin)


def _check_grid(grid: GridSchema, definition: ModelDefinition, origin: str) -> None:
    values = dataclasses.asdict(grid)
    if not any(values.values()):
        raise UserError(f"{origin}: minipuzzle.grid varies nothing", hint=f"give values of {', '.join(values)}")
    for key, given in values.items():
        counted = key in LAYER_NAMES.values()
        most = definition.count(GRID[key]) if counted else getattr(definition, GRID[key])
        for value in given:
            if not (0 if counted else 1) <= value <= most:
                raise UserError(
                    f"{origin}: minipuzzle.grid.{key} has {value}; {definition.name} has {most}",
                    hint=f"give values from {0 if counted else 1} to {most}",
                )


def _check_distillations(recipe: RecipeConfig, origin: str) -> None:
    part, step = recipe.minipuzzle, recipe.data.seq_length * recipe.data.global_batch_size
    short = count_of(part.short_tokens, "minipuzzle.short_tokens", origin)
    warmup = count_of(recipe.optim.warmup_tokens, "optim.warmup_tokens", origin)
    if short <= max(warmup, step):
        raise UserError(
            f"{origin}: minipuzzle.short_tokens ({short:,}) is not longer than the warm-up ({warmup:,} tokens) and a "
            f"step ({step:,})",
            hint="distil for longer, or warm up for less",
        )
    try:
        phase_spans(load_blend(recipe.data.blend).phases, Horizon(short, step))
    except UserError as error:
        raise UserError(f"{origin}: minipuzzle.short_tokens: {error.message}", hint=error.hint) from error
    if count_of(part.score_tokens, "minipuzzle.score_tokens", origin) < recipe.data.seq_length:
        raise UserError(
            f"{origin}: minipuzzle.score_tokens ({part.score_tokens}) is less than one sequence",
            hint=f"at least data.seq_length, {recipe.data.seq_length:,}",
        )


def check_preference(recipe: RecipeConfig, origin: str) -> None:
    """The part `preference`, of that stage and of no other: a known loss with what it reads."""
    chosen = recipe.preference
    if not has_own_part(recipe, "preference", origin):
        return
    check_one_of("preference.loss", chosen.loss, PREFERENCE_LOSSES, f"{origin}: ")
    if chosen.loss == "dpo":
        for key, default in (("gt_reward_scale", 1.0), ("reward_gap", None)):
            if getattr(chosen, key) != default:
                raise UserError(
                    f"{origin}: preference.{key} is unused: dpo reads no rewards",
                    hint="leave it out, or take preference.loss: rpo_bwd_kl",
                )


def check_distill(recipe: RecipeConfig, origin: str) -> None:
    """The part `distill`: a teacher (in a compression that is the parent) and a loss; of no other stage."""
    chosen = recipe.distill
    if recipe.stage == "minipuzzle" and chosen is not None and chosen.teacher:
        raise UserError(f"{origin}: distill.teacher is unused: the parent teaches", hint="leave it out")
    if recipe.stage not in ("distill", "minipuzzle"):
        if chosen is not None:
            raise UserError(f"{origin}: distill is unused: stage is {recipe.stage}", hint="leave it out")
        return
    if recipe.stage == "distill" and (chosen is None or not (chosen.teacher or chosen.teacher_logits)):
        raise UserError(f"{origin}: distill.teacher is missing", hint="name a run's folder or a checkpoint")
    if chosen is None:
        return
    if recipe.stage == "minipuzzle" and chosen.teacher_logits:
        raise UserError(
            f"{origin}: distill.teacher_logits is unused: the distillations of a compression have several lengths, and "
            "a cache is of one",
            hint="leave it out",
        )
    if recipe.stage == "minipuzzle" and chosen.hidden_layers:
        raise UserError(
            f"{origin}: distill.hidden_layers is unused: the students of a compression have different layers",
            hint="leave it out: with distill.hidden_weight the states before the output layer are compared",
        )
    if chosen.teacher_logits and chosen.hidden_weight:
        raise UserError(
            f"{origin}: distill.hidden_weight with distill.teacher_logits: the cache holds logits, no states",
            hint="leave one of them out",
        )
    _check_hidden_layers(recipe, origin)
    if not chosen.kl_weight + chosen.lm_weight > 0:
        raise UserError(f"{origin}: distill.kl_weight and distill.lm_weight are 0: nothing would be learnt")
    if chosen.top_k is not None:
        if chosen.top_k > recipe.model.vocab_size:
            raise UserError(
                f"{origin}: distill.top_k = {chosen.top_k} is above the vocabulary of {recipe.model.vocab_size:,}"
            )
        if chosen.reverse:
            raise UserError(
                f"{origin}: distill.top_k with distill.reverse: that KL is infinite where the teacher has no mass",
                hint="leave one of them out",
            )


def _check_hidden_layers(recipe: RecipeConfig, origin: str) -> None:
    """Pairs of layers, of which the student has the first."""
    chosen, layers = recipe.distill, len(recipe.model.pattern)
    if chosen.hidden_layers and not chosen.hidden_weight:
        raise UserError(f"{origin}: distill.hidden_layers is unused: distill.hidden_weight is 0", hint="leave it out")
    if chosen.hidden_layers and recipe.parallel.pipeline > 1:
        raise UserError(
            f"{origin}: distill.hidden_layers with parallel.pipeline = {recipe.parallel.pipeline}: a pair's layers are "
            "on different stages",
            hint="split the models over tensor-parallel ranks, or leave distill.hidden_layers out",
        )
    for pair in chosen.hidden_layers:
        if len(pair) != 2:
            raise UserError(
                f"{origin}: distill.hidden_layers has {pair}", hint="a pair is [layer of the student, of the teacher]"
            )
        if not 0 <= pair[0] < layers:
            raise UserError(
                f"{origin}: distill.hidden_layers has {pair}: {recipe.model.name} has layers 0 to {layers - 1}",
                hint="the first number of a pair is the student's layer",
            )


def check_recompute(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Known values, and only for layer types that the model has."""
    counts = {name: definition.count(symbol) for symbol, name in LAYER_NAMES.items()}
    for kind, allowed in RECOMPUTE.items():
        value = getattr(recipe.recompute, kind)
        check_one_of(f"recompute.{kind}", value, allowed, f"{origin}: ")
        if value != "none" and not counts[kind]:
            raise UserError(
                f"{origin}: recompute.{kind} = {value!r} is unused: {definition.name} has no {kind} layers",
                hint=f"leave recompute.{kind} out",
            )


def check_schedule(recipe: RecipeConfig, origin: str) -> None:
    """Learning rates, and a warm-up and decay that fit into the run."""
    optim = recipe.optim
    tokens = count_of(recipe.tokens, "tokens", origin)
    warmup = count_of(optim.warmup_tokens, "optim.warmup_tokens", origin)
    if warmup >= tokens:
        raise UserError(
            f"{origin}: optim.warmup_tokens ({warmup:,}) is not shorter than the run ({tokens:,} tokens)",
            hint=f"warm up for less than {tokens:,} tokens, usually 1 % of the run or less",
        )
    check_learning_rates(optim.peak_lr, optim.final_lr, f"{origin}: ")
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
            hint="optim.schedule: wsd needs the length of its decay, such as 3.6T",
        )
    decay = count_of(optim.decay_tokens, "optim.decay_tokens", origin)
    if warmup + decay > tokens:
        raise UserError(
            f"{origin}: optim.warmup_tokens and optim.decay_tokens ({warmup:,} and {decay:,}) are longer than the run "
            f"({tokens:,} tokens)",
            hint=f"decay for {tokens - warmup:,} tokens or less",
        )


def check_learning_rates(peak_lr: float, final_lr: float, where: str = "") -> None:
    """Check a schedule's ends; `where` stands before the key in an error."""
    if not peak_lr > 0:
        raise UserError(f"{where}optim.peak_lr = {peak_lr} is not positive")
    if not 0 <= final_lr <= peak_lr:
        raise UserError(
            f"{where}optim.final_lr = {final_lr} is not between 0 and optim.peak_lr = {peak_lr}",
            hint=f"the paper's 1 % of the peak is {peak_lr / 100:g}",
        )


def check_measured_steps(recipe: RecipeConfig, origin: str) -> None:
    """Steps to measure that the run has."""
    data = recipe.data
    steps = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size).steps
    for step in recipe.precision_options.measured_steps:
        if not 1 <= step <= steps:
            raise UserError(
                f"{origin}: precision_options.measured_steps has {step}; the run has steps 1 to {steps:,}",
                hint="leave it out, or raise tokens",
            )


def check_layout(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """The model, the ranks, the sequence and the batch divide as the layout says."""
    data, parallel = recipe.data, recipe.parallel
    definition.validate_tensor_parallel(parallel.tensor, origin)
    definition.validate_pipeline_parallel(parallel.pipeline, origin)
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            f"{origin}: parallel.sequence is unused: parallel.tensor is 1, and sequences are split over those ranks",
            hint="set parallel.sequence: false, or parallel.tensor to 2 or more",
        )
    if parallel.sequence:
        _divides("data.seq_length", data.seq_length, "parallel.tensor (parallel.sequence)", parallel.tensor, origin)
    ranks, model_ranks = parallel.nodes * parallel.devices, parallel.tensor * parallel.pipeline
    _divides("parallel.nodes * parallel.devices", ranks, "parallel.tensor * parallel.pipeline", model_ranks, origin)
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
    """Every source is stated for a key, or a part, that there is."""
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
    """The blend is there, is one of the stage's kind, and each of its phases has a step in a run of this length."""
    data = recipe.data
    horizon = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size)
    try:
        blend = load_blend(data.blend)
        phase_spans(blend.phases, horizon)
    except UserError as error:
        raise UserError(f"{origin}: data.blend = {data.blend}: {error.message}", hint=error.hint) from error
    for name, source in blend.sources.items():
        if source.extend and parse_count(source.extend.tokens) > data.seq_length:
            raise UserError(
                f"{origin}: data.seq_length = {data.seq_length:,} is shorter than the samples of source {name}, which "
                f"are extended to {parse_count(source.extend.tokens):,} tokens",
                hint="raise data.seq_length, or lower extend.tokens in the blend",
            )
    reads = READS.get(recipe.stage, TEXTS)
    if blend.holds() != reads:
        raise UserError(
            f"{origin}: data.blend = {data.blend} holds {blend.holds()}, and stage {recipe.stage} reads {reads}",
            hint="name another blend; docs/sft.md shows one of conversations, docs/preference.md one of pairs",
        )
