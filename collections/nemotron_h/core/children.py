"""Child processes that end with their parent, and leave signals to the process group to it. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process signalled when its parent ends, in whatever way; holds after an exec too. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def ready_loader_worker(_: int) -> None:
    """Ready a forked data loader: it ends when its parent says so or dies, and by no signal to the process group.

    The step that the run finishes after a signal still needs its data. A `worker_init_fn` of torch's `DataLoader`.
    """
    end_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler does not learn who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)
