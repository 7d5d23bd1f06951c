"""The agent that starts the ranks of a node, and starts all of them again when one fails or hangs: NVRx's ft_launcher
with a policy and with stacks.

NVRx's own starts a run again whatever ended it, as often as it is told, and its monitors kill a rank that hangs, which
leaves no trace of where.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from nvidia_resiliency_ext.fault_tolerance import launcher, rank_monitor_server

from nemotron_h.core.children import end_with_parent
from nemotron_h.launch.faults import FINAL, Fault, Restarts, read_hang
from nemotron_h.training.sections import DUMP_SIGNAL, STACKS, stack_file

#: ours: the others get so long to end by themselves when a rank failed: to say why, too; and after one that left
GRACE_S, LEAVE_S = 1.0, 60.0
#: ours: a stack is written within milliseconds; a process in the driver's hands never writes one
DUMP_S = 2.0
#: ours: between a monitor's looks at its rank
CHECK_S = 1.0
#: ours: monitors of other nodes have told their agents by then, so all stacks are written before a rank is killed
OTHER_NODES_S = 3.0
#: in a run's folder
FOLDER = "stacks"


class Over(Exception):
    """The end of a run that is not started again."""


def hang_file(rank: int) -> Path:
    """Return the file in which a monitor tells of its rank."""
    return Path(os.environ[STACKS]) / f"hang-{rank}.json"


class HangMonitor(rank_monitor_server.RankMonitorServer):
    """NVRx's monitor of a rank, a process of its own, which tells the agent of a hang in place of killing the rank."""

    def __init__(self, *args: Any) -> None:
        end_with_parent(signal.SIGKILL)
        super().__init__(*args)
        self.reason = ""

    async def _handle_unhealthy_node(self) -> None:
        self.reason = "its GPU is not healthy"
        await super()._handle_unhealthy_node()

    def _shutdown_rank(self) -> None:
        file = hang_file(self.rank_info.global_rank)
        if file.exists():
            return
        now = time.monotonic()
        section, begun = min(self.open_sections.items(), key=lambda item: item[1], default=("", now))
        told = {
            "rank": self.rank_info.global_rank,
            "section": section,
            "seconds": now - begun,
            "limit": self.cfg.rank_section_timeouts.get(section) or 0.0,
            "reason": self.reason,
        }
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(told))
        temporary.replace(file)


