"""End a process without taking the interpreter apart: a thread of C++ that outlives it aborts it. Imports no torch."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable


def run_to_the_end(command: Callable[[], object]) -> None:
    """Run a command; the process ends with its exit code right after the exit handlers that it registers.

    gloo has some forty threads in a rank, writers of checkpoints free tensors. One that asks for Python's lock while
    the interpreter is taken apart is ended in the middle of C++, and the whole process with it: SIGABRT, "terminate
    called without an active exception", after a run that had done all its work. Where the command raises another
    exception than SystemExit the process ends as Python has it.
    """
    code: int | None = None

    def leave() -> None:
        if code is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(leave)  # the first one registered is the last one called
    try:
        command()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
