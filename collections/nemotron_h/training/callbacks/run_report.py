"""Say how the run ended, where it ends or stops: in its incidents, its record and its report."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.training.callbacks.incidents import Incidents
from nemotron_h.training.callbacks.run_record import RunRecord


class RunReport(pl.Callback):
    """Draw `report.html` and `loss.svg` in the run's folder, on rank 0: of a finished run, and of one that stops.

    A report that cannot be drawn is a warning: it changes neither exit code nor checkpoints. A callback that ends the
    run by itself calls `stop` first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to owe a report."""
        self.pending = trainer.is_global_zero

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the end and draw, after the last checkpoint."""
        note(trainer)
        self.draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Note the end and draw before an error ends the run; a second ctrl-c does not wait for a report."""
        note(trainer, message="a second ctrl-c" if isinstance(exception, KeyboardInterrupt) else "", error=exception)
        if not isinstance(exception, KeyboardInterrupt):
            said = exception.message if isinstance(exception, UserError) else str(exception)
            self.draw(trainer, f"{type(exception).__name__}: {said}" if type(exception) is not UserError else said)

    def draw(self, trainer: pl.Trainer, stopped: str | None = None) -> None:
        """Draw the report, once.

        Args:
            stopped: why the run stops before its end, for its record; None where the record says how it ended.
        """
        if not self.pending:
            return
        self.pending = False
        folder = Path(trainer.checkpoint_callback.dirpath).parent
        try:
            for record in (cb for cb in trainer.callbacks if stopped is not None and isinstance(cb, RunRecord)):
                record.write(trainer, record.path(trainer), stopped)
            from nemotron_h.report.page import write  # with matplotlib, which no step needs

            write(folder)
        except Exception as error:
            said = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            Console(stderr=True, soft_wrap=True).print(
                f"warning: no report was drawn: {said}\nto draw it: nemotron-h report {folder}",
                style="yellow",
                markup=False,
                highlight=False,
            )


def note(
    trainer: pl.Trainer, kind: str = "", message: str = "", error: BaseException | None = None, rank: int = 0
) -> None:
    """Note the end of this process in the run's incidents (`Incidents.end`), and finish the checkpoint that is being
    written (`StepCheckpoint.end`).
    """
    if hasattr(trainer.checkpoint_callback, "end"):  # tests have others
        trainer.checkpoint_callback.end(trainer, error)
    for callback in trainer.callbacks:
        if isinstance(callback, Incidents):
            callback.end(trainer, kind, message, error, rank)


def stop(trainer: pl.Trainer, reason: str, kind: str) -> None:
    """Note the end of a run that is about to stop, of a kind of `core.incidents`, and draw its report."""
    note(trainer, kind, reason)
    for callback in trainer.callbacks:
        if isinstance(callback, RunReport):
            callback.draw(trainer, reason)
