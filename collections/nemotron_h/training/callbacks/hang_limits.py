"""Tell the monitor of this rank where it is in the run, and set limits by what each section has taken so far."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemotron_h.core.files import write_json
from nemotron_h.training.sections import (
    ENDING,
    LEAST,
    LIMITS,
    SECTIONS,
    SETUP,
    STEP,
    VALIDATION,
    limits,
    read_longest,
    sections,
)


class HangLimits(pl.Callback):
    """Enter the sections of `training.sections`.

    After 2, 4, 8 and every 16 steps of a process the ranks compare the longest that each section took on any of them,
    now and in earlier processes: limits follow it, and are in the run's folder for its next start. The set-up counts
    where a checkpoint was read, which takes longer than initial weights; the end of a run never does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.resumed = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note whether the set-up read a checkpoint, and what earlier processes measured."""
        self.resumed = trainer.global_step > 0
        self.longest = read_longest(self._folder(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Begin a step; the first one of a process, which compiles kernels, is of its set-up."""
        if self.steps:
            sections.enter(STEP)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Leave the set-up after the first step, and compare every so often."""
        self.steps += 1
        if self.steps == 1:
            sections.enter(STEP)
        elif self.steps in (2, 4, 8) or self.steps % 16 == 0:
            self.update(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a validation; that before the first step is of the set-up."""
        if self.steps:
            sections.enter(VALIDATION)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End it."""
        if self.steps:
            sections.enter(STEP)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the end of the run."""
        sections.enter(ENDING)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Begin the end of a process that fails, or leaves."""
        sections.enter(ENDING)

    def update(self, trainer: pl.Trainer) -> None:
        """Compare with all ranks, and set the limits."""
        sections.measure()  # the step of now is as good as over
        left_out = (ENDING,) if self.resumed else (ENDING, SETUP)
        own = [0.0 if name in left_out else sections.longest.get(name, 0.0) for name in SECTIONS]
        seconds = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        for name, value in zip(SECTIONS, seconds.tolist(), strict=True):
            if value:
                self.longest[name] = max(self.longest.get(name, 0.0), round(value, 3))
        allowed = limits(self.longest, float(os.environ[LEAST]))
        sections.set_limits(allowed)
        if trainer.is_global_zero:
            known = {name: {"longest": value, "limit": allowed[name]} for name, value in self.longest.items()}
            with contextlib.suppress(OSError):  # a disk that is full ends a run at its checkpoint, with its reason
                write_json(self._folder(trainer) / LIMITS, known)

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.checkpoint_callback.dirpath).parent
