"""A run's incidents: what they say of its processes, its time, and the end of one that could not tell it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.checkpoint import folders
from nemotron_h.cli.main import app
from nemotron_h.core import incidents, locks
from nemotron_h.core.errors import UserError
from nemotron_h.core.incidents import INCIDENTS, Incident, read_incidents
from nemotron_h.core.progress import RANK_TIMES, STEPS, Step
from nemotron_h.report.incidents import close_killed, processes, summary
from nemotron_h.report.ranks import read_ranks, words


def start(folder: Path, began: float) -> None:
    Incident(incidents.STARTED, began, began).append(folder / INCIDENTS)


def end(folder: Path, began: float, kind: str, after: float, steps: tuple[int, int], **values: object) -> None:
    seconds = {"setup": 10.0, "training": 5.0 * (steps[1] - steps[0]), "validation": 1.0, "saving": 2.0}
    incident = Incident(kind, began + after, began, steps[1], first_step=steps[0], seconds=seconds, **values)
    incident.append(folder / INCIDENTS)


def report(folder: Path, step: int, began: float, training: float) -> None:
    metrics = {"training_seconds": training, "max_resident_gib": 1.0 + step}
    Step(step, 20, 5.0, math.nan, [], 1.0, 1e-3, 1.0, None, metrics, began + training, began).append(folder / STEPS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three processes: killed at step 9, told to leave at step 16, finished; each from the checkpoint before."""
    checkpoint = tmp_path / "checkpoints/step-000006"
    checkpoint.mkdir(parents=True)
    (checkpoint / folders.INTEGRITY).write_text("{}")
    (checkpoint / folders.RECORD).write_text("{}")
    os.utime(checkpoint / folders.RECORD, (1045.0, 1045.0))
    start(tmp_path, 1000.0)
    for step in range(1, 10):
        report(tmp_path, step, 1012.0, 5.0 * step)
    close_killed(tmp_path)
    start(tmp_path, 1100.0)
    end(tmp_path, 1100.0, incidents.PREEMPTION, 70.0, (6, 16), message="SIGTERM", checkpoint=16)
    start(tmp_path, 1200.0)
    for number, kind in enumerate(incidents.EVENTS):
        Incident(kind, 1215.0 + number, 1200.0, 17 + number, "loss 9, 2 +- 0.1").append(tmp_path / INCIDENTS)
    end(tmp_path, 1200.0, incidents.FINISHED, 40.0, (16, 20), checkpoint=20)
    return tmp_path


def test_goodput_counts_no_step_twice(run: Path) -> None:
    ran = processes(run)
    killed = ran[0].end
    assert (killed.kind, killed.step, killed.first_step, killed.checkpoint) == ("killed", 9, 0, 6)
    assert killed.time == 1012 + 45
    assert killed.lost_seconds == 12, "from the checkpoint at 1045 to the last step seen"
    assert killed.seconds == {"setup": 12.0, "training": 45.0}
    assert killed.details["memory_gib"] == [2.0, 10.0]
    total = summary(ran)
    assert total.wall == 1240 - 1000
    assert total.seconds["training"] == 5.0 * 20
    assert total.seconds["redone"] == pytest.approx(5.0 * 3)
    assert total.seconds["between"] == (1100 - 1057) + (1200 - 1170)
    assert sum(total.seconds.values()) == pytest.approx(total.wall)
    assert total.goodput == pytest.approx(100 / 240)
    assert (total.failures, total.restarts, total.seconds_between_failures) == (1, 2, 57 + 70 + 40)


def test_time_after_the_end_of_a_run_is_none_of_its(run: Path) -> None:
    start(run, 9000.0)
    end(run, 9000.0, incidents.FINISHED, 30.0, (20, 22))
    assert summary(processes(run)).wall == 240 + 30


