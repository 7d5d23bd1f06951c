"""Note in `incidents.jsonl` how each process of a run begins and ends, and steps that were not as others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from rich.console import Console

from nemotron_h.core import incidents
from nemotron_h.core.incidents import INCIDENTS, Incident, read_incidents
from nemotron_h.core.spikes import Spikes
from nemotron_h.core.units import GIB
from nemotron_h.report.incidents import close_killed, since_checkpoint
from nemotron_h.training.callbacks.progress import Throughput

NO_FAILURES = (incidents.FINISHED, incidents.PREEMPTION)
_RESTARTS = (incidents.RESTARTED, incidents.RECOVERED)
#: of a step, in the order in which the optimizer tells them
WATCHED = ("loss", "gradient norm")


class Incidents(pl.Callback):
    """Note this process's beginning, its end, which `RunReport` tells, and spikes, transient faults and skipped steps.
    Rank 0 writes; another rank where rank 0 is gone, or where it fails first.

    A file that cannot be written is a warning: nothing here changes an exit code. The values that spikes are told from
    are in each checkpoint, so a resumed run notes those of an unbroken one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spikes = {name: Spikes() for name in WATCHED}
        self.began = _process_began()
        self.begun = self.ended = False
        self.first_step: int | None = None
        self.setup_seconds = self.validation_seconds = self.memory_at_first = 0.0
        self.validation_began: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note the beginning, and the end of a process that was killed before."""
        if trainer.is_global_zero:
            with _warning():
                self.begin(trainer)

    def begin(self, trainer: pl.Trainer) -> None:
        """Note the beginning, once."""
        if not self.begun:
            self.begun = True
            close_killed(_file(trainer).parent)
            where = {"host": socket.gethostname(), "pid": os.getpid()}
            Incident(incidents.STARTED, self.began, self.began, details=where).append(_file(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the set-up, and be asked of each step before its update; after a restart the time from the fault to here
        is noted.
        """
        trainer.optimizers[0].is_spike = partial(self.look, trainer)
        self.first_step, self.memory_at_first = trainer.global_step, _memory_gib()
        self.setup_seconds = time.time() - self.began - self.validation_seconds
        if trainer.is_global_zero and "TORCHELASTIC_RESTART_COUNT" in os.environ:
            last = next((i for i in reversed(read_incidents(_file(trainer))[0]) if i.kind in _RESTARTS), None)
            if last is not None and last.kind == incidents.RESTARTED:
                seconds = round(time.time() - last.details["fault"], 3)
                said = f"trains again {seconds:,.1f} s after the fault"
                self.note(trainer, incidents.RECOVERED, said, {"seconds": seconds})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of a validation."""
        self.validation_began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop it."""
        if self.validation_began is not None:
            self.validation_seconds += time.monotonic() - self.validation_began
            self.validation_began = None

    def look(self, trainer: pl.Trainer, *values: float) -> bool:
        """Take the values `WATCHED` of a step, note spikes, and tell whether there is one."""
        verdicts = {name: self.spikes[name].add(value) for name, value in zip(WATCHED, values, strict=True)}
        spikes = {name: spike for name, spike in verdicts.items() if spike is not None}
        said = {
            name: f"{name} {spike['value']:.4g}, {spike['mean']:.4g} +- {spike['deviation']:.2g} in the steps before"
            for name, spike in spikes.items()
        }
        if spikes and trainer.optimizers[0].skip_spikes:
            self.note(trainer, incidents.SKIPPED, f"update not applied: {'; '.join(said.values())}", spikes)
        else:
            for name, spike in spikes.items():
                self.note(trainer, incidents.SPIKE, said[name], {"metric": name, **spike})
        return bool(spikes)

    def note(self, trainer: pl.Trainer, kind: str, message: str, details: dict[str, Any]) -> None:
        """Note, on rank 0, an incident that ends nothing: one of `core.incidents.EVENTS`, of the step that has not been
        counted yet, or of `core.incidents.NOTES`. Say it where the step is not what it would have been.
        """
        step = trainer.global_step + (kind in incidents.EVENTS)
        if not trainer.is_global_zero:
            return
        if kind in (incidents.SKIPPED, incidents.TRANSIENT):
            Console(stderr=True, soft_wrap=True).print(
                f"warning: step {step:,}: {message}", style="yellow", markup=False, highlight=False
            )
        with _warning():
            Incident(kind, time.time(), self.began, step, message, details=details).append(_file(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the values that spikes are told from."""
        return {name: list(spikes.values) for name, spikes in self.spikes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the values of a checkpoint."""
        for name, spikes in self.spikes.items():
            spikes.values = Spikes(state_dict.get(name, ())).values

    def end(
        self, trainer: pl.Trainer, kind: str = "", message: str = "", error: BaseException | None = None, rank: int = 0
    ) -> None:
        """Note the end of this process, once; a second line may name the ranks that are gone.

        Args:
            kind: of `core.incidents`; empty is that of the error, without one that of a run that trained on.
            error: that ended it.
            rank: that writes: 0, or one of those that outlive it.
        """
        with _warning():
            from nemotron_h.training.attribution import Cause, cause_of  # no run needs it that ends well

            if error is not None:
                cause = cause_of(error)
            elif kind or trainer.global_step >= trainer.max_steps:
                cause = Cause(incidents.FINISHED)
            else:
                cause = Cause(incidents.PREEMPTION, "trainer.max_time")
            kind, lost = kind or cause.kind, (incidents.LOST_RANK, incidents.HANG)
            if self.ended and not (kind in lost and message):
                return
            if trainer.global_rank != rank and (kind in (*lost, *NO_FAILURES) or self._others_noted(trainer)):
                return
            if trainer.is_global_zero:
                self.begin(trainer)
            self.ended = True
            now, folder = time.time(), _file(trainer).parent
            checkpoint, seconds = since_checkpoint(folder, self._began(trainer), now)
            trained = self.first_step is not None
            details: dict[str, Any] = {}
            if kind == incidents.MEMORY:
                grown = [round(self.memory_at_first, 3), round(_memory_gib(), 3)]
                details = {"part": self._part(cause.calls), "memory_gib": grown}
            if kind == incidents.GPU:
                details = {"host": socket.gethostname(), "device": trainer.local_rank}
            if kind in lost:
                details = {"waited_in": cause.calls, "signals": _signals(trainer)}
            Incident(
                kind=kind,
                time=now,
                began=self._began(trainer),
                step=trainer.global_step if trained else checkpoint or 0,
                message=message or cause.message,
                error=cause.error,
                file=cause.file,
                rank=trainer.global_rank,
                first_step=self.first_step if trained else checkpoint or 0,
                checkpoint=checkpoint,
                lost_seconds=0.0 if kind == incidents.FINISHED else round(seconds, 3),
                seconds={name: round(value, 3) for name, value in self._seconds(trainer).items()},
                details=details,
            ).append(_file(trainer))

    def _began(self, trainer: pl.Trainer) -> float:
        """Return when rank 0's process began, which stands for all."""
        if trainer.is_global_zero:
            return self.began
        noted, _ = read_incidents(_file(trainer))
        return noted[-1].began if noted else self.began

    @staticmethod
    def _others_noted(trainer: pl.Trainer) -> bool:
        """Tell whether a rank has noted the end; rank 0 goes first."""
        time.sleep(1)
        noted, _ = read_incidents(_file(trainer))
        return not noted or any(each.kind in incidents.ENDS for each in noted if each.began == noted[-1].began)

    def _seconds(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the seconds of this process by what they went to."""
        if self.first_step is None:
            return {"setup": time.time() - self.began - self.validation_seconds, "validation": self.validation_seconds}
        return {
            "setup": self.setup_seconds,
            "training": sum(sum(cb.seconds) for cb in trainer.callbacks if isinstance(cb, Throughput)),
            "validation": self.validation_seconds,
            "saving": getattr(trainer.checkpoint_callback, "seconds", 0.0),
        }

    def _part(self, calls: Sequence[str]) -> str:
        """Return what the process was at."""
        if any("_save_checkpoint" in call for call in calls):
            return "saving"
        if self.validation_began is not None:
            return "validation"
        return "set-up" if self.first_step is None else "a training step"


def note_in_run(trainer: pl.Trainer, kind: str, message: str, details: dict[str, Any]) -> None:
    """Note an incident of the step that is being trained; see `Incidents.note`."""
    for callback in trainer.callbacks:
        if isinstance(callback, Incidents):
            callback.note(trainer, kind, message, details)


def _file(trainer: pl.Trainer) -> Path:
    return Path(trainer.checkpoint_callback.dirpath).parent / INCIDENTS


def _process_began() -> float:
    """Return when this process began, in seconds since 1970; psutil's answer is of a boot in whole seconds."""
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    return round(time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot), 3)


def _memory_gib() -> float:
    """Return the memory in use by this rank: of its GPU, without one of its process."""
    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return used / GIB


def _signals(trainer: pl.Trainer) -> dict[str, int]:
    """Return rank -> the signal that ended it, of the ranks that this process started."""
    started = getattr(getattr(trainer.strategy, "launcher", None), "procs", [])
    codes = {str(rank): process.poll() for rank, process in enumerate(started, 1)}
    return {rank: -code for rank, code in codes.items() if code is not None and code < 0}


@contextmanager
def _warning() -> Iterator[None]:
    """Turn an error into a warning: how a run ends is not changed by what is written of it."""
    try:
        yield
    except Exception as error:
        Console(stderr=True, soft_wrap=True).print(
            f"warning: {INCIDENTS} was not written: {type(error).__name__}: {error}",
            style="yellow",
            markup=False,
            highlight=False,
        )
