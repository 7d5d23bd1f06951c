"""The clock that measurements of generation read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nemotron_h.inference.model import GenerationModel


def now(model: GenerationModel) -> float:
    """Return a clock's seconds: of one CPU thread its own, which other work on the machine disturbs less."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()
