"""A rank that trains nothing: `light_rank KIND` ends, or waits, as its kind says."""

from __future__ import annotations

import os
import signal
import sys
import time


def main(kind: str) -> None:
    """Be that rank."""
    if kind == "mistake":
        sys.exit(2)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
