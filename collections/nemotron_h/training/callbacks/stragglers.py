"""Compare what a step takes each rank by itself, and name a rank that is slower than the others.

NVRx's detector of stragglers needs CUPTI. This one times each rank from its batch to where Megatron is about to reduce
the gradients: with data parallelism alone, before the rank waits for any other. Ranks of one tensor- or
pipeline-parallel group wait for each other before that, so a slow one shows there in the times of its whole group.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from nemotron_h.core.files import write_json
from nemotron_h.core.incidents import STRAGGLER
from nemotron_h.core.progress import RANK_TIMES
from nemotron_h.training.callbacks.incidents import Incidents

#: ours: a rank is slow that takes so many times the median, in so many comparisons one after the other
SLOW, TIMES = 1.5, 3


@dataclass
class Slow:
    """A rank above `SLOW`: since which step, in how many comparisons one after the other."""

    since: int
    times: int = 0


class Ranks:
    """Ranks as comparisons show them, one after the other."""

    def __init__(self) -> None:
        self.slow: dict[int, Slow] = {}

    def compare(self, seconds: Sequence[float], first: int) -> list[tuple[int, str]]:
        """Take the seconds of a step of each rank, and return rank and what there is to say of it.

        Args:
            first: step that the comparison begins with.
        """
        middle, said = median_low(seconds), []  # of two ranks, the faster one
        for rank, value in enumerate(seconds):
            if value > SLOW * middle:
                slow = self.slow.setdefault(rank, Slow(first))
                slow.times += 1
                if slow.times == TIMES:
                    said.append((rank, f"takes {value:.3g} s a step, {value / middle:.2g} times the median"))
            elif self.slow.pop(rank, Slow(0)).times >= TIMES:
                said.append((rank, "is no slower than the others any more"))
        return said


class Stragglers(pl.Callback):
    """Compare the ranks every so many steps: `rank_times.json`, and an incident where one is slow.

    Put it behind callbacks that wait for other ranks where gradients are reduced.

    Args:
        every_steps: between comparisons.
    """

    def __init__(self, every_steps: int) -> None:
        super().__init__()
        self.every_steps = every_steps
        self.ranks = Ranks()
        self.own: list[float] = []
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock where Megatron is about to reduce the gradients; one rank has nobody to compare with."""
        self.active = trainer.world_size > 1
        if not self.active:
            return
        config = get_model_config(pl_module)
        reduce_gradients = config.finalize_model_grads_func

        def stop_and_reduce(*args: Any, **kwargs: Any) -> Any:
            self.end = self._now()
            return reduce_gradients(*args, **kwargs)

        config.finalize_model_grads_func = stop_and_reduce

    @staticmethod
    def _now() -> Any:
        """Return this moment: on a GPU that of its stream, which the processor is ahead of."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Start the clock."""
        if self.active:
            self.start = self._now()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count the step, without the first of the process, which compiles kernels; compare every so often."""
        if not self.active:
            return
        self.steps += 1
        if self.steps > 1:
            self.own.append(self._seconds())
        if self.own and trainer.global_step % self.every_steps == 0:
            self._compare(trainer)

    def _seconds(self) -> float:
        if isinstance(self.start, float):
            return self.end - self.start
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1000

    def _compare(self, trainer: pl.Trainer) -> None:
        seconds = torch.zeros(trainer.world_size, dtype=torch.float64, device=torch.cuda.current_device())
        seconds[trainer.global_rank] = fmean(self.own)
        dist.all_reduce(seconds)
        if trainer.is_global_zero:
            self._note(trainer, [float(value) for value in seconds.tolist()], trainer.global_step - len(self.own) + 1)
        self.own = []

    def _note(self, trainer: pl.Trainer, seconds: list[float], first: int) -> None:
        folder, step = Path(trainer.checkpoint_callback.dirpath).parent, trainer.global_step
        said = self.ranks.compare(seconds, first)
        slow = {str(rank): slow.since for rank, slow in self.ranks.slow.items() if slow.times >= TIMES}
        with contextlib.suppress(OSError):  # a disk that is full ends a run at its checkpoint, with its reason
            rounded = [round(value, 6) for value in seconds]
            write_json(folder / RANK_TIMES, {"step": step, "seconds": rounded, "slow_since_step": slow}, indent=None)
        for rank, words in said:
            message = f"rank {rank} {words}" + (f" since step {slow[str(rank)]:,}" if str(rank) in slow else "")
            print(message, flush=True)
            for incidents in (each for each in trainer.callbacks if isinstance(each, Incidents)):
                details = {"rank": rank, "seconds": seconds[rank], "median": median_low(seconds)}
                incidents.note(trainer, STRAGGLER, message, details)
