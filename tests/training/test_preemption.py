"""A run that is told to leave writes a checkpoint on all ranks at one step, and the next start loses nothing."""

from __future__ import annotations

import pytest
from small_run import Small

from nemotron_h.training import checkpoints

STEPS = 12


@pytest.mark.slow
def test_told_to_leave_and_started_again_equals_straight(small: Small, straight: dict[int, dict]) -> None:
    told = small.train("told", "signal=5:0:SIGTERM", check=False)
    assert told.returncode == 75, told.stderr[-2000:]
    assert "SIGTERM: checkpoint written at step 5 of 12" in told.stdout
    newest = checkpoints.finished(small.run_dir("told"))[0]
    assert newest.name == "step-000005"
    assert checkpoints.damage(newest) == []
    again = small.train("told")
    assert "resumed at step 5" in again.stdout
    assert small.steps("told") == straight


@pytest.mark.slow
def test_a_signal_to_one_rank_makes_all_leave_at_that_step(small: Small) -> None:
    told = small.train("one_of_two", "trainer.devices=2", "signal=3:1:SIGUSR1", ranks=2, check=False)
    assert told.returncode != 0
    assert "a signal to another rank: checkpoint written at step 3 of 12" in told.stdout, told.stderr[-2000:]
    newest = checkpoints.finished(small.run_dir("one_of_two"))[0]
    assert newest.name == "step-000003"
    assert checkpoints.damage(newest) == []
