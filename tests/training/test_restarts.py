"""A run starts itself again after a crash or a hang of a rank, and ends as one that was never disturbed; not where the
next start would meet the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_run import FORKS, Small

from nemotron_h.core.incidents import (
    GAVE_UP,
    INCIDENTS,
    RECOVERED,
    RESTARTED,
    STARTED,
    STRAGGLER,
    Incident,
    read_incidents,
)
from nemotron_h.launch import faults
from nemotron_h.launch.faults import Fault, Restarts, exit_code, told
from nemotron_h.report.incidents import processes, table
from nemotron_h.training import sections

IN_RANKS = Path(__file__).with_name("in_ranks")
FAULTS = [
    {"start": 0, "rank": 1, "step": 6, "kind": "kill"},
    {"start": 1, "rank": 0, "step": 5, "kind": "slow"},
    {"start": 1, "rank": 1, "step": 10, "kind": "stop"},
    {"start": 2, "rank": 0, "step": 11, "kind": "bug"},
]


@pytest.mark.slow
def test_a_killed_a_stopped_and_a_failing_rank_leave_the_run_of_an_undisturbed_one(small: Small) -> None:
    """By the command, on two ranks: a start for each fault, and one that ends the run."""
    small.train("undisturbed", "trainer.devices=2", ranks=2)
    env = {"PYTHONPATH": str(IN_RANKS), "RANK_FAULTS": json.dumps(FAULTS), "OMP_NUM_THREADS": "1"}
    here = {"kind": "local", "restarts": 3, "hang_after": 10, "env": env}
    cluster = small.folder / "restarting.yaml"
    cluster.write_text(yaml.safe_dump(here))
    factory = f"nemotron_h_recipe(path={small.recipe('restarted')})"
    command = ("llm", "pretrain", "--factory", factory, "--yes", f"executor={cluster}")
    values = ("parallel.devices=2", "log.every_steps=1")
    code = FORKS.run("nemotron_h.launch.command", *command, *values, folder=small.folder, name="restarted")
    said = (small.folder / "restarted.out").read_text()
    assert code == 0, said[-3000:] + (small.folder / "restarted.err").read_text()[-3000:]
    assert small.same_tensors("undisturbed", "restarted", 12)

    run = small.run_dir("restarted")
    ends = [process.end for process in processes(run)]
    assert [end.kind for end in ends] == ["killed", "hang", "error", "finished"]
    assert [end.first_step for end in ends] == [0, 4, 8, 8]
    noted, _ = read_incidents(run / INCIDENTS)
    restarts = [incident for incident in noted if incident.kind == RESTARTED]
    assert [re.sub(r"\d+ s\b", "N s", incident.message) for incident in restarts] == [
        "restart 1 of 3, from step 4: rank 1 was ended by SIGKILL",
        "restart 2 of 3, from step 8: rank 1 is stopped (SIGSTOP): step takes N s, its limit is N s",
        "restart 3 of 3, from step 8: RuntimeError: stand-in for a bug in a step",
    ]
    assert all(incident.message in said for incident in restarts)
    back = [incident.details["seconds"] for incident in noted if incident.kind == RECOVERED]
    assert len(back) == 3
    assert back[1] > 10, "the time in which nobody knew of the hang counts"
    stacks = (run / restarts[1].file).read_text()
    first, second = stacks.split("rank 1\n")
    assert "torch/distributed/distributed_c10d.py" in first, "where the others waited"
    assert "sitecustomize.py" in second
    assert "on_train_batch_start" in second, "where it was stopped, a little after the call"
    limits = json.loads((run / sections.LIMITS).read_text())
    assert limits["step"]["longest"] < 10, "the hang was no measure of a step"
    assert limits["step"]["limit"] == pytest.approx(max(10, 5 * limits["step"]["longest"]), rel=1e-6)
    assert limits["setup"]["limit"] == pytest.approx(5 * limits["setup"]["longest"], rel=1e-6)
    times = json.loads((run / "rank_times.json").read_text())
    assert (times["step"], len(times["seconds"])) == (12, 2)
    assert {"recovered", "straggler"} <= {row[2] for row in table(processes(run))}
    slow = [i for i in noted if i.kind == STRAGGLER and i.began == restarts[1].began and i.details["rank"] == 0]
    assert re.match(r"rank 0 takes .* times the median since step [67]$", slow[0].message)


def _launch(run: Path, kind: str, *, restarts: int = 3) -> subprocess.Popen:
    """Start a light rank by the launcher."""
    values = {"run": run, "restarts": restarts, "hang-after": 60, "nodes": 1, "devices": 1}
    arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "nemotron_h.launch.restarts", *arguments, "-m", "light_rank", kind],
        env={**os.environ, "PYTHONPATH": str(IN_RANKS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("mistake", 2, ""),
        ("killed", 137, "2 restarts in a row came to no newer checkpoint than that of the first step"),
    ],
)
def test_what_the_next_start_would_meet_again_ends_the_run(tmp_path: Path, kind: str, code: int, words: str) -> None:
    launched = _launch(tmp_path, kind, restarts=9)
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == code, said
    assert words in said
    assert said.count("rank 0 was ended by SIGKILL") == (3 if words else 0)
    noted, _ = read_incidents(tmp_path / INCIDENTS)
    assert [i.kind for i in noted if i.kind in (RESTARTED, GAVE_UP)] == ([RESTARTED] * 2 + [GAVE_UP]) * bool(words)


@pytest.mark.slow
def test_a_run_that_is_told_to_leave_is_not_started_again(tmp_path: Path) -> None:
    """Slurm's signal goes to all processes of a job, ctrl-c to those of the terminal: monitors, too."""
    launched = _launch(tmp_path, "waiting")
    assert launched.stdout.readline() == "waiting\n"
    os.killpg(launched.pid, signal.SIGUSR1)
    said, _ = launched.communicate(timeout=60)
    assert launched.returncode == 75, said


