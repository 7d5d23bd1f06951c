"""Former keys of recipes, read as those of today: recipes and records that runs have left keep working."""

from __future__ import annotations

import functools
import sys
from typing import Any

from omegaconf import BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from nemotron_h.core.errors import UserError

#: former key -> key of today
FORMER = {"log.tensorboard": "log.trackers"}
FORMER |= {f"sources.{former}": f"sources.{key}" for former, key in FORMER.items()}


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


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


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
