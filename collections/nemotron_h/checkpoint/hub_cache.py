"""The folder where a checkpoint of the Hugging Face Hub lies once it was imported. No torch."""

from __future__ import annotations

from pathlib import Path

from nemotron_h.core import hub
from nemotron_h.core.errors import UserError
from nemotron_h.data.prepare.fetch import cache_folder


def folder_of(repository: hub.Repository) -> Path:
    """Return the folder, by name and revision as they are written; it appears whole."""
    revision = repository.revision.replace("/", "--")
    return cache_folder() / "hub" / "checkpoints" / f"{repository.name.replace('/', '--')}@{revision}"


def path_of(checkpoint: str | Path) -> Path:
    """Return where a named checkpoint or run is, or will be: `hub:organisation/name@revision` in the cache, else the
    path that it is.

    Errors:
        UserError: a name of the Hub that is written otherwise.
    """
    if hub.is_hub(checkpoint):
        return folder_of(hub.parse(str(checkpoint), "checkpoint"))
    return Path(checkpoint).expanduser()


def check_fetched(checkpoint: str | Path) -> None:
    """Refuse a checkpoint of the Hub that is not in the cache.

    Errors:
        UserError: names the command that fetches it.
    """
    if hub.is_hub(checkpoint) and not path_of(checkpoint).is_dir():
        raise UserError(f"{checkpoint} is not on this machine yet", f"Run: nemotron-h import hf {checkpoint}")