class Agent(launcher.LocalElasticAgent):
    """NVRx's agent, which asks `Restarts` before it starts a run again.

    Args:
        restarts: of this run.
        nodes: of the run.
        kwargs: as NVRx's.
    Errors:
        Over: the run is not started again; `codes` says how its ranks ended.
    """

    def __init__(self, *args: Any, restarts: Restarts, nodes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.restarts, self.nodes = restarts, nodes
        self.ended = False

    def setup_rank_monitors(self, envs: Mapping[int, Mapping[str, str]]) -> None:
        """Start the monitors as NVRx does, without the one that prints each state of a restart."""
        host, self._is_store_host = self._is_store_host, False
        try:
            super().setup_rank_monitors(envs)
        finally:
            self._is_store_host = host

    def codes(self) -> dict[int, int | None]:
        """Return rank -> exit code of the ranks of this node; None while it runs."""
        if self._pcontext is None:
            return {}
        handlers = self._pcontext.subprocess_handlers
        return {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in self._worker_group.workers}

    def _pids(self) -> dict[int, int]:
        """Return rank -> process of the ranks that run."""
        codes = self.codes()
        running = (worker for worker in self._worker_group.workers if codes[worker.global_rank] is None)
        return {worker.global_rank: worker.id for worker in running}

    def _monitor_workers(self, group: Any) -> Any:
        """Look at the ranks, and end those of a hang."""
        result = super()._monitor_workers(group)
        if result.state is launcher.WorkerState.HEALTHY and self._hangs():
            time.sleep(1.2 * CHECK_S)  # the other monitors tell of their ranks, which wait for it
            self._end_ranks(self._hangs())
            result = super()._monitor_workers(group)
        return result

    def _restart_workers(self, group: Any) -> None:
        """Start the ranks again, or raise `Over`; without a failure here another node begins a restart."""
        if not any(self.codes().values()):
            self._write(self._dump())
            self._kill()  # they wait for those of the other node, and would not hear SIGTERM
        elif not self.ended:
            self._end_ranks({})
        super()._restart_workers(group)
        self.ended = False

    def _hangs(self) -> dict[int, Mapping[str, object]]:
        """Return rank -> what its monitor says, of ranks that hang."""
        files = {worker.global_rank: hang_file(worker.global_rank) for worker in self._worker_group.workers}
        return {rank: read_hang(file) for rank, file in files.items() if file.exists()}

    def _end_ranks(self, hangs: Mapping[int, Mapping[str, object]]) -> None:
        """End all ranks of this node after their stacks are written, and ask whether to go on.

        Errors:
            Over: not to.
        """
        now, self.ended = time.time(), True
        if not hangs:
            self._wait(GRACE_S)
        if any(code in FINAL for code in self.codes().values()):
            self._wait(LEAVE_S)
            self._kill()
            self._exit_barrier_timeout = LEAVE_S  # for other nodes
            raise Over
        faults = [Fault(rank, code, now) for rank, code in self.codes().items() if code]
        stopped = [rank for rank, pid in self._pids().items() if _is_stopped(pid)]
        for rank, hang in hangs.items():
            faults.append(Fault(rank, None, now - hang["seconds"] - CHECK_S, hang, rank in stopped))
        stacks = self._dump()
        if hangs and self.nodes > 1:
            time.sleep(OTHER_NODES_S)
        self._kill()
        said = self.restarts.next(faults, stacks, self._write(stacks))
        for rank in self.codes():
            hang_file(rank).unlink(missing_ok=True)
            stack_file(rank).unlink(missing_ok=True)
        if said is None:
            self._exit_barrier_timeout = LEAVE_S
            raise Over
        print(said, flush=True)

    def _wait(self, seconds: float) -> None:
        """Wait until all ranks have ended, or so long."""
        end = time.monotonic() + seconds
        while None in self.codes().values() and time.monotonic() < end:
            time.sleep(0.05)

    def _dump(self) -> dict[int, str]:
        """Have the ranks that run write their stacks, and return them."""
        begun, end = self._pids(), time.monotonic() + DUMP_S
        for pid in begun.values():
            _send(pid, DUMP_SIGNAL)  # first: a process that is stopped takes it before it goes on
            _send(pid, signal.SIGCONT)
        left = set(begun)
        while left and time.monotonic() < end:
            time.sleep(0.1)
            left = {rank for rank in left if not _text(stack_file(rank))}
        time.sleep(0.1)  # the last one may still write
        return {rank: _text(stack_file(rank)) for rank in self.codes()}

    def _write(self, stacks: Mapping[int, str]) -> str:
        """Write stacks into the run's folder, and return the file's name there; empty where there are none."""
        texts = [f"rank {rank}\n{text}\n" for rank, text in stacks.items() if text]
        if not texts or not self.restarts.run.is_dir():
            return ""
        node = f"-node-{self._worker_group.group_rank}" if self.nodes > 1 else ""
        name = f"{FOLDER}/{time.strftime('%Y%m%d-%H%M%S')}{node}.txt"
        file = self.restarts.run / name
        try:
            file.parent.mkdir(exist_ok=True)
            file.write_text("\n".join(texts))
        except OSError as error:
            print(f"warning: no stacks were written: {error}", flush=True)
            return ""
        return name

    def _kill(self) -> None:
        """Kill the ranks that run, with what they started, and wait for their ends."""
        for pid in self._pids().values():
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._wait(LEAVE_S)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
