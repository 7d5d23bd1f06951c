"""The folder of a run: made and locked before anything is written into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo import lightning as nl

from nemotron_h.core import locks
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.progress import STEPS

#: what errors call the folder: its keys
KEYS = "the run's folder (log.dir and name)"


@dataclass
class RunFolder(nl.NeMoLogger):
    """NeMo's logger, in a folder that no other process trains in. The first rank holds the lock until it ends."""

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
        with naming(KEYS):
            return super().setup(trainer, resume_if_exists, task_config)

    def _setup_files_to_move(self, log_dir: Path, app_state: Any) -> None:
        """Leave the lock and the steps in their place: NeMo moves files of an earlier start into a folder of theirs."""
        super()._setup_files_to_move(log_dir, app_state)
        stay = (locks.LOCK, STEPS)
        app_state.files_to_move = [path for path in app_state.files_to_move if path.name not in stay]
