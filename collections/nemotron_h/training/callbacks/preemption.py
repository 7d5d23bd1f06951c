"""Leave a run in order before its time is up: finish the step, write a checkpoint, exit with a code of its own.

NeMo's PreemptionCallback saves under another name than this project's checkpoints, listens on rank 0 alone and exits
with 0, which a chain of jobs takes for "complete". Lightning's Slurm handler saves from inside the signal handler, in
the middle of a step, and its Timer counts time across restarts. So neither is used here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from nemotron_h.duration import seconds_of

#: "temporary failure, the user is invited to retry" (sysexits.h): a checkpoint is written and steps remain
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(pl.Callback):
    """Leave at the end of the step in which any rank was told to: SIGTERM, SIGUSR1, or `leave_after` has passed.

    Put it last in the list of callbacks: those after it would miss the last step.

    Args:
        leave_after: `HH:MM:SS` that one process may take, where no signal announces the end; None is no limit.
    Errors:
        UserError: `leave_after` is not a duration.
        SystemExit: with `EXIT_CODE`, on every rank at the same step, once the checkpoint is whole.
    """

    def __init__(self, leave_after: str | None = None) -> None:
        super().__init__()
        self.seconds = None if leave_after is None else seconds_of(leave_after)
        self.started = time.monotonic()
        self.reason: str | None = None
        self.active = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen before Lightning does: it leaves SIGUSR1 alone then."""
        self._listen(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again: Lightning has put its own SIGTERM handler in between."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As before the sanity check, which a resumed run leaves out."""
        self._listen(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        self.active, self.process = True, os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._told)
        if trainer.received_sigterm:  # before this took over; Lightning would end the run with exit code 0
            self.reason = "SIGTERM"
            trainer._signal_connector.received_sigterm = False

    def _told(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process and multiprocessing.parent_process() is not None:
            # A forked data loader, signalled with its group: the step still needs it. It obeys when told again.
            signal.signal(number, signal.SIG_DFL)
        elif self.active:
            self.reason = signal.Signals(number).name
        else:  # after the run: what the signal would have done without this callback
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Agree over all ranks; when any has to leave, all write the checkpoint and leave."""
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            self.reason = self.reason or "checkpoint.leave_after"
        leave = trainer.strategy.reduce_boolean_decision(self.reason is not None, all=False)
        if not leave or trainer.global_step >= trainer.max_steps:
            return
        trainer.checkpoint_callback.save_now(trainer)
        trainer._logger_connector.update_train_step_metrics()  # Lightning would log this step after its callbacks
        for logger in trainer.loggers:
            logger.finalize("stopped")
        trainer.strategy.barrier("everything is written")  # launchers kill the others when the first rank leaves
        if trainer.is_global_zero:
            said = self.reason or "a signal to another rank"
            print(f"\n{said}: checkpoint written at step {trainer.global_step} of {trainer.max_steps}", flush=True)
        sys.exit(EXIT_CODE)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that another limit ended early (`trainer.max_time`) is not complete either."""
        self.active = False
        if trainer.global_step < trainer.max_steps:
            sys.exit(EXIT_CODE)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The run is over; signals have their usual meaning again."""
        self.active = False
