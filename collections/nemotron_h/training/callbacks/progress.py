"""Measure steps, and report them: on one line, in a file that others follow, and in a summary at the end.

Throughput is in exact operations: tokens/s, TFLOP/s and MFU per GPU, and memory.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shlex
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Table

from nemotron_h.core.progress import STEPS, Step
from nemotron_h.core.units import GIB, duration
from nemotron_h.planning.flops import mean_flops
from nemotron_h.planning.gpus import Gpu, gpu
from nemotron_h.report.run import REPORT
from nemotron_h.training import trackers

#: driver's name -> `configs/gpus.yaml`. Other boards of a chip (H100 PCIe and NVL) have lower peaks and are not in it.
DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}


class Throughput(pl.Callback):
    """Measure each step from its batch to its end; validation and checkpoints are not counted.

    Operations are those of the model (`nemotron_h.planning.flops`): nothing for what a backward pass computes again,
    and with adapters no gradients of frozen weights. Where some rows are short sequences, they are the mean of the
    step's phase; the run's record has those of the last step.
    MFU is given against the data-sheet peak of the GPU in the dtype of the matmuls (FP8 where the run uses it) and in
    BF16, where the GPU is known; a CPU has neither.

    Args:
        warmup: first steps of a process that the medians leave out: kernels are compiled and tuned in them.
    """

    def __init__(self, warmup: int = 3) -> None:
        super().__init__()
        self.warmup = warmup
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the tokens of a step, and the peak of the GPU."""
        data, config = trainer.datamodule, pl_module.config
        self.seconds = []
        self.tokens = data.global_batch_size * data.seq_length / trainer.world_size
        self.gemm_dtype = gemm_dtype(config)
        self.peaks = peaks_of_gpu()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Note the operations of the step, which depend on the lengths of its sequences, and start its clock."""
        data, config = trainer.datamodule, pl_module.config
        lengths, (trained, *frozen) = data.lengths(trainer.global_step), config.definitions().values()
        adapter = {"adapter": config.adapter, "micro_batch": data.micro_batch_size, "frozen": config.frozen}
        adapter["tiles"] = data.tiles_per_window
        per_token = mean_flops(trained, lengths, **adapter).total
        self.flops = self.tokens * (per_token + sum(mean_flops(m, lengths, training=False).total for m in frozen))
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stop it and log; the loss has been read by now, so the device has nothing left to do."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        for name, value in self.rates(self.seconds[-1]).items():
            pl_module.log(name, value, batch_size=1)

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the rates of a step of so many seconds, per rank (a GPU, where there are any)."""
        values = {"tokens_per_second_per_rank": self.tokens / seconds, "tflops_per_rank": self.flops / seconds / 1e12}
        if torch.cuda.is_available():
            values["max_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        if self.peaks:
            values["mfu_bf16"] = self.flops / seconds / self.peaks["bf16"]
            if self.gemm_dtype in self.peaks:
                values["mfu"] = self.flops / seconds / self.peaks[self.gemm_dtype]
        return values

    def line(self) -> str:
        """Return the newest step for the progress line."""
        now = self.rates(self.seconds[-1])
        text = f"{now['tflops_per_rank']:.3g} TFLOP/s"
        if "mfu" in now:
            text += f" ({now['mfu']:.1%} of {self.gemm_dtype.upper()} peak)"
        if "max_memory_gib" in now:
            text += f"  {now['max_memory_gib']:.1f} GiB"
        return text

    def record(self) -> dict[str, Any] | None:
        """Return the medians over the steps after the warm-up, for the run's record; None before there are any."""
        warm = self.seconds[self.warmup :]
        if not warm:
            return None
        second = median(warm)
        return {
            "steps": len(warm),
            "seconds_per_step": second,
            "flops_per_step_and_rank": self.flops,
            "gemm_dtype": self.gemm_dtype,
            **self.rates(second),
        }


def gemm_dtype(config: Any) -> str:
    """Return the dtype that the linear layers multiply in on a GPU: `fp8`, `bf16` or `fp32`."""
    if config.fp8:
        return "fp8"
    return "bf16" if config.bf16 else "fp32"


def gpu_of(device_name: str) -> Gpu | None:
    """Return the data sheet of a device as its driver names it; None where there is none, so no peak is assumed."""
    name = DEVICES.get(device_name)
    return gpu(name) if name else None


def peaks_of_gpu() -> dict[str, float]:
    """Return the peak operations per second by dtype of this process's GPU; empty where it is unknown."""
    known = gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if known is None:
        return {}
    return {"bf16": known.peak("bf16"), **({"fp8": known.peak("fp8")} if known.fp8 else {})}


class StageMetrics(pl.Callback):
    """Metrics that a stage has of its own, for the progress line and the run's record."""

    def line(self) -> str:
        """Return the newest step for the progress line."""
        raise NotImplementedError

    def record(self) -> dict[str, float]:
        """Return the newest step and validation for the run's record."""
        raise NotImplementedError


#: terms of a distillation's loss, as it logs them
TERMS = ("kl", "lm", "hidden", "val_kl", "val_lm", "val_hidden")
#: of `training/callbacks/update_sizes.py`: before the kinds of matrices that Muon updates, and a step's largest logit
UPDATES, LOGIT = "update_rms/", "attention_logit"
#: ours: a run has so many lines in its file or more, where it has the steps
LINES = 1000


class ProgressLine(ProgressBar):
    """Report step, loss, validation loss, tokens/s, learning rate and ETA; rank 0 only.

    On a terminal the line is rewritten in place each step; elsewhere one is printed every `every_steps`. Each line that
    stays is one of `progress.jsonl` in the run's folder too, which has more of a short run: every step of one of
    `LINES` steps. A validation repeats the line of its step, with what it measured.

    Args:
        every_steps: steps between printed lines.
    """

    def __init__(self, every_steps: int = 10) -> None:
        super().__init__()
        self.every_steps = every_steps
        self.losses: dict[str, list[float]] = {"loss": [], "validation loss": []}
        self.validation_step: int | None = None
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
        self.started, self.first_step, self.began = time.perf_counter(), trainer.global_step, time.time()
        if not self.disabled:
            self._console().print(self._start(trainer), highlight=False)

    def _start(self, trainer: pl.Trainer) -> str:
        data, step = trainer.datamodule, trainer.global_step
        tokens = step * data.global_batch_size * data.seq_length
        verb = f"resumed at step {step:,} ({tokens:,} tokens)" if step else "started"
        parallel = trainer.strategy
        sizes = {"context": parallel.context_parallel_size, "expert": parallel.expert_model_parallel_size}
        others = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
        return (
            f"[bold]{verb}[/bold]; {trainer.max_steps:,} steps of {data.global_batch_size * data.seq_length:,} tokens, "
            f"{trainer.world_size} rank{'s' * (trainer.world_size > 1)} (tensor {parallel.tensor_model_parallel_size}, "
            f"pipeline {parallel.pipeline_model_parallel_size}{others}), "
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
        written = due or step % max(1, min(self.every_steps, trainer.max_steps // LINES)) == 0
        if not (written or self.is_terminal):
            return
        report = self._report(trainer)
        if self.is_terminal:
            print("\r\033[K" + report.line(), end="\n" if due else "", flush=True)
        elif due:
            print(report.line(), flush=True)
        if written:
            self._write(trainer, report)

    def _write(self, trainer: pl.Trainer, report: Step) -> None:
        with contextlib.suppress(OSError):  # a disk that is full ends a run at its checkpoint, with its reason
            report.append(self._folder(trainer) / STEPS)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation loss, that of the untrained model too; it is shown with the next line."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is None:
            return
        self.losses["validation loss"].append(float(loss))
        self.validation_step = trainer.global_step
        if not self.disabled and self.losses["loss"]:
            self._write(trainer, self._report(trainer))

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
            measured=[*self._of_stage(trainer), *self._throughput(trainer)],
            tokens_per_second=tokens / per_step,
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            seconds_left=elapsed / (step - self.first_step) * (total - step),
            validation_step=self.validation_step,
            metrics=self._metrics(trainer),
            time=time.time(),
            began=self.began,
        )

    @staticmethod
    def _metrics(trainer: pl.Trainer) -> dict[str, float]:
        """Return what was measured of the step beside its loss; memory is the peak so far, of this rank."""
        logged = trainer.callback_metrics
        metrics = {name: float(logged[name]) for name in ("grad_norm", LOGIT, *TERMS) if name in logged}
        metrics |= {name: float(value) for name, value in logged.items() if name.startswith(UPDATES)}
        for callback in trainer.callbacks:
            if isinstance(callback, StageMetrics):
                metrics |= callback.record()
            elif isinstance(callback, Throughput) and callback.seconds:
                metrics |= callback.rates(callback.seconds[-1]) | {"training_seconds": sum(callback.seconds)}
        if not torch.cuda.is_available():
            metrics["max_resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return metrics

    @staticmethod
    def _throughput(trainer: pl.Trainer) -> list[str]:
        measured = [cb.line() for cb in trainer.callbacks if isinstance(cb, Throughput) and cb.seconds]
        return measured[:1] if torch.cuda.is_available() else []

    @staticmethod
    def _of_stage(trainer: pl.Trainer) -> list[str]:
        return [cb.line() for cb in trainer.callbacks if isinstance(cb, StageMetrics)]

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
        if (run_dir / REPORT).is_file():
            table.add_row("report", str(run_dir / REPORT))
        table.add_row("resume or extend", " ".join(["nemo", *map(shlex.quote, sys.argv[1:])]))
        for view in trackers.views(trainer, shlex.quote(str(run_dir))):
            table.add_row("look at it", view)
        self._console().print(table, highlight=False, soft_wrap=True, markup=False)  # paths may have brackets

    @staticmethod
    def _console() -> Console:
        return Console(soft_wrap=True)
