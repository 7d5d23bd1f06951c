"""Validate after a run's last step too: the loss of the finished model is what runs are compared by."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class LastValidation(pl.Callback):
    """Have Lightning validate after the last step, which `log.validate_every_steps` need not divide."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Set the interval to every step once there is one left; Lightning asks for it at the end of each."""
        if trainer.global_step + 1 == trainer.max_steps:
            trainer.val_check_batch = 1
