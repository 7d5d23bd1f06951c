"""Read how the processes of a run ended, and what share of their time was training that counts. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.checkpoint import folders
from nemotron_h.core import locks
from nemotron_h.core.incidents import (
    ENDS,
    EVENTS,
    FAILURES,
    FINISHED,
    HANG,
    INCIDENTS,
    KILLED,
    LOST_RANK,
    NOTES,
    Incident,
    read_incidents,
)
from nemotron_h.core.progress import STEPS, Step, read_steps

RUNNING = "running"


@dataclass(frozen=True)
class Process:
    """A process of a run, of all its ranks.

    Attributes:
        began: in seconds since 1970.
        end: how it ended. Without a line of it the process was killed, or is running: an incident of that kind, as far
            as its steps say.
        events: spikes, skipped steps and transient faults, in steps that count.
        notes: restarts, and ranks that were slow.
    """

    began: float
    end: Incident
    events: list[Incident]
    notes: list[Incident] = dataclasses.field(default_factory=list)

    @property
    def wall(self) -> float:
        """Return its seconds."""
        return max(0.0, self.end.time - self.began)

    @property
    def steps(self) -> int:
        """Return how many steps it trained."""
        return max(0, self.end.step - self.end.first_step)


@dataclass(frozen=True)
class Summary:
    """The time of a run.

    Attributes:
        wall: seconds from its first start to its last end, without those after an end that finished it.
        seconds: by what they went to. `training` is of steps that count, `redone` of those that were trained again;
            `between` processes; `other` is what nothing measured, an unfinished step among it.
        failures: ends that are neither `finished` nor `preemption`.
        restarts: processes after the first.
        events: kind -> how many there were, in steps that count.
    """

    wall: float
    seconds: dict[str, float]
    failures: int
    restarts: int
    events: dict[str, int]

    @property
    def goodput(self) -> float:
        """Return the share of the wall time that was training of steps that count."""
        return self.seconds["training"] / self.wall if self.wall else 0.0

    @property
    def seconds_between_failures(self) -> float | None:
        """Return the mean time that processes ran per failure; None without a failure."""
        return (self.wall - self.seconds["between"]) / self.failures if self.failures else None


def processes(folder: Path) -> list[Process]:
    """Return the processes of a run in the order of their starts; none where it has noted none."""
    incidents, _ = read_incidents(folder / INCIDENTS)
    steps, _ = read_steps(folder / STEPS)
    starts = list(dict.fromkeys(incident.began for incident in incidents))
    ends = [_end(began, [i for i in incidents if i.began == began]) for began in starts]
    if None in ends:
        at_work = ends[-1] is None and locks.holder(folder) is not None
        for number, (began, end) in enumerate(zip(starts, ends, strict=True)):
            if end is None:
                until = starts[number + 1] if number + 1 < len(starts) else float("inf")
                kind = RUNNING if at_work and number + 1 == len(starts) else KILLED
                ends[number] = _without_end(folder, kind, began, [s for s in steps if began <= (s.began or 0) < until])
    counted = [_counted(number, ends) for number in range(len(ends))]
    return [
        Process(
            began,
            end,
            [i for i in incidents if i.began == began and i.kind in EVENTS and i.step <= last],
            [i for i in incidents if i.began == began and i.kind in NOTES],
        )
        for began, end, last in zip(starts, ends, counted, strict=True)
    ]


def close_killed(folder: Path, evidence: str = "") -> None:
    """Note the end of a run's last process, which is gone, where it could not do so itself.

    Args:
        evidence: what is known of its end.
    """
    incidents, _ = read_incidents(folder / INCIDENTS)
    if incidents and _end(incidents[-1].began, incidents) is None:
        end = _end_of_killed(folder, incidents[-1].began)
        dataclasses.replace(end, message=evidence or end.message).append(folder / INCIDENTS)


def close(folder: Path, began: float, kind: str, message: str, file: str = "") -> Incident | None:
    """Note the end of a run's process that is gone now, or return the one that names the cause, which a rank has noted.

    Args:
        began: of the process.
        kind: of `core.incidents`.
        message: what is known of its end; a rank that lost another, and noted that, knew less.
        file: the incident's.
    """
    end = _end(began, read_incidents(folder / INCIDENTS)[0])
    if end is not None and end.kind not in (LOST_RANK, HANG, KILLED):
        return end
    now, end = time.time(), _end_of_killed(folder, began)
    lost = since_checkpoint(folder, began, now)[1]
    told = {"kind": kind, "message": message, "file": file, "time": now, "lost_seconds": lost}
    dataclasses.replace(end, **told).append(folder / INCIDENTS)
    return None


def _end_of_killed(folder: Path, began: float) -> Incident:
    """Return the end of a run's last process as far as its steps say."""
    return _without_end(folder, KILLED, began, [s for s in read_steps(folder / STEPS)[0] if (s.began or 0) >= began])


def _end(began: float, incidents: Sequence[Incident]) -> Incident | None:
    """Return the end of a process: the cause, where another rank's end is what rank 0 saw of it."""
    ends = [incident for incident in incidents if incident.began == began and incident.kind in ENDS]
    causes = [end for end in ends if end.kind not in (LOST_RANK, HANG, KILLED)]
    return (causes or ends or [None])[0 if causes else -1]


