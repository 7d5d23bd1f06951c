"""Say what ended the ranks of a run, decide whether the run is started again, and note both. Imports no torch."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nemotron_h.checkpoint import folders
from nemotron_h.core import incidents
from nemotron_h.core.errors import UserError
from nemotron_h.core.incidents import INCIDENTS, Incident, read_incidents
from nemotron_h.launch.runs import LEFT_EARLY
from nemotron_h.report.incidents import close, evidence, since_checkpoint

T = TypeVar("T")
#: ours: a run that made no new checkpoint in so many restarts one after the other would not in the next
IDLE_RESTARTS = 2
#: a start meets these again: a mistake of the user; a run that was told to leave, which whoever told it continues
FINAL = (UserError.EXIT_CODE, LEFT_EARLY)
#: a stack that ends in one of these files waits for other ranks
_COLLECTIVES = re.compile(r"torch/distributed/|megatron/core/pipeline_parallel/p2p_communication")
#: seconds that the start of a process, as the kernel tells it, may lie before that of its launcher's note of it
_SLACK_S = 0.5


@dataclass(frozen=True)
class Fault:
    """The end of a rank, or its hang.

    Attributes:
        code: exit code, negative where a signal ended it; None of a rank that hangs.
        time: of its last sign of life, in seconds since 1970.
        hang: as `launch.restart_agent.HangMonitor` tells it: section, seconds, limit, reason.
        stopped: the process was stopped (SIGSTOP) when it was looked at.
    """

    rank: int
    code: int | None
    time: float
    hang: Mapping[str, object] | None = None
    stopped: bool = False

    @property
    def kind(self) -> str:
        """Return the kind of incident."""
        if self.hang is not None:
            return incidents.GPU if self.hang["reason"] else incidents.HANG
        return incidents.KILLED if self.code is not None and self.code < 0 else incidents.ERROR

    def __str__(self) -> str:
        if self.hang is None:
            by_signal = f"was ended by {signal.Signals(-self.code).name}" if self.code < 0 else ""
            return f"rank {self.rank} {by_signal or f'ended with exit code {self.code}'}"
        if self.hang["reason"]:
            return f"rank {self.rank}: {self.hang['reason']}"
        state = "is stopped (SIGSTOP)" if self.stopped else "hangs"
        section, seconds, limit = (self.hang[key] for key in ("section", "seconds", "limit"))
        return f"rank {self.rank} {state}: {section} takes {seconds:,.0f} s, its limit is {limit:,.0f} s"


def told(faults: Sequence[Fault], stacks: Mapping[int, str]) -> str:
    """Return what happened in a sentence: of ranks that hang, those which others wait for, where stacks tell them.

    Args:
        stacks: Python stacks of ranks.
    """
    hanging = [fault for fault in faults if fault.kind == incidents.HANG]
    busy = [fault for fault in hanging if not waits(stacks.get(fault.rank, ""))]
    others = [fault for fault in faults if fault not in hanging]
    chosen = others or [fault for fault in hanging if fault.stopped] or busy or hanging
    if len(hanging) > 1 and chosen == hanging:
        ranks = ", ".join(str(fault.rank) for fault in hanging)
        section, limit = hanging[0].hang["section"], hanging[0].hang["limit"]
        return f"ranks {ranks} hang: {section} takes more than its limit of {limit:,.0f} s"
    return "; ".join(map(str, chosen))


def waits(stack: str) -> bool:
    """Tell whether the main thread of a dump (`faulthandler`), which comes last, waits for other ranks."""
    main = stack.rpartition("(most recent call first):")[2]
    return any(_COLLECTIVES.search(line) for line in main.splitlines()[:6])


def exit_code(codes: Sequence[int]) -> int:
    """Return the exit code of a run by those of its ranks.

    That of a mistake, or of a run that was told to leave, where any rank has it; else one that a rank chose; else 128
    and the number of a signal, as a shell says it.
    """
    failed = sorted((code for code in codes if code), key=lambda code: (code not in FINAL, code < 0))
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


class Restarts:
    """The restarts of a run by one launcher.

    Args:
        run: its folder.
        most: restarts that it may have.
    """

    def __init__(self, run: Path, most: int) -> None:
        self.run, self.most = run, most
        self.used = self.idle = 0
        self.launched = self.started = time.time()
        self.checkpoint = self._newest()

    def _newest(self) -> int:
        return max((folders.step_of(path) for path in folders.finished(self.run)), default=-1)

    def next(self, faults: Sequence[Fault], stacks: Mapping[int, str], file: str = "") -> str | None:
        """Take the faults of a start, decide, and note it.

        Args:
            stacks: Python stacks of ranks, which are in `file`, relative to the run's folder.
        Returns:
            what is said of the restart; None: the run is given up, which is noted and printed.
        """
        noted, _ = read_incidents(self.run / INCIDENTS)
        began = noted[-1].began if noted and noted[-1].began > self.started - _SLACK_S else self.started
        of_launch = [i for i in noted if i.kind == incidents.RESTARTED and i.time > self.launched]
        others = any(incident.began == began for incident in of_launch)  # another node has noted this one
        what, newest = told(faults, stacks), self._newest()
        self.idle = 0 if newest > self.checkpoint else self.idle + (self.used > 0)
        self.used = max(self.used, len(of_launch) - others)
        self.checkpoint, self.started = newest, time.time()
        where = f"step {newest:,}" if newest >= 0 else "the first step"
        if self.run.is_dir() and not others:  # else it failed before it made its folder
            end = _noting(lambda: close(self.run, began, faults[0].kind, what, file))
            what = evidence(end) if end is not None else what
        kind, why = incidents.GAVE_UP, ""
        if self.used >= self.most:
            why = f"{self.most} restart{'s' if self.most != 1 else ''} (executor.restarts) are used up"
        elif self.idle >= IDLE_RESTARTS:
            why = f"{self.idle} restarts in a row came to no newer checkpoint than that of {where}"
        else:
            self.used += 1
            kind = incidents.RESTARTED
        said = f"{what}; {why}" if why else f"restart {self.used} of {self.most}, from {where}: {what}"
        if self.run.is_dir() and not others:
            _noting(lambda: self._incident(kind, said, began, faults, file).append(self.run / INCIDENTS))
        if why:
            print(f"the run is given up: {said}", flush=True)
            return None
        return said + (f"; stacks of the ranks: {self.run / file}" if file else "")

    def _incident(self, kind: str, message: str, began: float, faults: Sequence[Fault], file: str) -> Incident:
        fault = min(each.time for each in faults)
        checkpoint, lost = since_checkpoint(self.run, began, fault)
        return Incident(
            kind,
            time.time(),
            began,
            max(0, self.checkpoint),
            message,
            file=file,
            checkpoint=checkpoint,
            lost_seconds=lost,
            details={"restart": self.used, "of": self.most, "fault": fault, "ranks": [each.rank for each in faults]},
        )


def _noting(note: Callable[[], T]) -> T | None:
    """Return what a note returns; one that cannot be written is a warning: the run goes on, or ends, without it."""
    try:
        return note()
    except OSError as error:
        print(f"warning: {INCIDENTS} was not written: {error}", flush=True)
        return None


def read_hang(file: Path) -> Mapping[str, object]:
    """Return what a monitor wrote of a rank that hangs."""
    return json.loads(file.read_text())
