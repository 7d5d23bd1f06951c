"""`evaluations.json`: every evaluation of a run's checkpoints, beside `run.json`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nemotron_h.checkpoint.folders import step_of
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, write_json

FILE = "evaluations.json"


def path_of(checkpoint: Path) -> Path:
    """Return the path in the run's folder; a checkpoint that is in no run has its own."""
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return folder / FILE


def read(checkpoint: Path) -> list[dict[str, Any]]:
    """Return all evaluations so far, oldest first.

    Errors:
        UserError: the file is damaged.
    """
    path = path_of(checkpoint)
    if not path.exists():
        return []
    try:
        return list(read_json_object(path)["evaluations"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}", hint="move it away; a new one is written") from error


def add(checkpoint: Path, entries: list[dict[str, Any]]) -> Path:
    """Add evaluations of a checkpoint, with the time; those before stay.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        entries: `task`, `metrics` (name -> [value, standard error or None]) and what describes how they came out.
    Returns:
        the file.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    whose = {"time": now, "checkpoint": checkpoint.name, "step": step_of(checkpoint)}
    path = path_of(checkpoint)
    write_json(path, {"evaluations": [*read(checkpoint), *({**whose, **entry} for entry in entries)]})
    return path
