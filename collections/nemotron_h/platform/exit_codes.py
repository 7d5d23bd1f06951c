"""A mistake of the user, or a file that cannot be, ends a job as it ends a command: one message, exit code 2.

A job starts in nemo-run's runner, where an exception would be a traceback and exit code 1, as after a crash; a chain of
jobs goes on after a crash, and not after a mistake.
"""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType

from nemotron_h.core.errors import report, user_error


def install() -> None:
    """Set the hook for uncaught exceptions; those of other types are shown as before."""
    before = sys.excepthook
    if getattr(before, "nemotron_h", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        mistake = user_error(error)
        if mistake is not None:
            with contextlib.redirect_stderr(sys.__stderr__):  # whatever upstream has put in its place by now
                report(mistake)
            raise SystemExit(mistake.EXIT_CODE)  # the interpreter takes a hook's exit code for its own
        before(kind, error, trace)

    hook.nemotron_h = True  # type: ignore[attr-defined]
    sys.excepthook = hook
