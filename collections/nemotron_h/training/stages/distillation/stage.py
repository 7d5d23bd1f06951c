"""A distillation recipe as the object graph that `nemo llm distill` runs.

From Python: `compose("nemotron_h_tiny/distill", ["model=runs/child", "init.checkpoint=runs/child", "tokens=100_000"])`
gives a recipe (`model` may be a name, a checkpoint or a YAML file), and `launch.runs.train(Run(name, recipe), ...)`
runs it in a process of its own, continues it where it was interrupted, and raises a `UserError` where it fails.
Megatron's process groups live as long as a process, so distillations one after the other take one each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import torch
from nemo.lightning._strategy_lib import _sync_from_last_pipeline_stage
from nemo.lightning.megatron_parallel import MegatronStep
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.embedding_rows import EMBEDDING
from nemotron_h.checkpoint.names import weights
from nemotron_h.checkpoint.reader import PROJECTION, WeightFile, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.datamodule import BlendDataModule
from nemotron_h.export.hub_import import obtain
from nemotron_h.schema.recipe import RecipeConfig
from nemotron_h.training.preflight import check_split
from nemotron_h.training.resume import CheckTokenizer, ResumeRun
from nemotron_h.training.stages.distillation.command import distill
from nemotron_h.training.stages.distillation.model import TERMS, DistillationConfig, DistillationModel
from nemotron_h.training.stages.distillation.teacher_shards import ReadTeacher
from nemotron_h.training.stages.pretrain import assemble, horizon_of, train_with, with_overrides


def build(recipe: RecipeConfig) -> run.Partial:
    """Build a `nemo_run.Partial` of `distill` from the recipe; nothing is created yet, values can be overridden.

    Errors:
        UserError: one of the recipe's `overrides` names an unknown key, or has a value of another type.
    """
    task = assemble(recipe, distill, BlendDataModule, horizon_tokens=horizon_of(recipe).tokens)
    train_with(task, DistillationModel, DistillationConfig, recipe.distill)
    fdl.update_callable(task.resume, ResumeDistillation)
    task.trainer.callbacks.insert(0, run.Config(DistillationTerms))
    return with_overrides(task, recipe)


@dataclass(kw_only=True)
class ResumeDistillation(ResumeRun):
    """`ResumeRun` that looks at the teacher too, before anything is loaded."""

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        """Check the teacher, then set up as `ResumeRun`.

        Errors:
            UserError: objective out of range; teacher missing, damaged or not what its record says, of another
                vocabulary, tokenizer, or width where states are compared; another teacher than the run began with.
        """
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        config = model.config
        if config.stored is None and config.teacher:
            obtain(config.teacher, "distill.teacher", self._rank)
        check_teacher(config, trainer)
        if config.stored is None:
            self._check_undamaged(config.teacher_checkpoint)
        elif self.blend_change is not None:
            raise UserError(
                "resume.blend_change with distill.teacher_logits: the cache holds the windows of one order",
                hint="leave out distill.teacher_logits: the teacher is loaded",
            )
        super().setup(trainer, model)
        check = ReadTeacher() if config.stored else CheckTokenizer(config.teacher_checkpoint, "distill.teacher")
        trainer.callbacks.append(check)
        if trainer.ckpt_path:
            self._check_same_teacher(Path(str(trainer.ckpt_path)), config)
            self._check_same_projection(Path(str(trainer.ckpt_path)), config)
        if self._rank == 0:
            teacher = config.record()["teacher"]
            stored = f", its logits from {config.teacher_logits}" if config.stored else ""
            print(f"teacher: {config.teacher_definition.name} of {teacher['checkpoint']}{stored}")

    def _check_undamaged(self, checkpoint: Path) -> None:
        problems = self._damage(checkpoint)
        if problems:
            raise UserError(f"distill.teacher: {checkpoint} is damaged: {'; '.join(problems[:3])}")

    @staticmethod
    def _check_same_teacher(checkpoint: Path, config: DistillationConfig) -> None:
        before, now = read_record(checkpoint).get("teacher"), config.record()["teacher"]
        if before is not None and before["weights"] != now["weights"]:
            raise UserError(
                f"checkpoint {checkpoint} was distilled from {before['checkpoint']}, not from {now['checkpoint']}",
                hint="restore distill.teacher, or write this run elsewhere: log.dir=DIR",
            )

    @staticmethod
    def _check_same_projection(checkpoint: Path, config: DistillationConfig) -> None:
        """Refuse another projection than the checkpoint's: the optimizer's state belongs to it."""
        before, now = read_record(checkpoint).get(PROJECTION), config.record().get(PROJECTION)
        if before != now:
            raise UserError(
                f"checkpoint {checkpoint} was distilled with a projection of states {before or 'of no size'}, now it "
                f"would be {now or 'none'}",
                hint="restore distill.hidden_weight, or write this run elsewhere: log.dir=DIR",
            )


def check_teacher(config: DistillationConfig, trainer: pl.Trainer) -> None:
    """Check that student and teacher fit together, and the teacher into the layout.

    Errors:
        UserError: see `ResumeDistillation.setup`.
    """
    _ = config.objective
    if config.hidden_weight < 0:
        raise UserError(f"distill.hidden_weight = {config.hidden_weight} is negative")
    if config.hidden_layers and trainer.strategy.pipeline_model_parallel_size > 1:
        raise UserError("distill.hidden_layers with pipeline stages: a pair's layers are on different ones")
    if config.stored is not None:
        if config.hidden_weight:
            raise UserError(
                "distill.hidden_weight with distill.teacher_logits: the cache holds logits, no states",
                hint="leave one of them out",
            )
        _check_vocabulary(config, f"cache {config.teacher_logits}")
        return
    if not config.teacher:
        raise UserError("distill.teacher is missing", hint="name a run's folder or a checkpoint")
    try:
        checkpoint = config.teacher_checkpoint
    except UserError as error:
        raise UserError(f"distill.teacher: {error.message}", hint=error.hint) from error
    _check_vocabulary(config, f"{checkpoint}")
    teacher = config.teacher_definition
    for own, theirs in config.hidden_layers:
        for whose, number, model in (("student", own, config.definition()), ("teacher", theirs, teacher)):
            if not 0 <= number < model.num_layers:
                raise UserError(
                    f"distill.hidden_layers has [{own}, {theirs}]: the {whose} ({model.name}) has layers 0 to "
                    f"{model.num_layers - 1}",
                    hint="a pair is [layer of the student, layer of the teacher]",
                )
    if (held := held_parameters(checkpoint, teacher)) != teacher.parameters:
        raise UserError(
            f"distill.teacher: the weights of {checkpoint} are {held:,} parameters, the model in its "
            f"run.json ({teacher.name}) has {teacher.parameters:,}",
            hint="weights and run.json of the folder belong to different runs; restore the folder",
        )
    check_split(teacher, trainer.strategy, trainer.num_devices * trainer.num_nodes, beside=True)


def held_parameters(checkpoint: Path, definition: ModelDefinition) -> int:
    """Return the parameters of a checkpoint of this model, without the vocabulary's padding."""
    shapes = WeightFile(checkpoint).shapes
    # an imported or pruned model has a norm under both of its names
    twice = {row.fused for row in weights(definition) if not shapes.keys().isdisjoint(row.ours)}
    matrices = 1 if definition.tied_embeddings else 2
    padding = matrices * definition.hidden_size * (shapes[EMBEDDING][0] - definition.vocab_size)
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in twice) - padding


