"""The pool of a preparation's worker processes, and what its failures are caused by."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from nemotron_h.core.errors import UserError
from nemotron_h.data.prepare.shards import start_worker


@contextlib.contextmanager
def worker_pool(workers: int, tokenizer: str, chat_template: str) -> Iterator[ProcessPoolExecutor]:
    """Open a pool of processes with this tokenizer and template; jobs that have not begun end with it.

    Errors:
        UserError: the system lets no pool be made, or a process of it died.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer, chat_template))
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
        raise _death(pool) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _death(pool: ProcessPoolExecutor) -> UserError:
    """Return the error for a pool of which a process died by itself; the others are ended by the pool (SIGTERM)."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown()  # waits for them, so that all have an exit code
    codes = [process.exitcode for process in processes]
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), None)
    again = "Run again: finished shards are kept."
    if code == -signal.SIGKILL:
        return UserError(
            "a worker process was killed (SIGKILL), as the system does when memory runs out",
            "Run again with fewer --workers; finished shards are kept.",
        )
    if code is None:
        return UserError("a worker process died", again)
    if code < 0:
        return UserError(f"a worker process was ended by {signal.Signals(-code).name}", again)
    return UserError(f"a worker process ended with exit code {code}; what it wrote before says why", again)
