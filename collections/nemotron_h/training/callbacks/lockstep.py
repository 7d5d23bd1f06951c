"""Keep ranks in step: random numbers by (seed, step, rank), so that a resumed run draws the same ones, and garbage
collection.
"""

from __future__ import annotations

import gc
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback

_STRIDE = 1_000_003  # a prime, so that steps and ranks of one run do not meet


class StepSeed(pl.Callback):
    """Seed torch and Megatron's tensor-parallel generators at the start of each step.

    Nothing has to be stored in checkpoints, and a checkpoint of one layout resumes in another. The published models
    have no dropout; this matters for callbacks and for layers that users add.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Seed for this step."""
        base = self.seed + trainer.global_step * _STRIDE
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        megatron_random.get_cuda_rng_tracker().reset()
        megatron_random.model_parallel_cuda_manual_seed(base + 7 * data_rank)
        torch.manual_seed(base + 7 * data_rank)


def collect_garbage_together(every_steps: int = 100) -> pl.Callback:
    """Return the callback for GPUs, where a rank that pauses on its own stalls all others; nothing on the CPU.

    Args:
        every_steps: training steps (and validation batches) between collections.
    """
    if torch.cuda.is_available():
        return GarbageCollection(gc_interval_train=every_steps, gc_interval_val=every_steps)
    return pl.Callback()


class GarbageCollection(GarbageCollectionCallback):
    """NeMo's, and once after the first step of a process.

    Triton tunes kernels in that step, and what fails in it raises errors that stand in cycles with their frames. These
    keep a layer's tensors on the GPU: 1.7 GiB of the 8B's widths at 8,192 tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Collect where it is due."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.first:
            gc.collect()
            self.first = False
