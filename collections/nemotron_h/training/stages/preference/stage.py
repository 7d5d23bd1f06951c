"""A preference recipe (DPO, RPO) as the object graph that `nemo llm finetune` runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo.collections import llm

from nemotron_h.checkpoint.adapters import adapter_record
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.folders import INTEGRITY
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.core.strict import check_one_of
from nemotron_h.data.feed.preference_module import PreferenceDataModule
from nemotron_h.export.hub_import import obtain
from nemotron_h.model.module import NemotronHConfig, NemotronHModel
from nemotron_h.schema.recipe import PREFERENCE_LOSSES, PairLossSchema, RecipeConfig
from nemotron_h.training.callbacks.preference_metrics import PreferenceMetrics
from nemotron_h.training.preflight import check_split
from nemotron_h.training.resume import CheckTokenizer, ResumeRun
from nemotron_h.training.stages.preference.loss import BATCH_KEYS, PreferenceLoss
from nemotron_h.training.stages.preference.reference import ReferenceLogprobs
from nemotron_h.training.stages.pretrain import assemble, train_with, with_overrides
from nemotron_h.training.stages.sft import adapt

#: of the recipe
KEY = "preference.reference"


@dataclass
class PreferenceConfig(NemotronHConfig, PairLossSchema):
    """The model's configuration, and its loss over pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("preference.loss", self.loss, PREFERENCE_LOSSES)


class PreferenceModel(NemotronHModel):
    """The Lightning module with a loss over pairs in place of tokens, over `PreferenceConfig`."""

    batch_keys = BATCH_KEYS

    def settings(self) -> dict[str, Any]:
        """Return those of `NemotronHModel`, and the loss's."""
        own = {f"preference.{each.name}": getattr(self.config, each.name) for each in fields(PairLossSchema)}
        return {**super().settings(), **own}

    @property
    def training_loss_reduction(self) -> PreferenceLoss:
        """Return the loss of a step."""
        if self._training_loss_reduction is None:
            self._training_loss_reduction = self._loss_reduction()
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> PreferenceLoss:
        """Return the loss of a validation's batches."""
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = self._loss_reduction(accumulate=True)
        return self._validation_loss_reduction

    def _loss_reduction(self, accumulate: bool = False) -> PreferenceLoss:
        config = self.config
        return PreferenceLoss(config.loss, config.beta, config.gt_reward_scale, accumulate)


@dataclass(kw_only=True)
class PreferenceResume(ResumeRun):
    """`ResumeRun` of a run that begins at a checkpoint and keeps log-probabilities as its reference.

    Attributes:
        reference: a run's folder or a checkpoint that they are of; None is the one that training starts from.
    """

    reference: str | None = None

    def setup(self, trainer: Any, model: Any = None) -> None:
        """Set up as `ResumeRun`, and have the reference set at the start of the fit.

        Errors:
            UserError: as `ResumeRun`'s; a new run names no checkpoint to start from; the reference is damaged, of
                another tokenizer, or another than the run began with.
        """
        super().setup(trainer, model)
        named = self.reference
        if trainer.ckpt_path:
            recorded = read_record(Path(str(trainer.ckpt_path)))["data"]["reference"]
            if recorded.get("named") != named:
                raise UserError(
                    f"checkpoint {trainer.ckpt_path} began with preference.reference = {recorded.get('named')}, now it "
                    f"is {named}",
                    hint="restore it, or write this run elsewhere: log.dir=DIR",
                )
            reference = ReferenceLogprobs(Path(recorded["checkpoint"]), recorded["checkpoint_sha256"], named)
        elif self.init_checkpoint is None:
            raise UserError(
                "init.checkpoint is missing: pairs are learnt from a model that was trained before",
                hint="name the run of the fine-tuning: init.checkpoint=RUN",
            )
        else:
            if named is not None:
                obtain(named, KEY, self._rank)
            checkpoint = find_checkpoint(Path(named or self.init_checkpoint).expanduser()).resolve()
            if named is not None:
                self._check_reference(checkpoint, trainer, model)
            reference = ReferenceLogprobs(checkpoint, file_sha256(checkpoint / INTEGRITY), named)
        trainer.callbacks.append(reference)

    def _check_reference(self, checkpoint: Path, trainer: Any, model: Any) -> None:
        """Refuse a reference that does not score the policy's tokens, or that this layout cannot hold."""
        if problems := self._damage(checkpoint):
            raise UserError(f"{KEY}: {checkpoint} is damaged: {'; '.join(problems[:3])}")
        if adapter_record(checkpoint) is not None:
            raise UserError(
                f"{KEY}: {checkpoint} holds an adapter alone",
                hint=f"make a whole checkpoint of it first: nemotron-h merge-adapter {checkpoint} OUT",
            )
        definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
        if definition.vocab_size != model.config.vocab_size:
            raise UserError(
                f"{KEY}: {checkpoint} has a vocabulary of {definition.vocab_size:,}, the model that is trained of "
                f"{model.config.vocab_size:,}",
                hint="name a checkpoint of the same tokenizer",
            )
        check_split(definition, trainer.strategy, trainer.num_devices * trainer.num_nodes, beside=True)
        trainer.callbacks.append(CheckTokenizer(checkpoint, KEY))


def build(recipe: RecipeConfig) -> run.Partial:
    """Build a `nemo_run.Partial` of `llm.finetune` from the recipe; nothing is created yet, values can be overridden.

    Errors:
        UserError: one of the recipe's `overrides` names an unknown key, or has a value of another type.
    """
    task = assemble(recipe, llm.finetune, PreferenceDataModule, reward_gap=recipe.preference.reward_gap)
    task.tokenizer = "data"
    train_with(task, PreferenceModel, PreferenceConfig, recipe.preference)
    # Megatron then divides a step's gradients by what the loss counts: pairs, of all micro-batches and ranks
    task.model.config.calculate_per_token_loss = True
    task.trainer.callbacks.insert(0, run.Config(PreferenceMetrics))  # before the progress line, which shows them
    fdl.update_callable(task.resume, PreferenceResume)
    task.resume.reference = recipe.preference.reference
    adapt(task, recipe)
    return with_overrides(task, recipe)
