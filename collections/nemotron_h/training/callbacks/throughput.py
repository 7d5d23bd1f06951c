"""Throughput of a run in exact operations: tokens/s, TFLOP/s and MFU per GPU, and memory."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

from nemotron_h.core.sizes import GIB
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.planning.gpus import Gpu, gpu

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
    and with adapters no gradients of frozen weights.
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
        """Note the work of a step, which is known from here on."""
        data, config = trainer.datamodule, pl_module.config
        self.seconds = []
        self.tokens = data.global_batch_size * data.seq_length / trainer.world_size
        trained, *frozen = config.definitions().values()
        adapter = {"adapter": config.adapter, "micro_batch": data.micro_batch_size}
        per_token = flops_per_token(trained, data.seq_length, training=True, **adapter).total
        per_token += sum(flops_per_token(model, data.seq_length, training=False).total for model in frozen)
        self.flops = per_token * self.tokens
        self.gemm_dtype = gemm_dtype(config)
        self.peaks = peaks_of_gpu()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Start the step's clock."""
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
