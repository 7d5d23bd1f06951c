"""Jobs of Slurm as its queue and their files tell of them. Imports no NeMo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.launch import jobs
from nemotron_h.launch.jobs import Job, QueueError, Watch


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Have `squeue` print a text, or fail with it."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(jobs, "ASK_S", 0)

    def says(text: str, code: int = 0) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat <<'X' {'>&2' if code else ''}\n{text}\nX\nexit {code}\n")
        (tmp_path / "squeue").chmod(0o755)

    return says


@pytest.mark.parametrize(
    ("printed", "code", "state"),
    [
        ("RUNNING (None)", 0, "RUNNING"),
        ("PENDING (Resources)", 0, "PENDING (Resources)"),
        ("PENDING (JobArrayTaskLimit)\nRUNNING (None)", 0, "RUNNING"),  # a chain
        ("", 0, ""),
        ("slurm_load_jobs error: Invalid job id specified", 1, ""),
    ],
)
def test_where_a_job_stands(squeue, printed: str, code: int, state: str) -> None:
    squeue(printed, code)
    assert Job("7", "/nowhere").state() == state


def test_a_controller_that_does_not_answer_is_waited_for(squeue, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    watch = Watch(Job("7", "/nowhere"), said.append)
    squeue("Unable to contact slurm controller", 1)
    with pytest.raises(QueueError, match="Unable to contact"):
        watch.job.state()
    assert not any(watch.over() for _ in range(3))
    squeue("RUNNING (None)")
    assert not any(watch.over() for _ in range(3))
    assert said == ["job 7: RUNNING"], "said once"
    monkeypatch.setattr(jobs, "SILENT", 2)
    squeue("Unable to contact slurm controller", 1)
    assert not any(watch.over() for _ in range(2))
    with pytest.raises(UserError, match="Slurm does not answer: Unable to contact") as raised:
        watch.over()
    assert "job 7 goes on" in raised.value.hint
    squeue("")
    assert Watch(watch.job, said.append).over()


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="squeue is not on this machine"):
        Job("7", "/nowhere").state()


def test_the_newest_output_and_the_last_exit_code(tmp_path: Path) -> None:
    job = Job("7", str(tmp_path))
    assert (job.log(), job.exit_code()) == (None, None)
    assert Job.of_line(f"Launching\n{job.line()}\n") == job
    assert Job.of_line("Launching") is None
    for time, (name, text) in enumerate(
        {
            "sbatch_a_7_1.out": "+ echo 'job exited with code 75'\njob exited with code 75\n",
            "log-a_8_0.out": "step",
            "sbatch_a_7_2.out": "job exited with code 2\n",
        }.items()
    ):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (time, time))
        if not time:
            assert (job.log(), job.exit_code()) == (tmp_path / name, 75)
    assert (job.log(), job.exit_code()) == (tmp_path / "log-a_8_0.out", 2)
    (tmp_path / "sbatch_a_7_3.out").write_text("slurmstepd: error: *** JOB 9 CANCELLED DUE TO TIME LIMIT ***\n")
    assert job.exit_code() is None, "of the last job, which was killed"
