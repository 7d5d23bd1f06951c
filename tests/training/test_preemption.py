"""A run that is told to leave writes a checkpoint on all ranks at one step, and the next start loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import Small

from nemotron_h.checkpoint import folders
from nemotron_h.core.children import ready_loader_worker
from nemotron_h.report.incidents import processes
from nemotron_h.report.run import REPORT

STEPS = 12


@pytest.mark.slow
def test_told_to_leave_and_started_again_equals_straight(small: Small, straight: dict[int, dict]) -> None:
    told = small.train("told", "signal=6:0:SIGTERM", "data.workers=2", "report=drawn", check=False)
    assert told.returncode == 75, told.stderr[-2000:]
    assert "SIGTERM: checkpoint written at step 6 of 12" in told.stdout
    newest = folders.finished(small.run_dir("told"))[0]
    assert newest.name == "step-000006"
    assert folders.damage(newest) == []
    page = (small.run_dir("told") / REPORT).read_text()
    assert "stopped at step 6 of\n12" in page
    assert "<p>SIGTERM</p>" in page
    assert "To go on from the newest checkpoint:" in page
    (process,) = processes(small.run_dir("told"))
    assert (process.end.kind, process.end.message) == ("preemption", "SIGTERM")
    assert (process.end.step, process.end.checkpoint) == (6, 6)
    assert ">preemption</td>" in page
    again = small.train("told")
    assert "resumed at step 6" in again.stdout
    for step, record in small.steps("told").items():
        assert {**record, "samples": None} == {**straight[step], "samples": None}  # read elsewhere


@pytest.mark.slow
def test_ctrl_c_to_one_rank_during_a_save_makes_all_leave_with_that_checkpoint(small: Small) -> None:
    told = small.train("one_of_two", "trainer.devices=2", "save=4:1:SIGINT", ranks=2, check=False)
    assert told.returncode == 75, told.stderr[-2000:]
    newest = folders.finished(small.run_dir("one_of_two"))[0]
    assert "a signal to another rank: checkpoint written at step 4 of 12" in told.stdout
    assert f"the same command continues from {newest}" in told.stdout
    assert newest.name == "step-000004"
    assert folders.damage(newest) == []


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_by_name(small: Small) -> None:
    waits = "trainer.strategy.collective_timeout='00:00:15'"
    stopped = small.train("stopped", "trainer.devices=2", waits, "signal=6:1:SIGSTOP", ranks=2, check=False)
    assert stopped.returncode == 1
    assert "no answer from rank 1 of 2: stopped, killed, hanging" in stopped.stderr
    (process,) = processes(small.run_dir("stopped"))
    assert (process.end.kind, process.end.message, process.end.step) == ("hang", "no answer from ranks [1]", 5)
    assert process.end.details["waited_in"], "where rank 0 was"
    assert folders.finished(small.run_dir("stopped"))[0].name == "step-000004"


def test_a_second_ctrl_c_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemotron_h.training.callbacks import preemption

    trainer = SimpleNamespace(
        is_global_zero=True,
        received_sigterm=False,
        global_step=3,
        checkpoint_callback=SimpleNamespace(dirpath=tmp_path / "checkpoints"),
    )
    callback = preemption.Preemption()
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        callback.on_fit_start(trainer, None)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the first one on
        assert callback.reason == "ctrl-c"
        callback.interrupted -= 60
        with pytest.raises(KeyboardInterrupt) as raised:
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    callback.on_exception(trainer, None, raised.value)
    said = capsys.readouterr().out
    assert "ctrl-c: finishing the step and writing a checkpoint; again to end the run at once" in said
    assert "ctrl-c: ended after step 3; before its first checkpoint" in said
    read, write = os.pipe()
    os.close(read)  # of `nemo ... | tee log`, which ctrl-c ends
    with contextlib.suppress(BrokenPipeError), open(write, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        preemption.outlive_pipes()
        preemption.outlive_pipes()
        print("step 4", flush=True)
        sys.stdout.write("step 5")


def test_a_report_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemotron_h.report import page
    from nemotron_h.training.callbacks.run_report import RunReport

    (tmp_path / "run.json").write_text("{}")
    callbacks = SimpleNamespace(dirpath=tmp_path / "checkpoints")
    trainer = SimpleNamespace(is_global_zero=True, checkpoint_callback=callbacks, callbacks=[])
    reports = [RunReport() for _ in range(4)]
    reports[0].on_exception(trainer, None, ValueError("before the first step"))
    for report in reports[1:]:
        report.on_train_start(trainer, None)
    reports[1].on_exception(trainer, None, KeyboardInterrupt())
    assert capsys.readouterr().err == "", "neither has anything to draw"
    reports[2].on_fit_end(trainer, None)
    said = capsys.readouterr().err
    assert "warning: no report was drawn:" in said
    assert f"to draw it: nemotron-h report {tmp_path}" in said
    reports[2].on_exception(trainer, None, SystemExit(75))
    assert capsys.readouterr().err == "", "once"
    monkeypatch.setattr(page, "write", lambda folder: 1 / 0)
    reports[3].on_exception(trainer, None, SystemExit(75))
    assert "no report was drawn: ZeroDivisionError" in capsys.readouterr().err


def fork(ready: int) -> int:
    """A process that is ready as a data loader and never ends by itself."""
    child = os.fork()
    if not child:
        ready_loader_worker(0)
        os.write(ready, b".")
        while True:
            time.sleep(60)
    return child


def test_a_data_loader_ends_when_its_parent_says_so_or_dies() -> None:
    read, write = os.pipe()
    middle = os.fork()
    if not middle:  # a run that is killed
        child = fork(write)
        os.write(write, f"{child:10}".encode())
        time.sleep(60)
    sent = b""
    while len(sent) < 11:
        sent += os.read(read, 11)
    orphan = int(sent.replace(b".", b""))
    child = fork(write)
    os.read(read, 1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):  # from a stranger
        for pid in (orphan, child):
            subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)
    time.sleep(0.1)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(orphan, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    end = time.monotonic() + 10
    while Path(f"/proc/{orphan}/stat").exists() and " Z " not in Path(f"/proc/{orphan}/stat").read_text():
        assert time.monotonic() < end, "it outlives its parent"
        time.sleep(0.05)
