"""Python's garbage collection at the same step on all ranks."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback


def collect_garbage_together(every_steps: int = 100) -> pl.Callback:
    """Return NeMo's callback on GPUs, where a rank that pauses on its own stalls all others; nothing on the CPU.

    Args:
        every_steps: training steps (and validation batches) between collections.
    """
    if torch.cuda.is_available():
        return GarbageCollectionCallback(gc_interval_train=every_steps, gc_interval_val=every_steps)
    return pl.Callback()
