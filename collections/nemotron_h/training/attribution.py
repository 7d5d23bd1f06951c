"""Attribute the end of a run to its cause, by the exception that ended it and by where that was raised."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nemotron_h
from nemotron_h.core import incidents
from nemotron_h.core.errors import UserError
from nemotron_h.training.lost_ranks import is_of_a_collective

_LIBRARY = Path(nemotron_h.__file__).parent
#: errors of a disk or a file system, whoever meets them
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM}
#: (where in the library, from the innermost call outwards) -> kind
_PLACES = (
    ("training/callbacks/nan_guard.py", incidents.NUMERICS),
    ("checkpoint/", incidents.STORAGE),
    ("data/", incidents.DATA),
)


class Cause(NamedTuple):
    """Cause of an end: a kind of `core.incidents`, the exception, the file that it is about or came from, and calls."""

    kind: str
    message: str = ""
    error: str = ""
    file: str = ""
    calls: Sequence[str] = ()


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an exception.

    Source of the kinds: arXiv:2504.03624, 2.4.1, failures of GPUs, of shared infrastructure, and of the application.
    """
    chain = list(_chain(error))
    calls = [call for each in chain for call in _calls(each)]
    message = error.message if isinstance(error, UserError) else str(error)
    named = next((str(each.filename) for each in chain if isinstance(each, OSError) and each.filename), "")
    return Cause(
        _kind(error, chain, calls),
        message.strip()[:1000],
        type(error).__name__,
        named or next((call.rpartition(" ")[0] for call in calls if not call.startswith("core/")), ""),
        calls[:5],
    )


def _kind(error: BaseException, chain: list[BaseException], calls: list[str]) -> str:
    if not isinstance(error, Exception):  # SystemExit, KeyboardInterrupt
        return incidents.PREEMPTION
    if any(map(is_of_a_collective, chain)):
        timed_out = any("timed out" in str(each).lower() or "timeout" in str(each).lower() for each in chain)
        return incidents.HANG if timed_out else incidents.LOST_RANK
    if any(map(_is_of_memory, chain)):
        return incidents.MEMORY
    if any("CUDA error" in str(each) for each in chain):  # torch's text of every error of the driver
        return incidents.GPU
    saves = any(call.startswith("training/callbacks/checkpoint.py") or call.endswith(" check_disk") for call in calls)
    if saves or any(isinstance(each, OSError) and each.errno in _STORAGE for each in chain):
        return incidents.STORAGE
    outside_core = (call for call in calls if not call.startswith("core/"))
    innermost = next(outside_core, "")
    for place, kind in _PLACES:
        if innermost.startswith(place):
            return kind
    return incidents.MISTAKE if isinstance(error, UserError) else incidents.ERROR


def _is_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _calls(error: BaseException) -> Iterator[str]:
    """Yield `file:line function` of the library's calls that an exception came through, the innermost first."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_LIBRARY):
            yield f"{path.relative_to(_LIBRARY)}:{frame.lineno} {frame.name}"
