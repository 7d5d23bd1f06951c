"""Runs that a pipeline starts, as forks of its process: importing NeMo takes longer than a small run."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO


class ForkedRun:
    """A run in the place of `subprocess.Popen`: as much of that as `nemotron_h.launch.runs` uses."""

    def __init__(
        self, main: Callable[[], None], command: Sequence[str], stdout: TextIO, preexec_fn: Callable[[], None], **_: Any
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        preexec_fn()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        sys.argv = [os.path.basename(command[0]), *command[1:]]
        os._exit(_code_of(main))

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        """Wait for its end."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("run", timeout)
            time.sleep(0.02)
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)


def _code_of(main: Callable[[], None]) -> int:
    """Return the exit code that Python would end with."""
    try:
        main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
