"""Incidents of a run: how each of its processes began and ended, and steps that were not as others; JSON lines that
every process adds to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.core.files import parsed_lines

#: in a run's folder
INCIDENTS = "incidents.jsonl"
STARTED = "started"
#: of a step, and no ends: a spike, one whose update was not applied, and numbers that were finite when it was run again
SPIKE, SKIPPED, TRANSIENT = "spike", "skipped", "transient"
EVENTS = (SPIKE, SKIPPED, TRANSIENT)
#: of a run that starts itself again (`launch.restarts`), and a rank that is slower than the others
RESTARTED, RECOVERED, GAVE_UP, STRAGGLER = "restarted", "recovered", "gave up", "straggler"
NOTES = (RESTARTED, RECOVERED, GAVE_UP, STRAGGLER)
FINISHED, PREEMPTION = "finished", "preemption"
#: ends that are failures: of the user, of what was read, of the numbers, of the machine, or none of these: a bug
MISTAKE, DATA, NUMERICS, MEMORY = "mistake", "data", "numerics", "out of memory"
HANG, LOST_RANK, GPU, STORAGE, KILLED, ERROR = "hang", "lost rank", "gpu", "storage", "killed", "error"
FAILURES = (MISTAKE, DATA, NUMERICS, MEMORY, HANG, LOST_RANK, GPU, STORAGE, KILLED, ERROR)
ENDS = (FINISHED, PREEMPTION, *FAILURES)


@dataclass(frozen=True)
class Incident:
    """A line of the file.

    Attributes:
        kind: `started`, one of `EVENTS`, of `NOTES`, or of `ENDS`.
        time, began: of the incident and of its process, in seconds since 1970; `began` tells processes apart.
        step: that the process had trained.
        message, error, file: the evidence: in words, type of the exception, the file that it is about or came from.
        rank: that noted it.
        first_step: that the process trained from; of an end.
        checkpoint: step of the newest whole checkpoint, None where there is none; of an end.
        lost_seconds: since that checkpoint, or since the process began where it wrote none; of an end.
        seconds: of the process by what they went to: `setup`, `training`, `validation`, `saving`; of an end.
        details: what else was measured.
    """

    kind: str
    time: float
    began: float
    step: int = 0
    message: str = ""
    error: str = ""
    file: str = ""
    rank: int = 0
    first_step: int = 0
    checkpoint: int | None = None
    lost_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def known(self) -> dict[str, Any]:
        """Return its values, without those that say nothing."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if value or key in ("step", "lost_seconds")}

    def append(self, file: Path) -> None:
        """Add it to a file, in one write, on a line of its own also after half a line of a killed process."""
        with file.open("ab+") as opened:
            torn = opened.seek(0, os.SEEK_END) and (opened.seek(-1, os.SEEK_END), opened.read(1))[1] != b"\n"
            opened.write((b"\n" if torn else b"") + json.dumps(self.known()).encode() + b"\n")

    @classmethod
    def parse(cls, line: str | bytes) -> Incident:
        """Return the incident of a line.

        Errors:
            ValueError: it is none.
        """
        try:
            incident = cls(**json.loads(line))
            numbers = (incident.time, incident.began, incident.step, incident.first_step, incident.lost_seconds)
            numbers = (*numbers, *dict(incident.seconds).values())
            texts = (incident.kind, incident.message, incident.error, incident.file)
        except TypeError as error:
            raise ValueError(str(error)) from error
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("a value is no number")
        if not all(isinstance(text, str) for text in texts) or not isinstance(incident.details, dict):
            raise ValueError("a value is of another kind")
        return incident


def read_incidents(file: Path) -> tuple[list[Incident], list[int]]:
    """Return the incidents of a file and the numbers of unreadable lines, as `parsed_lines` does."""
    return parsed_lines(file, Incident.parse)