def test_a_process_without_an_end_was_killed_unless_it_trains(run: Path) -> None:
    before = (run / INCIDENTS).read_text()
    start(run, 5000.0)
    report(run, 21, 5010.0, 5.0)
    with locks.locked(run, "trained", ""):
        assert processes(run)[-1].end.kind == "running"
    assert processes(run)[-1].end.kind == "killed"
    assert processes(run)[-1].end.step == 21
    assert len((run / INCIDENTS).read_text()) > len(before), "and nothing but its start was written"
    close_killed(run, "ended with exit code -9")
    close_killed(run, "once")
    lines, _ = read_incidents(run / INCIDENTS)
    assert [(line.kind, line.message) for line in lines[-2:]] == [
        ("started", ""),
        ("killed", "ended with exit code -9"),
    ]


def test_half_a_line_is_left_out_and_ended(run: Path) -> None:
    with (run / INCIDENTS).open("a") as opened:
        opened.write('{"kind": "sta')
    start(run, 5000.0)
    with (run / INCIDENTS).open("a") as opened:
        for wrong in (
            '"time": "x", "began": 1',
            '"time": 1, "began": 1, "x": 2',
            '"time": 1, "began": 1, "seconds": 3',
        ):
            opened.write(f'{{"kind": "started", {wrong}}}\n')
        opened.write("[]\n")
    lines, unreadable = read_incidents(run / INCIDENTS)
    assert len(unreadable) == 5
    assert lines[-1].began == 5000.0
    assert read_incidents(run / "none") == ([], [])


def test_the_command_shows_a_table_or_json(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shown = CliRunner().invoke(app, ["incidents", str(run)], env={"COLUMNS": "250"})
    assert shown.exit_code == 0, shown.output
    rows = [line.split()[2:4] for line in shown.output.splitlines()[1:7]]
    events = [["17", "spike"], ["18", "skipped"], ["19", "transient"]]
    assert rows == [["9", "killed"], ["16", "preemption"], *events, ["20", "finished"]]
    assert "events  1 spike, 1 skipped, 1 transient" in shown.output
    assert "SIGTERM" in shown.output
    assert "goodput  41.7% of 240 s was training of steps that count" in shown.output
    assert "failures  1, one in 167 s" in shown.output
    told = json.loads(CliRunner().invoke(app, ["incidents", str(run), "--json"]).output)
    assert told["goodput"] == pytest.approx(100 / 240)
    assert [process["end"]["kind"] for process in told["processes"]] == ["killed", "preemption", "finished"]
    assert [event["step"] for process in told["processes"] for event in process["events"]] == [17, 18, 19]
    empty = tmp_path_factory.mktemp("empty")
    assert processes(empty) == []
    refused = CliRunner().invoke(app, ["incidents", str(empty)])
    assert isinstance(refused.exception, UserError)
    assert f"{empty / INCIDENTS} has no incidents" in refused.exception.message


def test_restarts_and_the_slowest_rank_are_shown(run: Path) -> None:
    note = Incident(incidents.RESTARTED, 1090.0, 1000.0, 6, "restart 1 of 3, from step 6: a bug", file="stacks/1.txt")
    note.append(run / INCIDENTS)
    content = {"step": 20, "seconds": [1.0, 1.1, 2.0, 0.9], "slow_since_step": {"2": 7}}
    (run / RANK_TIMES).write_text(json.dumps(content))
    shown = CliRunner().invoke(app, ["incidents", str(run)], terminal_width=200).output
    assert "restarted" in shown
    assert "[stacks/1.txt]" in " ".join(shown.split())
    assert "the slowest of 4 is rank 2: 2 s a step, 2.00 times the median; slower than the others since step 7" in shown
    printed = json.loads(CliRunner().invoke(app, ["incidents", str(run), "--json"]).output)
    assert printed["processes"][0]["notes"][0]["kind"] == "restarted"
    (run / RANK_TIMES).write_text('{"seconds": [1.0]}')
    with pytest.raises(UserError, match="does not hold the times of a run's ranks"):
        read_ranks(run)
    (run / RANK_TIMES).write_text(json.dumps(content | {"slow_since_step": {}}))
    assert words(read_ranks(run)).endswith("2.00 times the median")


def test_the_command_imports_no_torch(run: Path) -> None:
    code = "import sys; from nemotron_h.cli.main import app; app(standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "incidents", str(run)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
