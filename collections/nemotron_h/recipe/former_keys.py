"""Keys that recipes once had: recipes and records that runs have left keep working.

A former name is read as today's. A key that is gone is read where it states the value that remains, and refused with
any other.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

from omegaconf import BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from nemotron_h.core.errors import UserError

#: former key -> key of today
FORMER = {"log.tensorboard": "log.trackers"}
FORMER |= {f"sources.{former}": f"sources.{key}" for former, key in FORMER.items()}
#: dotted key -> the value that every recipe has now
DROPPED = {
    "minipuzzle.rank": "sum",
    "minipuzzle.aggregation": "mean_l2",
}


def without_dropped(written: DictConfig, origin: str) -> DictConfig:
    """Return what was written without the keys of `DROPPED` and their sources, and say on the standard error which.

    Args:
        written: keys of a recipe, nested.
        origin: the file or recipe to name.
    Errors:
        UserError: a value other than the one that remains.
    """
    for key, remains in DROPPED.items():
        *parts, name = key.split(".")
        if name not in _part(written, parts):
            continue
        value = OmegaConf.to_container(_part(written, parts))[name]
        if value != remains:
            raise UserError(
                f"{origin}: {key} = {value!r} is gone: every recipe has {remains!r} (docs/results/compression.md)",
                hint=f"leave {key} out",
            )
        _say(f"note: {origin}: {key} is no longer a key, every recipe has {remains!r}; leave it out")
        written = copy.deepcopy(written)
        OmegaConf.set_struct(written, False)
        del _part(written, parts)[name]
        _part(written, ["sources"]).pop(key, None)
    return written


def read_former(recipe: DictConfig, where: str) -> None:
    """Replace former keys in the content of a recipe's file.

    Errors:
        UserError: both names are there, with two values.
    """
    log, stated = recipe.get("log"), recipe.get("sources")
    if OmegaConf.is_dict(log) and "tensorboard" in log:
        written = OmegaConf.to_container(log, resolve=False)
        trackers = trackers_of(written["tensorboard"], f"{where}: ")
        if written.get("trackers", trackers) != trackers:
            raise UserError(f"{where}: log.tensorboard and log.trackers set one value", hint="keep log.trackers")
        del log["tensorboard"]
        log["trackers"] = trackers
    if OmegaConf.is_dict(stated) and "log.tensorboard" in stated:
        stated["log.trackers"] = stated.pop("log.tensorboard")


def trackers_of(value: Any, where: str = "") -> list[str]:
    """Return `log.trackers` of a `log.tensorboard`, and say once that this is its name now.

    Errors:
        UserError: it is no boolean; `where` stands before the key.
    """
    try:
        chosen = BooleanNode(None if value in ("null", "None") else value)._value()
    except ValidationError as error:
        raise UserError(
            f"{where}log.tensorboard: {str(value)[:60]!r} is not a boolean",
            hint="write log.trackers: [tensorboard], or [] for none",
        ) from error
    trackers = ["tensorboard"] if chosen else []
    _say(f"note: log.tensorboard is now log.trackers; {str(value).lower()} is read as [{', '.join(trackers)}]")
    return trackers


def _part(written: DictConfig, parts: list[str]) -> DictConfig:
    """Return a part of what was written; an empty one where there is none, or no mapping."""
    for name in parts:
        written = written.get(name)
        if not isinstance(written, DictConfig) or written._is_none():
            return OmegaConf.create()
    return written


@functools.cache  # a command may compose a recipe several times
def _say(line: str) -> None:
    print(line, file=sys.stderr)
