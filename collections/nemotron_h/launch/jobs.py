"""Jobs of Slurm that were submitted from here: where they stand, what they have written, how they ended."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.core.errors import UserError

#: seconds between questions to Slurm, and how many of them in a row may stay without an answer (ours)
ASK_S, SILENT = 15.0, 40
#: ends the name of the file, beside a run's recipe, that says which job it is
RECORD = ".job.json"
_LINE = re.compile(r"^submitted: job (\S+), output in (.+)$", re.MULTILINE)
_ENDED = re.compile(r"^job exited with code (\d+)$", re.MULTILINE)


class QueueError(Exception):
    """Failure of Slurm to answer, which passes."""


@dataclass(frozen=True)
class Job:
    """A job, or the array of jobs of a chain.

    Attributes:
        id: Slurm's number.
        logs: folder of the output: `log-*` of the run and `sbatch_*` of the script, for each job.
    """

    id: str
    logs: str

    def line(self) -> str:
        """Return what `nemo` prints of it."""
        return f"submitted: job {self.id}, output in {self.logs}"

    @classmethod
    def recorded(cls, record: Path) -> Job | None:
        """Read it back from the file that `record` wrote; None where there is none."""
        return cls(**json.loads(record.read_text())) if record.is_file() else None

    def record(self, record: Path) -> None:
        """Write it to a file, for a later call of the same command."""
        record.write_text(json.dumps(dataclasses.asdict(self)))

    def is_queued(self) -> bool:
        """Return True while it is in the queue; where Slurm does not answer it is taken to be."""
        try:
            return bool(self.state())
        except QueueError:
            return True

    @classmethod
    def of_line(cls, text: str) -> Job | None:
        """Read it off that line, anywhere in a text."""
        found = _LINE.search(text)
        return cls(*found.groups()) if found else None

    def state(self) -> str:
        """Ask where it stands: `RUNNING`, `PENDING (Resources)`; empty once it has left the queue.

        Errors:
            QueueError: Slurm did not answer.
            UserError: there is no `squeue` on this machine.
        """
        command = ["squeue", "--noheader", "--jobs", self.id, "--format", "%T (%r)"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise UserError(
                "squeue is not on this machine, and jobs are waited for with it",
                hint="start this on a login node of the cluster, or submit and leave with --detach",
            ) from error
        if done.returncode:
            if "invalid job id" in done.stderr.lower():  # Slurm forgets a job minutes after its end
                return ""
            raise QueueError(done.stderr.strip() or f"squeue: exit code {done.returncode}")
        states = [line.strip().removesuffix("(None)").strip() for line in done.stdout.splitlines() if line.strip()]
        return next((state for state in states if not state.startswith("PENDING")), states[0] if states else "")

    def log(self) -> Path | None:
        """Return the newest file of output: the run's, or the script's where the run wrote none yet."""
        for pattern in ("log-*", "sbatch_*"):
            files = sorted(Path(self.logs).glob(pattern), key=lambda path: path.stat().st_mtime)
            if files:
                return files[-1]
        return None

    def exit_code(self) -> int | None:
        """Return the exit code of the last of its jobs; None where that was killed, or never began."""
        files = sorted(Path(self.logs).glob("sbatch_*"), key=lambda path: path.stat().st_mtime)
        codes = _ENDED.findall(files[-1].read_text(errors="replace")) if files else []
        return int(codes[-1]) if codes else None


def check_none_queued(folder: Path) -> None:
    """Refuse to clear a folder that a job still writes to.

    Errors:
        UserError: names the job.
    """
    for record in sorted(folder.glob(f"*{RECORD}")):
        job = Job.recorded(record)
        if job.is_queued():
            name = record.name.removesuffix(RECORD)
            raise UserError(
                f"{name} of {folder} was begun with other inputs, and its job {job.id} is in the queue",
                hint=f"end it: scancel {job.id}; or go back to those inputs and let it end",
            )


class Watch:
    """A job until it leaves the queue.

    Args:
        job: that was submitted.
        say: told where it stands when that changes, one line.
    """

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        self.job, self.say = job, say
        self._said, self._silent, self._next = "", 0, 0.0

    def over(self) -> bool:
        """Ask whether the job has left the queue, `ASK_S` seconds after the last question at the earliest.

        Errors:
            UserError: Slurm has not answered for long, or cannot be asked from here.
        """
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + ASK_S
        try:
            state, self._silent = self.job.state(), 0
        except QueueError as error:
            self._silent += 1
            if self._silent > SILENT:
                hint = f"job {self.job.id} goes on without this command; run it again to wait on"
                raise UserError(f"Slurm does not answer: {error}", hint=hint) from error
            return False
        if state and state != self._said:
            self._said = state
            self.say(f"job {self.job.id}: {state}")
        return not state
