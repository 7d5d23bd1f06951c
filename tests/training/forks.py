"""Runs programs as forks of a process that has imported everything: importing NeMo takes longer than a small run.

`Forks()` starts the process; `run` runs a script or module as `python` would, or as `torchrun` would on so many ranks:
each rank is a process, which ends in its own way; where one fails the others are killed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Forks:
    """The process to fork from, until `close`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(
        self,
        program: str,
        *arguments: str,
        folder: Path,
        name: str,
        ranks: int = 1,
        torchrun: bool = False,
        seconds: float = 300,
    ) -> int:
        """Run a script (its path) or a module (its name) and wait for it.

        Args:
            folder: where it runs, and where NAME.out and NAME.err go.
            ranks: processes, several as torchrun starts them.
            torchrun: one too.
            seconds: after which it is killed.
        Returns:
            its exit code, negative where a signal ended it; of several ranks that of the first that failed.
        """
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        out, err = (str(folder / f"{name}.{end}") for end in ("out", "err"))
        order = {"program": program, "arguments": arguments, "folder": str(folder), "out": out, "err": err}
        order |= {"ranks": ranks, "torchrun": torchrun or ranks > 1, "seconds": seconds}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def launch(self, program: Path, *arguments: str, folder: Path, ranks: int, seconds: float = 300) -> None:
        """Run a script on ranks as torchrun does, and fail where it fails."""
        name = f"{program.stem}-{ranks}"
        code = self.run(str(program), *arguments, folder=folder, name=name, ranks=ranks, torchrun=True, seconds=seconds)
        assert code == 0, (folder / f"{name}.err").read_text()[-4000:]

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def environments(ranks: int, torchrun: bool) -> list[dict[str, str]]:
    if not torchrun:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "GROUP_RANK": "0",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _become(order: dict, environment: dict[str, str]) -> None:
    """Turn this fork into the program."""
    os.setsid()
    for descriptor, path in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["folder"])
    os.environ.update(environment)
    sys.argv = [order["program"], *order["arguments"]]


def _run(program: str) -> None:
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _wait(pids: list[int], seconds: float) -> int:
    """The exit code of all; where one fails the others, and what they started, are killed."""
    left, code, end = set(pids), 0, time.monotonic() + seconds
    while left:
        for pid in list(left):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                left.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if (code or time.monotonic() > end) and left:
            grace = time.monotonic() + 20  # torchrun's ranks get the time to end by themselves too
            while left and time.monotonic() < min(grace, end):
                left -= {pid for pid in list(left) if os.waitpid(pid, os.WNOHANG)[0]}
                time.sleep(0.02)
            code = code or -signal.SIGKILL
            for pid in left:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            left = set()
        time.sleep(0.02)
    return code


def serve() -> None:
    """Take orders from the standard input until it is closed; a fork returns from here and runs its program."""
    from nemotron_h.core.ending import run_to_the_end
    from nemotron_h.platform import quiet

    quiet.hush()
    import nemotron_h.report.page
    import nemotron_h.training.stages.distillation.stage
    import nemotron_h.training.stages.preference.stage
    import nemotron_h.training.stages.sft  # noqa: F401

    replies = os.dup(1)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        for path in (order["out"], order["err"]):
            Path(path).write_text("")
        pids = []
        for environment in environments(order["ranks"], order["torchrun"]):
            pid = os.fork()
            if not pid:
                os.close(replies)
                _become(order, environment)
                run_to_the_end(functools.partial(_run, order["program"]))
                return
            pids.append(pid)
        os.write(replies, f"{_wait(pids, order['seconds'])}\n".encode())


#: of this process: whatever folder a test is of, NeMo is imported once
FORKS = Forks()
atexit.register(FORKS.close)

if __name__ == "__main__":
    serve()