def test_a_run_is_given_up_without_progress_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_SLACK_S", 0.0)  # starts take seconds

    def checkpoint(step: int) -> None:
        folder = tmp_path / f"checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        for name in ("integrity.json", "run.json"):
            (folder / name).write_text("{}")

    def fail(restarts: Restarts) -> str | None:
        return restarts.next([Fault(1, -signal.SIGKILL, time.time())], {})

    restarts = Restarts(tmp_path, 6)
    assert fail(restarts) == "restart 1 of 6, from the first step: rank 1 was ended by SIGKILL"
    assert "restart 2 of 6, from the first step" in fail(restarts)
    checkpoint(4)
    assert "restart 3 of 6, from step 4" in fail(restarts), "the second restart got further"
    assert "restart 4 of 6" in fail(restarts)
    assert fail(restarts) is None
    noted, _ = read_incidents(tmp_path / INCIDENTS)
    assert noted[-1].kind == GAVE_UP
    assert "2 restarts in a row came to no newer checkpoint than that of step 4" in noted[-1].message

    used = Restarts(tmp_path, 1)
    assert fail(used)
    checkpoint(8)
    assert fail(used) is None
    noted, _ = read_incidents(tmp_path / INCIDENTS)
    assert "1 restart (executor.restarts) are used up" in noted[-1].message


def test_a_fault_that_another_node_has_noted_counts_once(tmp_path: Path) -> None:
    nodes = [Restarts(tmp_path, 3), Restarts(tmp_path, 3)]
    for node, restarts in enumerate(nodes):
        assert "restart 1 of 3" in restarts.next([Fault(node, -signal.SIGKILL, time.time())], {})
    noted, _ = read_incidents(tmp_path / INCIDENTS)
    assert [incident.kind for incident in noted] == ["killed", RESTARTED]


