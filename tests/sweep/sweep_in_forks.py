"""Run a sweep whose runs are forks: `sweep_in_forks.py SIGNAL STEPS SWEEP.yaml`.

The signal ends this process when all runs together have reported so many steps; 0 is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from forked_runs import ForkedRun


def end_at(number: int, steps: int, folder: Path) -> None:
    """Send this process a signal when the runs in a folder have reported so many steps."""
    while sum(file.read_bytes().count(b"\n") for file in folder.glob("*/progress.jsonl")) < steps:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def main(number: str, steps: str, sweep: str) -> None:
    """Run the command as its console script does."""
    from nemotron_h.cli.main import main as command
    from nemotron_h.launch import command as nemo
    from nemotron_h.launch import runs
    from nemotron_h.sweep.file import read_sweep

    def start(*arguments: object, **named: object) -> ForkedRun:
        return ForkedRun(nemo.main, *arguments, **named)

    runs.subprocess = type("subprocess", (), {**vars(subprocess), "Popen": staticmethod(start)})
    if int(number):
        watched = int(number), int(steps), read_sweep(Path(sweep)).folder
        threading.Thread(target=end_at, args=watched, daemon=True).start()
    sys.argv = ["nemotron-h", "sweep", sweep]
    command()


if __name__ == "__main__":
    main(*sys.argv[1:])
