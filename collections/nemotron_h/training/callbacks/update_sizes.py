"""Log the size of Muon's updates, by kind of matrix, and the largest attention logit where logits are clipped."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from nemotron_h.training import muon
from nemotron_h.training.callbacks.progress import LOGIT, UPDATES
from nemotron_h.training.muon_parts import kinds
from nemotron_h.training.qk_clip import largest_logit


class UpdateSizes(pl.Callback):
    """Log the RMS of each step's updates over the learning rate, and its largest logit before they are clipped."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the kinds, which are the same on all ranks."""
        self.kinds = kinds(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log them."""
        for kind, value in muon.update_rms(trainer.optimizers[0].mcore_optimizer, self.kinds).items():
            pl_module.log(f"{UPDATES}{kind}", value, batch_size=1)
        if pl_module.optim.settings.get("qk_clip") is not None:
            pl_module.log(LOGIT, largest_logit(pl_module.optim.clip), batch_size=1)
