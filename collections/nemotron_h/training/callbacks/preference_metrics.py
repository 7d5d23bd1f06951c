"""Metrics of preference training: reward margin and accuracy, and log-probabilities of both answers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state

from nemotron_h.training.callbacks.progress import StageMetrics


class PreferenceMetrics(StageMetrics):
    """Log them each step and after each validation, for TensorBoard, the progress line and the run's record.

    The reward of an answer is beta times its log-probability less the reference's; the margin is the chosen answer's
    less the rejected one's, and the accuracy the share of pairs whose margin is positive. Means over the pairs of a
    step, or of a whole validation.
    """

    def __init__(self) -> None:
        self.training: dict[str, float] = {}
        self.validation: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Take the step's means."""
        self.training = _from_last_stage(pl_module.training_loss_reduction)
        for name, value in self.training.items():
            pl_module.log(name, value, batch_size=1)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        pl_module.validation_loss_reduction.sums = None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the validation's means."""
        self.validation = _from_last_stage(pl_module.validation_loss_reduction)
        for name, value in self.validation.items():
            pl_module.log(f"val_{name}", value, batch_size=1)

    def line(self) -> str:
        """Return the newest step, and the newest validation's margin, for the progress line."""
        if not self.training:
            return ""
        text = f"margin {self.training['reward_margin']:+.3f}"
        if self.validation:
            text += f" (validation {self.validation['reward_margin']:+.3f})"
        return f"{text}  accuracy {self.training['reward_accuracy']:.0%}"

    def record(self) -> dict[str, float]:
        """Return both for the run's record."""
        return {**self.training, **{f"val_{name}": value for name, value in self.validation.items()}}


def _from_last_stage(reduction: Any) -> dict[str, float]:
    """Return the means, which only the last pipeline stage knows, on every rank."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return reduction.metrics()
    found = [reduction.metrics()]
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast_object_list(found, src=source, group=group)
    return found[0]
