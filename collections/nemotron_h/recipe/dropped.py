"""Keys that recipes once had. A file that states the value which remains is read; any other value is refused."""

from __future__ import annotations

import copy
import functools
import sys

from omegaconf import DictConfig, OmegaConf

from nemotron_h.core.errors import UserError

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
                f"{origin}: {key} = {value!r} is gone: every recipe has {remains!r} (docs/compression.md)",
                hint=f"leave {key} out",
            )
        _say(f"note: {origin}: {key} is no longer a key, every recipe has {remains!r}; leave it out")
        written = copy.deepcopy(written)
        OmegaConf.set_struct(written, False)
        del _part(written, parts)[name]
        _part(written, ["sources"]).pop(key, None)
    return written


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
