"""A pool of worker processes that end with this one, and what its failures are caused by."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nemotron_h.core.errors import UserError


@contextlib.contextmanager
def worker_pool(
    workers: int, start: Callable[..., None], arguments: tuple[Any, ...], kept: str, fewer: str
) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes; jobs that have not begun end with it.

    Args:
        start: readies a process, of `arguments`.
        kept: what is there when it is run again, in words; `fewer`: what asks for fewer processes.
    Errors:
        UserError: the system lets no pool be made, or a process of it died.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, spawn, _start, (start, arguments))
    except OSError as error:
        if error.filename or error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(  # of sem_open, which names no file
            f"no semaphore for the worker processes can be made: {error.strerror}",
            "Linux keeps them in shared memory: /dev/shm has to be there, writable and not full "
            "(docker run --shm-size=1g).",
        ) from error
    try:
        yield pool
    except BrokenProcessPool as error:
        raise _death(pool, kept, fewer) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Ready a process: Ctrl-C left to the parent, and no life after the parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def die_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    start(*arguments)


def _death(pool: ProcessPoolExecutor, kept: str, fewer: str) -> UserError:
    """Return the error for a pool of which a process died by itself; the others are ended by the pool (SIGTERM)."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown()  # waits for them, so that all have an exit code
    codes = [process.exitcode for process in processes]
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), None)
    again = f"Run again: {kept}."
    if code == -signal.SIGKILL:
        return UserError(
            "a worker process was killed (SIGKILL), as the system does when memory runs out",
            f"Run again with fewer {fewer}; {kept}.",
        )
    if code is None:
        return UserError("a worker process died", again)
    if code < 0:
        return UserError(f"a worker process was ended by {signal.Signals(-code).name}", again)
    return UserError(f"a worker process ended with exit code {code}; what it wrote before says why", again)
