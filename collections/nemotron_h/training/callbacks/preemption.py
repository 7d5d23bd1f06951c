"""Leave a run in order before its time is up: finish the step, write a checkpoint, exit with a code of its own.

NeMo's PreemptionCallback saves under another name than this project's checkpoints, listens on rank 0 alone and exits
with 0, which a chain of jobs takes for "complete". Lightning's Slurm handler saves from inside the signal handler, in
the middle of a step, and its Timer counts time across restarts. So neither is used here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import lightning.pytorch as pl

from nemotron_h.checkpoint import folders
from nemotron_h.core.incidents import PREEMPTION
from nemotron_h.core.units import seconds_of
from nemotron_h.training.callbacks import run_report

#: "temporary failure, the user is invited to retry" (sysexits.h): a checkpoint is written and steps remain
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: ours: launchers pass ctrl-c on to ranks that the terminal has told already; the user's second one comes later
AGAIN_S = 2.0


class Preemption(pl.Callback):
    """Leave at the end of the step in which any rank was told to: SIGTERM, SIGUSR1, ctrl-c, or `leave_after` is over.

    A run that is told leaves with a whole checkpoint of its last step; one that is being written is finished first. A
    second ctrl-c ends it at once.

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
        self.interrupted: float | None = None
        self.active = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen before Lightning does: it leaves SIGUSR1 alone then."""
        self._listen(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen again: Lightning has put its own SIGTERM handler in between."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen as before the sanity check, which a resumed run leaves out."""
        self._listen(trainer)

    def _listen(self, trainer: pl.Trainer) -> None:
        self.active, self.first = True, trainer.is_global_zero
        for number in SIGNALS:
            signal.signal(number, self._told)
        if trainer.received_sigterm:  # before this took over; Lightning would end the run with exit code 0
            self.reason = "SIGTERM"
            trainer._signal_connector.received_sigterm = False

    def _told(self, number: int, frame: FrameType | None) -> None:
        if not self.active:  # after the run: what the signal would have done without this callback
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number != signal.SIGINT:
            self.reason = signal.Signals(number).name
            outlive_pipes()
        elif self.interrupted is None:
            self.reason, self.interrupted = "ctrl-c", time.monotonic()
            outlive_pipes()
            if self.first:
                print("\nctrl-c: finishing the step and writing a checkpoint; again to end the run at once", flush=True)
        elif time.monotonic() - self.interrupted > AGAIN_S:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Leave before the next step where the checkpoint of the last one has just begun: it takes no other."""
        if trainer.global_step and trainer.checkpoint_callback.has_saved(trainer):
            self._leave_if_told(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Leave after a step."""
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            self.reason = self.reason or "checkpoint.leave_after"
        self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        """Agree over all ranks; when any has to leave, all write the checkpoint and leave."""
        leave = trainer.strategy.reduce_boolean_decision(self.reason is not None, all=False)
        if not leave or trainer.global_step >= trainer.max_steps:
            return
        saved = trainer.checkpoint_callback.has_saved(trainer)
        trainer.checkpoint_callback.save_now(trainer)
        if not saved:
            trainer._logger_connector.update_train_step_metrics()  # Lightning would log this step after its callbacks
        for logger in trainer.loggers:
            logger.finalize("stopped")
        said = self.reason or "a signal to another rank"
        run_report.stop(trainer, said, PREEMPTION)
        trainer.strategy.barrier("everything is written")  # launchers kill the others when the first rank leaves
        if trainer.is_global_zero:
            print(
                f"\n{said}: checkpoint written at step {trainer.global_step} of {trainer.max_steps}\n"
                f"the same command continues from {newest(trainer)}",
                flush=True,
            )
        sys.exit(EXIT_CODE)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exit early for a run that another limit ended (`trainer.max_time`) too: it is not complete either."""
        self.active = False
        if trainer.global_step < trainer.max_steps:
            sys.exit(EXIT_CODE)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give signals their usual meaning again: the run is over."""
        self.active = False
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            whole = newest(trainer)
            said = f"the same command continues from {whole}" if whole else "before its first checkpoint"
            print(f"\nctrl-c: ended after step {trainer.global_step}; {said}", flush=True)


class _Outliving:
    """A stream whose reader may end: the signal that told this process told `tee` beside it too."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError, RuntimeError):  # RuntimeError: a signal came while it was written to
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError, RuntimeError):
            self.stream.flush()


def outlive_pipes() -> None:
    """Let this process go on where nobody reads its output any more."""
    sys.stdout, sys.stderr = (s if isinstance(s, _Outliving) else _Outliving(s) for s in (sys.stdout, sys.stderr))


def newest(trainer: pl.Trainer) -> Path | None:
    """Return the run's newest checkpoint that is whole."""
    found = folders.finished(Path(trainer.checkpoint_callback.dirpath).parent)
    return found[0] if found else None
