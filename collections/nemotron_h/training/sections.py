"""Tell the monitor of this rank (NVRx's, beside `launch.restarts`) which section of its work it is in.

A section that takes longer than its limit is a hang. Exactly one is open at any time, so nothing is out of sight.
Without a monitor nothing is told. Imports no torch before `connect`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object

#: until the first step of a process has ended, which compiles kernels · from step to step · validation · a
#: checkpoint · after the last step, or after an error
SETUP, STEP, VALIDATION, CHECKPOINTING, ENDING = SECTIONS = ("setup", "step", "validation", "checkpointing", "ending")
#: seconds of a section that was not measured yet; ours, 1800 as NeMo's plugin gives to a first sign of life
UNMEASURED = {SETUP: 1800.0, STEP: 600.0, VALIDATION: 1800.0, CHECKPOINTING: 1800.0, ENDING: 1800.0}
#: a limit is so many times the longest that was measured; NVRx's safety factor
FACTOR = 5.0
#: in a run's folder: the longest of each section and its limit, in seconds
LIMITS = "hang_limits.json"
#: variables that `launch.restarts` sets: the folder that ranks write their stacks to; the least limit in seconds
STACKS, LEAST = "NEMOTRON_H_STACKS", "NEMOTRON_H_HANG_AFTER"
#: has every thread's Python stack written, also while the process waits in C
DUMP_SIGNAL = signal.SIGUSR2


def limits(longest: Mapping[str, float], least: float) -> dict[str, float]:
    """Return the limit of each section in seconds.

    Args:
        longest: measured seconds; sections that are not in it have `UNMEASURED`.
        least: no limit is lower: one slow step, or a stall of the file system, is no hang.
    """
    return {name: max(least, FACTOR * longest[name] if name in longest else UNMEASURED[name]) for name in SECTIONS}


def read_longest(folder: Path) -> dict[str, float]:
    """Return the longest that each section of a run took; empty where none was measured.

    Errors:
        UserError: the run's file of limits is not as it was written.
    """
    file = folder / LIMITS
    if not file.exists():
        return {}
    try:
        return {name: float(read_json_object(file)[name]["longest"]) for name in read_json_object(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not hold the limits of a run's sections", hint=f"remove it: rm {file}") from error


def stack_file(rank: int) -> Path:
    """Return the file that a rank writes its stacks to."""
    return Path(os.environ[STACKS]) / f"rank-{rank}.txt"


class Sections:
    """The sections of this process.

    Attributes:
        monitored: a monitor was there when the process began; the same on all ranks.
        longest: seconds of each section, the longest so far.
    """

    def __init__(self) -> None:
        self.client: Any = None
        self.monitored = False
        self.name, self.entered = SETUP, time.monotonic()
        self.longest: dict[str, float] = {}
        self.limits: dict[str, float] = {}

    def connect(self) -> None:
        """Connect to the monitor, have stacks written at `DUMP_SIGNAL`, and begin the set-up."""
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        file = stack_file(int(os.environ["RANK"])).open("w")
        faulthandler.register(DUMP_SIGNAL, file, all_threads=True)
        client = RankMonitorClient()
        client.init_workload_monitoring()
        client.start_section(SETUP)
        self.client, self.monitored, self.stacks = client, True, file
        self.limits = dict(client.section_timeouts.section)

    def measure(self) -> None:
        """Count the section of now as far as it has come; a rank that goes on after a hang does not count that."""
        seconds = time.monotonic() - self.entered
        if seconds <= self.limits.get(self.name, seconds):
            self.longest[self.name] = max(self.longest.get(self.name, 0.0), seconds)

    def enter(self, name: str) -> None:
        """Leave the section of now for another, or begin the same one again."""
        self.measure()
        before, self.name, self.entered = self.name, name, time.monotonic()
        self._tell(lambda client: (client.end_section(before), client.start_section(name)))

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Be in a section inside of the block, and in the one of before behind it; the set-up goes on as it is."""
        before = self.name
        if before != SETUP:
            self.enter(name)
        yield  # where the block raises, `ENDING` is next
        if before != SETUP:
            self.enter(before)

    def set_limits(self, seconds: Mapping[str, float]) -> None:
        """Have the monitor take these limits from now on."""
        self.limits = dict(seconds)
        state = {"section": dict(seconds), "out_of_section": None, "calculated_sections": [*seconds]}
        state["is_out_of_section_calculated"] = False
        self._tell(lambda client: client.load_state_dict({client.CURRENT_TIMEOUTS_STATE_KEY: {"section": state}}))

    def _tell(self, message: Any) -> None:
        """Tell the monitor. It ends before this process where a signal to the whole job told both to leave."""
        if self.client is None:
            return
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClientError

        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the client prints what it raises
                message(self.client)
        except (RankMonitorClientError, OSError):
            self.client = None


#: of this process
sections = Sections()
