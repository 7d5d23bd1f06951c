"""Report steps: on one line, in a file that others follow, and in a summary at the end."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Table

from nemotron_h.core.duration import duration
from nemotron_h.core.progress import STEPS, Step
from nemotron_h.training import trackers
from nemotron_h.training.callbacks.preference_metrics import PreferenceMetrics
from nemotron_h.training.callbacks.throughput import Throughput


class ProgressLine(ProgressBar):
    """Report step, loss, validation loss, tokens/s, learning rate and ETA; rank 0 only.

    On a terminal the line is rewritten in place each step; elsewhere one is printed every `every_steps`. Each line that
    stays is one of `progress.jsonl` in the run's folder too.

    Args:
        every_steps: steps between printed lines.
    """

    def __init__(self, every_steps: int = 10) -> None:
        super().__init__()
        self.every_steps = every_steps
        self.losses: dict[str, list[float]] = {"loss": [], "validation loss": []}
        self.step_times: deque[float] = deque(maxlen=50)
        self.disabled = False

    def disable(self) -> None:
        """Stay silent; Lightning calls this on ranks other than 0."""
        self.disabled = True

    def enable(self) -> None:
        """Show the line again, after `disable`."""
        self.disabled = False

    @property
    def is_terminal(self) -> bool:
        """Return True if the line can be rewritten."""
        return sys.stdout.isatty()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the run starts."""
        self.started, self.first_step = time.perf_counter(), trainer.global_step
        if not self.disabled:
            self._console().print(self._start(trainer), highlight=False)

    def _start(self, trainer: pl.Trainer) -> str:
        data, step = trainer.datamodule, trainer.global_step
        tokens = step * data.global_batch_size * data.seq_length
        verb = f"resumed at step {step:,} ({tokens:,} tokens)" if step else "started"
        parallel = trainer.strategy
        return (
            f"[bold]{verb}[/bold]; {trainer.max_steps:,} steps of {data.global_batch_size * data.seq_length:,} tokens, "
            f"{trainer.world_size} rank{'s' * (trainer.world_size > 1)} (tensor {parallel.tensor_model_parallel_size}, "
            f"pipeline {parallel.pipeline_model_parallel_size}), "
            f"{getattr(trainer.precision_plugin, 'recipe', trainer.precision)}"  # Lightning knows FP8 as bf16-mixed
        )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Start the step's clock; validation and checkpoints are not counted in tokens/s."""
        self.step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count the step and show the line."""
        self.step_times.append(time.perf_counter() - self.step_start)
        loss = trainer.callback_metrics.get("reduced_train_loss")
        if loss is not None:
            self.losses["loss"].append(float(loss))
        if self.disabled:
            return
        step = trainer.global_step
        due = step % self.every_steps == 0 or step == trainer.max_steps or step == self.first_step + 1
        if not (due or self.is_terminal):
            return
        report = self._report(trainer)
        if self.is_terminal:
            print("\r\033[K" + report.line(), end="\n" if due else "", flush=True)
        else:
            print(report.line(), flush=True)
        if due:
            with contextlib.suppress(OSError):  # a disk that is full ends a run at its checkpoint, with its reason
                report.append(self._folder(trainer) / STEPS)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation loss, that of the untrained model too; it is shown with the next line."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.losses["validation loss"].append(float(loss))

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.checkpoint_callback.dirpath).parent

    def _report(self, trainer: pl.Trainer) -> Step:
        step, total = trainer.global_step, trainer.max_steps
        per_step = sum(self.step_times) / len(self.step_times)
        tokens = trainer.datamodule.global_batch_size * trainer.datamodule.seq_length
        elapsed = time.perf_counter() - self.started
        return Step(
            step=step,
            steps=total,
            loss=self.losses["loss"][-1],
            validation_loss=next(reversed(self.losses["validation loss"]), math.nan),
            measured=[*self._preference(trainer), *self._throughput(trainer)],
            tokens_per_second=tokens / per_step,
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            seconds_left=elapsed / (step - self.first_step) * (total - step),
        )

    @staticmethod
    def _throughput(trainer: pl.Trainer) -> list[str]:
        measured = [cb.line() for cb in trainer.callbacks if isinstance(cb, Throughput) and cb.seconds]
        return measured[:1] if torch.cuda.is_available() else []

    @staticmethod
    def _preference(trainer: pl.Trainer) -> list[str]:
        return [cb.line() for cb in trainer.callbacks if isinstance(cb, PreferenceMetrics)]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the summary, after the last checkpoint."""
        if self.disabled or not self.losses["loss"]:
            return
        run_dir = self._folder(trainer)
        steps = trainer.global_step - self.first_step
        tokens = steps * trainer.datamodule.global_batch_size * trainer.datamodule.seq_length
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, values in self.losses.items():
            if values:
                table.add_row(name, f"{values[0]:.4f} first, {values[-1]:.4f} last")
        table.add_row("tokens", f"{tokens:,} in {steps:,} steps")
        table.add_row("time", duration(time.perf_counter() - self.started))
        table.add_row("checkpoint", str(trainer.checkpoint_callback.best_model_path).removesuffix(".ckpt"))
        table.add_row("record", str(run_dir / "run.json"))
        table.add_row("resume or extend", " ".join(["nemo", *map(shlex.quote, sys.argv[1:])]))
        for view in trackers.views(trainer, shlex.quote(str(run_dir))):
            table.add_row("look at it", view)
        self._console().print(table, highlight=False, soft_wrap=True, markup=False)  # paths may have brackets

    @staticmethod
    def _console() -> Console:
        return Console(soft_wrap=True)
