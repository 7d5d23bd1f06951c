"""The folder of a run: made and locked before anything is written into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo import lightning as nl

from nemotron_h.core import locks
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.progress import STEPS
from nemotron_h.platform.trackers import check_trackers
from nemotron_h.training import trackers

#: what errors call the folder: its keys
KEYS = "the run's folder (log.dir and name)"


@dataclass
class RunFolder(nl.NeMoLogger):
    """NeMo's logger, in a folder that no other process trains in. The first rank holds the lock until it ends.

    Attributes beyond NeMo's:
        trackers: as `log.trackers`; each takes the place of NeMo's own (`tensorboard`, `wandb`).
        project: as `log.project`.
    """

    trackers: list[str] = field(default_factory=list)
    project: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.trackers)
        for name in self.trackers:
            if getattr(self, name, None) is not None:
                raise UserError(f"log.{name} and log.trackers = {self.trackers} set one value", hint="keep one of them")

    def setup(self, trainer: Any, resume_if_exists: bool = False, task_config: Any = None) -> Any:
        """Make and lock the folder, then set up as NeMo does.

        Errors:
            UserError: the folder cannot be made or written, or another process trains in it.
        """
        if not self.explicit_log_dir:
            raise UserError(f"{KEYS} is not set", hint="log.dir=DIR")
        if trainer.is_global_zero:
            hint = "wait until it has ended, or write another run: log.dir=DIR"
            locks.acquire(Path(self.explicit_log_dir), "trained", KEYS, hint)
        folder = Path(self.explicit_log_dir)
        loggers = trackers.loggers(self.trackers, self.project, folder, first=trainer.is_global_zero)
        self.tensorboard = loggers.pop("tensorboard", self.tensorboard)
        self.wandb = loggers.pop("wandb", self.wandb)
        self.extra_loggers = [*self.extra_loggers, *loggers.values()]
        with naming(KEYS):
            return super().setup(trainer, resume_if_exists, task_config)

    def _setup_files_to_move(self, log_dir: Path, app_state: Any) -> None:
        """Leave the lock and the steps in their place: NeMo moves files of an earlier start into a folder of theirs."""
        super()._setup_files_to_move(log_dir, app_state)
        stay = (locks.LOCK, STEPS, trackers.IDS)
        app_state.files_to_move = [path for path in app_state.files_to_move if path.name not in stay]