def _check_vocabulary(config: DistillationConfig, where: str) -> None:
    size = config.teacher_definition.vocab_size
    if size != config.vocab_size:
        raise UserError(
            f"the teacher {where} has a vocabulary of {size:,}, the student of {config.vocab_size:,}",
            hint="distillation compares distributions over one vocabulary: take models of the same tokenizer",
        )


class BothModelsStep(MegatronStep):
    """A step whose pipeline stages send the student's states and the teacher's side by side."""

    @property
    def adjust_tensor_shapes_fn(self) -> Any:
        """Return a function that widens what is sent and received; None without a pipeline, as Megatron asks."""
        config = self.pl_module.config
        if self.trainer.strategy.pipeline_model_parallel_size == 1 or config.stored:
            return None
        width = config.hidden_size + config.teacher_definition.hidden_size

        def widened(received: list[tuple], sent: list[tuple]) -> tuple[list[tuple], list[tuple]]:
            return [(*shape[:-1], width) for shape in received], [(*shape[:-1], width) for shape in sent]

        return widened


class DistillationTerms(pl.Callback):
    """Have pipeline stages send both models' states, and log the loss's terms: `kl`, `lm` and, where it counts,
    `hidden`, as means per token; `val_kl` and so on in validation.
    """

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Return the same step, of the class that knows what is sent."""
        return BothModelsStep(**{f.name: getattr(step, f.name) for f in dataclasses.fields(MegatronStep)})

    def on_megatron_step_end(self, step: MegatronStep, **_: Any) -> None:
        """Log the means that the reduction kept; the last pipeline stage tells the others."""
        module = step.pl_module
        training = not step.forward_only
        reduction = module.training_loss_reduction if training else module.validation_loss_reduction
        names = [name for name in TERMS if name in ("kl", "lm") or (name == "hidden" and module.config.hidden_weight)]
        device = torch.cuda.current_device()
        means: Tensor = torch.stack(
            [reduction.means.get(name, torch.zeros((), device=device)).to(torch.float32) for name in names]
        )
        _sync_from_last_pipeline_stage(means, broadcast=True)
        for name, mean in zip(names, means, strict=True):
            module.log(name if training else f"val_{name}", mean, batch_size=1, on_epoch=not training)
