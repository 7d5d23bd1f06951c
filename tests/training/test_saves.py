"""A checkpoint is written while training goes on, and is that of its step, whole or not there, whatever happens."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_run import Small, assert_same

from nemotron_h.checkpoint import folders
from nemotron_h.core.progress import STEPS, read_steps

#: seconds for a megabyte: a checkpoint takes several steps
SLOW = "slow=0.3"
pytestmark = pytest.mark.slow


def checkpoint(small: Small, name: str, step: int) -> Path:
    return small.run_dir(name) / "checkpoints" / f"step-{step:06d}"


def test_training_goes_on_and_what_is_written_is_of_the_save_s_step(small: Small, straight: dict[int, dict]) -> None:
    said = small.train("slow", SLOW).stdout
    folder = checkpoint(small, "slow", 8)
    written = (folder / folders.INTEGRITY).stat().st_mtime
    after = [step.step for step in read_steps(small.run_dir("slow") / STEPS)[0] if step.step > 8]
    beside = [s.step for s in read_steps(small.run_dir("slow") / STEPS)[0] if s.step > 8 and s.time < written]
    assert set(after) == {9, 10, 11, 12}
    assert len(set(beside)) >= 2, "steps that were done while it was written"
    assert json.loads((folder / folders.RECORD).read_text())["step"] == 8
    assert_same(small, "slow", "straight")
    for step in (8, 12):
        assert small.same_tensors("slow", "straight", step)
        described = folders.describe(checkpoint(small, "slow", step), folders.content(checkpoint(small, "slow", step)))
        assert json.loads((checkpoint(small, "slow", step) / folders.INTEGRITY).read_text()) == described
    shards = [set(folders.read_integrity(checkpoint(small, "slow", step)).items()) for step in (8, 12)]
    assert not any(name.endswith(".distcp") for name, _ in shards[0] & shards[1]), "two saves have the same tensors"
    lines = re.findall(r"checkpoint step (\d+): \d\.\d MiB, training waited \d+\.\d s, written in (\d+\.\d) s", said)
    assert [step for step, _ in lines] == ["4", "8", "12"]
    assert all(float(seconds) > 0.6 for _, seconds in lines)
    assert re.search(r"step-000008 waited \d\.\d s for step-000004 to be written", said)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000008", "step-000012"], "4 is gone, with its mark"


def test_each_of_many_saves_of_a_process_is_of_its_step(small: Small, straight: dict[int, dict]) -> None:
    """Write new tensors, though the structure of the first saves is kept for later ones."""
    small.train("often", "log.ckpt.every_steps=1", "log.ckpt.keep=-1")
    written = [folders.read_integrity(checkpoint(small, "often", step)) for step in range(1, 13)]
    shards = [entry for each in written for name, entry in each.items() if name.endswith(".distcp")]
    assert len(set(shards)) == len(shards) == 12
    for step in (8, 12):
        assert small.same_tensors("often", "straight", step)


def test_an_error_of_a_thread_is_one_error_on_all_ranks(small: Small) -> None:
    done = small.train("thread_full", "trainer.devices=2", "write=8:1:ENOSPC", SLOW, ranks=2, check=False)
    assert done.returncode == 2
    folder = checkpoint(small, "thread_full", 8)
    file = folder / folders.WEIGHTS / "__1_0.distcp"
    said = f"checkpoint {folder} cannot be written: "
    assert f"{said}rank 1: Worker failure: [Errno 28] No space left on device: '{file}'" in done.stderr
    assert f"{said}the first rank says why" in done.stderr
    assert "Traceback" not in done.stderr
    assert "continues from the newest checkpoint" in done.stderr
    assert folders.finished(small.run_dir("thread_full")) == [checkpoint(small, "thread_full", 4)]
    assert folders.unfinished(small.run_dir("thread_full")) == [folder]


def test_killed_while_it_is_written_the_one_of_before_is_there(small: Small, straight: dict[int, dict]) -> None:
    killed = small.train("cut", "log.ckpt.keep=1", "write=8:0:SIGKILL", SLOW, check=False)
    assert killed.returncode < 0
    assert (checkpoint(small, "cut", 8) / folders.WEIGHTS / "__0_0.distcp").stat().st_size > 400_000
    assert max(small.steps("cut")) > 8
    assert folders.finished(small.run_dir("cut")) == [checkpoint(small, "cut", 4)]
    again = small.train("cut", "log.ckpt.keep=1").stdout
    assert f"removed {checkpoint(small, 'cut', 8)}: it was not written to its end" in again
    assert "resumed at step 4" in again
    assert small.steps("cut") == straight
    assert small.same_tensors("cut", "straight", 12)
    assert [path.name for path in checkpoint(small, "cut", 8).parent.iterdir()] == ["step-000012"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_it_is_written_leaves_with_whole_ones(small: Small, name: str) -> None:
    run = f"told_{name}"
    told = small.train(run, "trainer.devices=2", f"write=4:1:{name}", SLOW, ranks=2, check=False)
    assert told.returncode == 75, told.stderr[-2000:]
    newest, before = folders.finished(small.run_dir(run))
    assert before == checkpoint(small, run, 4)
    assert folders.step_of(newest) in range(5, 9), "of the step in which it was told"
    assert f"checkpoint written at step {folders.step_of(newest)} of 12" in told.stdout
    assert [folders.damage(each) for each in (newest, before)] == [[], []]
    assert not folders.unfinished(small.run_dir(run))


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_exception_of_all_ranks_waits_for_it(small: Small, ranks: int) -> None:
    run = f"bug_{ranks}"
    failed = small.train(run, f"trainer.devices={ranks}", "bug=9", SLOW, ranks=ranks, check=False)
    assert failed.returncode not in (0, 2, 75)
    assert "a bug of a step" in failed.stderr
    assert "checkpoint step 8: " in failed.stdout
    assert folders.finished(small.run_dir(run))[0] == checkpoint(small, run, 8)
    assert folders.damage(checkpoint(small, run, 8)) == []
    assert not folders.unfinished(small.run_dir(run))
