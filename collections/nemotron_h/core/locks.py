"""Let one process at a time write a folder: a lock that dies with the process that holds it. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from nemotron_h.core.errors import UserError, naming

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: locks of this process; open files, which would unlock when they are collected
_HELD: set[TextIO] = set()


def acquire(folder: Path, doing: str, key: str, hint: str = "wait until it has ended") -> TextIO:
    """Make a folder and lock it until the returned file is closed or this process ends, however it ends.

    Args:
        folder: `.lock` in it stays and says who held the lock last.
        doing: with the folder, as an error says it: "trained".
        key: that names the folder, for errors.
        hint: where another process holds the lock.
    Errors:
        UserError: another process holds it: names the process, its host and since when; or the folder cannot be made
            or written.
    """
    with naming(key):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(f"{folder} is being {doing} by another process: {holder}", hint=hint) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        print(f"{folder}: its file system has no locks; start no second process that writes it", flush=True)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _HELD.add(file)
    return file


def holder(folder: Path) -> str | None:
    """Return who writes a folder now, as an error of `acquire` names it; None where nobody does, or it is not known."""
    with contextlib.suppress(OSError), open(folder / LOCK, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None


def release(file: TextIO) -> None:
    """Unlock before the process ends."""
    _HELD.discard(file)
    file.close()


@contextlib.contextmanager
def locked(folder: Path, doing: str, key: str, hint: str = "wait until it has ended") -> Iterator[None]:
    """Hold the lock of a folder; see `acquire`."""
    file = acquire(folder, doing, key, hint)
    try:
        yield
    finally:
        release(file)


def _leave_to_parent() -> None:
    """Close a forked child's copies, which would hold the locks after the death of their process."""
    for file in _HELD:
        file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
