"""Run the installed command in a process of its own and disturb it from outside: signals, limits, a full disk.

Nothing of the campaign is in the process; the moment is told by what the run writes into `progress.jsonl`.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cases import Fault
from injector import fill

POLL_S = 0.01


def run(command: Sequence[str], fault: Fault, folder: Path, name: str, seconds: float) -> int:
    """Run a command, disturbed where the fault is one; its output goes to NAME.out and NAME.err of the folder.

    Args:
        command: without the path of its program, which lies beside this Python.
        seconds: after which it is killed.
    Returns:
        its exit code, negative where a signal ended it.
    """
    environment, none = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    end = time.monotonic() + seconds
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        process = subprocess.Popen(
            program,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            stdin=none,
            start_new_session=True,
        )
        try:
            if fault.kind != "none" and _wait(process, fault, end):
                time.sleep(fault.delay)
                if process.poll() is None:
                    Path(fault.mark).touch()
                    act(process, fault)
            return process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def _wait(process: subprocess.Popen, fault: Fault, end: float) -> bool:
    """Wait for a run's step; return whether it came."""
    progress = Path(fault.folder) / "progress.jsonl"
    while fault.part != "start":
        if progress.is_file() and f'{{"step": {fault.step},' in progress.read_text(errors="replace"):
            return True
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def act(process: subprocess.Popen, fault: Fault) -> None:
    """Do to a process what a fault is."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
    if fault.kind == "interrupt_group":
        os.killpg(process.pid, signal.SIGINT)
    elif fault.kind == "full":
        fill(Path(fault.disk), int(fault.amount))
    elif fault.kind == "file_limit":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (int(fault.amount), resource.RLIM_INFINITY))
    else:
        process.send_signal(signals[fault.kind])
    if fault.kind == "stop":
        time.sleep(fault.amount)
        process.send_signal(signal.SIGCONT)