def since_checkpoint(folder: Path, began: float, until: float) -> tuple[int | None, float]:
    """Return the step of a run's newest whole checkpoint and the seconds since it, or since its process began."""
    whole = folders.finished(folder)
    if not whole:
        return None, round(max(0.0, until - began), 3)
    saved = (whole[0] / folders.RECORD).stat().st_mtime  # at its step; the rest is written while training goes on
    return folders.step_of(whole[0]), round(max(0.0, until - max(saved, began)), 3)


def _without_end(folder: Path, kind: str, began: float, steps: Sequence[Step]) -> Incident:
    """Return an end that no line tells, of the steps that the process reported."""
    last = steps[-1] if steps else None
    until = time.time() if kind == RUNNING else (last.time or began) if last else began
    checkpoint, lost = since_checkpoint(folder, began, until)
    seconds, details = {}, {}
    if last and last.began:
        seconds = {"setup": round(last.began - began, 3), "training": last.metrics.get("training_seconds", 0.0)}
        memory = [
            s.metrics[name] for s in steps for name in ("max_memory_gib", "max_resident_gib") if name in s.metrics
        ]
        details = {"memory_gib": [round(memory[0], 3), round(memory[-1], 3)]} if memory else {}
    seen = f"last seen at step {last.step:,}" if last else "before its first step"
    return Incident(
        kind=kind,
        time=until,
        began=began,
        step=last.step if last else checkpoint or 0,
        message="" if kind == RUNNING else f"it left no end: SIGKILL, a lost machine or power; {seen}",
        first_step=steps[0].step - 1 if steps else checkpoint or 0,
        checkpoint=checkpoint,
        lost_seconds=lost,
        seconds=seconds,
        details=details,
    )


def _counted(number: int, ends: Sequence[Incident]) -> int:
    """Return the last step of a process that no later one trained again."""
    later = [end.first_step for end in ends[number + 1 :] if end.step > end.first_step]
    return min([ends[number].step, *later])


def summary(of: Sequence[Process]) -> Summary:
    """Return the time of a run's processes, as `processes` returns them."""
    ends = [process.end for process in of]
    seconds = dict.fromkeys(("training", "redone", "setup", "validation", "saving", "other", "between"), 0.0)
    for number, process in enumerate(of):
        spent = dict(process.end.seconds)
        trained = spent.pop("training", 0.0)
        counted = _counted(number, ends) - process.end.first_step
        share = max(0, counted) / process.steps if process.steps else 1.0
        for name, value in {**spent, "training": trained * share, "redone": trained * (1 - share)}.items():
            seconds[name] = seconds.get(name, 0.0) + value
        seconds["other"] += max(0.0, process.wall - trained - sum(spent.values()))
        if number and ends[number - 1].kind != FINISHED:
            seconds["between"] += max(0.0, process.began - ends[number - 1].time)
    failures = sum(end.kind in FAILURES for end in ends)
    wall = sum(process.wall for process in of) + seconds["between"]
    events = Counter(event.kind for process in of for event in process.events)
    return Summary(wall, seconds, failures, len(of) - 1, dict(events))


def table(of: Sequence[Process]) -> list[tuple[str, str, str, str, str]]:
    """Return when, step, kind, evidence and seconds lost of each end, event and note, in the order of their times."""
    noted = (i for process in of for i in (*process.events, process.end, *process.notes))
    rows = sorted(noted, key=lambda incident: incident.time)
    return [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.time)),
            f"{incident.step:,}",
            incident.kind,
            evidence(incident),
            "" if incident.kind in (*EVENTS, *NOTES, RUNNING) else f"{incident.lost_seconds:,.0f} s",
        )
        for incident in rows
    ]


def as_json(of: Sequence[Process]) -> str:
    """Return what is known of a run's processes as the text of one JSON object."""
    total = summary(of)
    return json.dumps(
        {
            "processes": [
                {
                    "began": p.began,
                    "end": p.end.known(),
                    "events": [e.known() for e in p.events],
                    "notes": [n.known() for n in p.notes],
                }
                for p in of
            ],
            **dataclasses.asdict(total),
            "goodput": total.goodput,
            "seconds_between_failures": total.seconds_between_failures,
        },
        indent=1,
    )


def evidence(incident: Incident) -> str:
    """Return the evidence of an incident in a sentence."""
    error = "" if incident.error == "UserError" else incident.error
    parts = [f"rank {incident.rank}" if incident.rank else "", error, incident.message]
    details = incident.details
    if "device" in details:
        parts.insert(0, f"{details.get('host')}, GPU {details['device']}")
    parts += [f"rank {rank} was ended by signal {number}" for rank, number in details.get("signals", {}).items()]
    told = ": ".join(part for part in parts if part)
    if "memory_gib" in details:
        first, last = details["memory_gib"]
        part = f"during {details['part']}; " if "part" in details else ""
        told += f" ({part}memory {first:,.2f} GiB at first, {last:,.2f} GiB at last)"
    named = incident.file not in told and (error or incident.kind in NOTES)
    return told + (f" [{incident.file}]" if named else "")


def words(total: Summary) -> list[tuple[str, str]]:
    """Return name and value of what a reader asks of a run's time."""
    between = total.seconds_between_failures
    return [
        ("goodput", f"{total.goodput:.1%} of {total.wall:,.0f} s was training of steps that count"),
        ("time", ", ".join(f"{name} {value:,.0f} s" for name, value in total.seconds.items() if value >= 0.5) or "0 s"),
        ("failures", f"{total.failures}, one in {between:,.0f} s" if between is not None else "none"),
        ("restarts", str(total.restarts)),
        *([("events", ", ".join(f"{count} {kind}" for kind, count in total.events.items()))] if total.events else []),
    ]
