"""The steps that a run reports in its folder, and who follows them. Imports no NeMo."""

from __future__ import annotations

import math
from pathlib import Path

from nemotron_h.core.progress import STEPS, Step, Steps


def step(number: int, validation_loss: float = math.nan) -> Step:
    return Step(number, 80, 5.5, validation_loss, ["margin 1.2"], 12345.6, 1e-3, 61.0)


def test_steps_are_followed_through_a_kill_a_resume_and_a_fresh_start(tmp_path: Path) -> None:
    file = tmp_path / STEPS
    early = Steps(tmp_path / "later")
    assert early.new() == []
    step(1).append(file)
    steps = Steps(tmp_path)
    assert steps.new() == [], "of an earlier process"
    step(2).append(file)
    step(3, 6.0).append(file)
    second, third = steps.new()
    assert (second.step, math.isnan(second.validation_loss), third) == (2, True, step(3, 6.0))
    with file.open("a") as opened:
        opened.write('{"step": 4, ')
    assert steps.new() == [], "half a line may become a whole one"
    with file.open("a") as opened:
        opened.write("\n")
    step(3, 6.0).append(file)
    assert steps.new() == [step(3, 6.0)], "a resumed run repeats a step"
    file.unlink()
    step(1, 7.0).append(file)
    assert steps.new() == [step(1, 7.0)], "the run was begun anew"
    (tmp_path / "later").mkdir()
    step(1, 7.0).append(tmp_path / "later" / STEPS)
    assert early.new() == [step(1, 7.0)]


def test_a_step_on_one_line() -> None:
    line = "step  7/80  loss 5.5000  validation    -    " + "   12,346 tokens/s  margin 1.2  lr 1.00e-03  ETA 0:01:01"
    assert step(7).line() == line
    assert "validation 6.0000" in step(7, 6.0).losses()
