"""A pretraining recipe as the object graph that `nemo llm pretrain` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo.collections import llm

from nemotron_h.core.units import count_of
from nemotron_h.data.feed.datamodule import BlendDataModule
from nemotron_h.data.phases import Horizon
from nemotron_h.model.module import NemotronHConfig, NemotronHModel
from nemotron_h.precision.plugins import plugin
from nemotron_h.schema.nemo_names import nemo_fields, recompute_fields
from nemotron_h.schema.recipe import EXPONENTIAL, ExpertsSchema, ModelSchema, RecipeConfig, RecomputeSchema
from nemotron_h.training import settings
from nemotron_h.training.callbacks.cast_statistics import CastStatisticsCallback
from nemotron_h.training.callbacks.checkpoint import StepCheckpoint
from nemotron_h.training.callbacks.expert_load import ExpertLoad
from nemotron_h.training.callbacks.gemm_table import GemmTable
from nemotron_h.training.callbacks.incidents import Incidents
from nemotron_h.training.callbacks.last_validation import LastValidation
from nemotron_h.training.callbacks.lockstep import StepSeed, collect_garbage_together
from nemotron_h.training.callbacks.nan_guard import NanGuard
from nemotron_h.training.callbacks.preemption import Preemption
from nemotron_h.training.callbacks.progress import ProgressLine, Throughput
from nemotron_h.training.callbacks.run_record import RunRecord, plain
from nemotron_h.training.callbacks.run_report import RunReport
from nemotron_h.training.callbacks.stragglers import Stragglers
from nemotron_h.training.callbacks.update_sizes import UpdateSizes
from nemotron_h.training.optimizer import scheduled_adamw
from nemotron_h.training.preflight import RunFolder
from nemotron_h.training.resume import ResumeRun
from nemotron_h.training.strategy import NemotronHStrategy, NemotronHTrainer


def model_config(
    model: ModelSchema,
    seq_length: int,
    init_seed: int,
    recompute: RecomputeSchema | None = None,
    experts: ExpertsSchema | None = None,
    frozen: Sequence[str] = (),
) -> run.Config[NemotronHConfig]:
    """Return the definition in Megatron's names, what its backward pass computes again (nothing by default), how
    experts are balanced, and what does not train.
    """
    return run.Config(
        NemotronHConfig,
        **{**nemo_fields(model), **_nested(model)},
        num_layers=len(model.pattern),
        seq_length=seq_length,
        init_seed=init_seed,
        frozen=list(frozen),
        **recompute_fields(recompute or RecomputeSchema()),
        **dataclasses.asdict(experts or ExpertsSchema()),
    )


def _nested(model: ModelSchema) -> dict[str, Any]:
    """Return the keys of a model that have keys of their own, as parts of the graph."""
    parts = {key: getattr(model, key) for key in ("multipliers", "vision", "projector")}
    return {key: part and run.Config(type(part), **dataclasses.asdict(part)) for key, part in parts.items()}


def build(recipe: RecipeConfig) -> run.Partial:
    """Build a `nemo_run.Partial` of `llm.pretrain` from the recipe; nothing is created yet, values can be overridden.

    Errors:
        UserError: one of the recipe's `overrides` names an unknown key, or has a value of another type.
    """
    task = assemble(recipe, llm.pretrain, BlendDataModule, horizon_tokens=horizon_of(recipe).tokens)
    return with_overrides(task, recipe)


def with_overrides(task: run.Partial, recipe: RecipeConfig) -> run.Partial:
    """Return the task of any stage with the recipe's `overrides` applied.

    Errors:
        UserError: one of them names an unknown key, or has a value of another type.
    """
    if recipe.overrides:
        settings.apply(task, recipe.overrides, f"recipe {recipe.name}: overrides")
    return task


def horizon_of(recipe: RecipeConfig) -> Horizon:
    """Return tokens and steps of the run."""
    tokens = count_of(recipe.tokens, "tokens", f"recipe {recipe.name}")
    return Horizon(tokens, recipe.data.seq_length * recipe.data.global_batch_size)


def train_with(task: run.Partial, model: type, config: type, part: Any) -> None:
    """Have a task train a stage's own model.

    Args:
        task: of `assemble`, changed in place.
        model: a `NemotronHModel`.
        config: its `NemotronHConfig`, and another dataclass, whose fields it has too.
        part: the recipe's part of the stage, which has those fields.
    """
    fdl.update_callable(task.model, model)
    fdl.update_callable(task.model.config, config)
    own = {each.name for each in dataclasses.fields(config)}
    fdl.assign(task.model.config, **{key: value for key, value in dataclasses.asdict(part).items() if key in own})


def assemble(recipe: RecipeConfig, entry: Callable, data_module: type, **data_arguments: Any) -> run.Partial:
    """Assemble what the stages share: model, data, trainer, callbacks, log, resume and optimizer. The recipe's
    `overrides` are left to the caller, who applies them to the whole task (`with_overrides`).

    Args:
        entry: the function of `nemo.collections.llm` that runs the task.
        data_module: the stage's `PreparedDataModule`.
        data_arguments: what it takes beyond the recipe's `data`.
    """
    data, optim, parallel = recipe.data, recipe.optim, recipe.parallel
    origin, horizon = f"recipe {recipe.name}", horizon_of(recipe)
    run_dir = f"{recipe.log.dir}/{recipe.name}"
    measured = recipe.precision_options.measured_steps
    return run.Partial(
        entry,
        model=run.Config(
            NemotronHModel,
            config=model_config(
                recipe.model, data.seq_length, recipe.init_seed, recipe.recompute, recipe.experts, optim.frozen
            ),
        ),
        data=run.Config(data_module, **dataclasses.asdict(data), **data_arguments),
        trainer=run.Config(
            NemotronHTrainer,
            num_nodes=parallel.nodes,
            devices=parallel.devices,
            max_steps=horizon.steps,
            strategy=run.Config(
                NemotronHStrategy,
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                context_parallel_size=parallel.context,
                expert_model_parallel_size=parallel.expert,
                sequence_parallel=parallel.sequence,
                distributed_optimizer=parallel.distributed_optimizer,
            ),
            plugins=run.Config(
                plugin,
                name=recipe.precision,
                bf16_edge_layers=recipe.precision_options.bf16_edge_layers,
                fp8_backend=recipe.precision_options.fp8_backend,
                gradients=optim.gradients,
            ),
            callbacks=[
                run.Config(GemmTable),
                run.Config(StepSeed, seed=data.seed),
                run.Config(LastValidation),
                run.Config(NanGuard),
                run.Config(Incidents),  # before the report, which shows them
                run.Config(RunReport),  # before the progress line, which names it
                run.Config(Throughput),  # before the progress line, which shows it
                run.Config(Stragglers, every_steps=recipe.log.every_steps),  # behind NanGuard, which waits for ranks
                run.Config(collect_garbage_together),
                *([run.Config(ExpertLoad)] if recipe.model.num_experts else []),
                *([run.Config(UpdateSizes)] if optim.name == "muon" else []),
                *([run.Config(CastStatisticsCallback, steps=measured)] if measured else []),
                run.Config(ProgressLine, every_steps=recipe.log.every_steps),
                run.Config(RunRecord, recipe=plain(dataclasses.asdict(recipe))),
                run.Config(Preemption, leave_after=recipe.checkpoint.leave_after),  # last: see there
            ],
            logger=False,  # Lightning would add a TensorBoard of its own to those of `log`
            log_every_n_steps=1,
            val_check_interval=recipe.log.validate_every_steps,
            limit_val_batches=recipe.log.validation_batches,
            num_sanity_val_steps=recipe.log.validation_batches,  # the loss before the first step
            use_distributed_sampler=False,
            enable_model_summary=False,
        ),
        log=run.Config(
            RunFolder,
            explicit_log_dir=run_dir,
            ckpt=run.Config(StepCheckpoint, every_steps=recipe.checkpoint.every_steps, keep=recipe.checkpoint.keep),
            trackers=list(recipe.log.trackers),
            project=recipe.log.project,
            extra_loggers=[],  # a list to add to, which a default of its class is not
        ),
        resume=run.Config(
            ResumeRun,
            blend_change=recipe.resume.blend_change,
            optimizer_change=recipe.resume.optimizer_change,
            init_checkpoint=recipe.init.checkpoint,
            repair_embeddings=recipe.init.repair_embeddings,
        ),
        optim=run.Config(
            scheduled_adamw,
            name=optim.name,
            momentum=optim.momentum,
            newton_schulz=optim.newton_schulz,
            qk_clip=optim.qk_clip,
            peak_lr=optim.peak_lr,
            final_lr=optim.final_lr,
            warmup_steps=horizon.step_at(count_of(optim.warmup_tokens, "optim.warmup_tokens", origin)),
            decay_steps=None
            if optim.decay_tokens is None
            else horizon.step_at(count_of(optim.decay_tokens, "optim.decay_tokens", origin)),
            exponential_decay=optim.schedule == EXPONENTIAL,
            beta1=optim.beta1,
            beta2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_grad=optim.clip_grad,
            moments=optim.moments,
            skip_spikes=optim.skip_spikes,
            distributed_optimizer=parallel.distributed_optimizer,
        ),
    )