def test_the_cause_that_a_rank_has_noted_is_that_of_the_restart(tmp_path: Path) -> None:
    restarts, now = Restarts(tmp_path, 3), time.time()
    Incident(STARTED, now, now).append(tmp_path / INCIDENTS)
    Incident("lost rank", now, now, message="Connection closed by peer").append(tmp_path / INCIDENTS)
    said = restarts.next([Fault(1, -9, now)], {1: "Current thread"}, "stacks/x.txt")
    assert "rank 1 was ended by SIGKILL" in said, "a rank that lost it knew less"
    (process,) = processes(tmp_path)
    assert (process.end.kind, process.notes[0].file) == ("killed", "stacks/x.txt")

    later = time.time() + 1
    restarts.started = later
    Incident(STARTED, later, later).append(tmp_path / INCIDENTS)
    Incident("error", later, later, message="a bug", error="ValueError", rank=1).append(tmp_path / INCIDENTS)
    assert restarts.next([Fault(0, 1, later), Fault(1, 1, later)], {}).endswith(": rank 1: ValueError: a bug")


def test_the_rank_that_others_wait_for_is_named() -> None:
    hang = {"section": "step", "seconds": 61.0, "limit": 60.0, "reason": ""}
    ranks = [Fault(rank, None, 0.0, hang) for rank in range(3)]
    waiting = 'Current thread 0x1 (most recent call first):\n  File "x/torch/distributed/distributed_c10d.py", line 1'
    busy = 'Current thread 0x1 (most recent call first):\n  File "x/data.py", line 1 in read'
    assert told(ranks, {0: waiting, 1: busy, 2: waiting}) == "rank 1 hangs: step takes 61 s, its limit is 60 s"
    assert told(ranks, {0: waiting, 1: waiting, 2: waiting}).startswith("ranks 0, 1, 2 hang: step takes more than")
    ill = Fault(3, None, 0.0, hang | {"reason": "its GPU is not healthy"})
    assert (told([*ranks, ill], {}), ill.kind) == ("rank 3: its GPU is not healthy", "gpu")


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([-9, 1], 1), ([-9, -9], 137), ([1, 2], 2), ([75, -15], 75), ([], 0)],
)
def test_the_exit_code_is_that_of_the_rank_that_knew_why(codes: list[int], code: int) -> None:
    assert exit_code(codes) == code


def test_limits_follow_what_was_measured_and_never_fall_below_the_least(tmp_path: Path) -> None:
    set_up = sections.limits({"step": 0.2, "checkpointing": 100.0}, least=60)
    assert (set_up["step"], set_up["checkpointing"], set_up["validation"]) == (60, 500, 1800)
    assert sections.read_longest(tmp_path) == {}
    (tmp_path / sections.LIMITS).write_text('{"step": {"longest": 0.5, "limit": 60}}')
    assert sections.read_longest(tmp_path) == {"step": 0.5}
    (tmp_path / sections.LIMITS).write_text('{"step": 0.5}')
    with pytest.raises(Exception, match="does not hold the limits"):
        sections.read_longest(tmp_path)


def test_a_rank_is_slow_after_several_comparisons_and_until_it_is_not() -> None:
    from nemotron_h.training.callbacks.stragglers import SLOW, TIMES, Ranks  # loads NeMo

    ranks, slow, even = Ranks(), [1.0, 1.0, 1.0, 2 * SLOW], [1.0, 1.1, 0.9, 1.0]
    said = [ranks.compare(slow, first) for first in range(1, 1 + 10 * TIMES, 10)]
    assert [bool(words) for words in said] == [False] * (TIMES - 1) + [True]
    assert said[-1] == [(3, "takes 3 s a step, 3 times the median")]
    assert ranks.slow[3].since == 1
    assert ranks.compare(slow, 31) == [], "once"
    assert ranks.compare(even, 41) == [(3, "is no slower than the others any more")]
    ranks.compare(slow, 51)
    assert ranks.compare(even, 61) == [], "a single slow comparison is nothing"
