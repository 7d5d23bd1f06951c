"""Straight = killed and resumed, bit for bit; a checkpoint of one layout continues in another; damage is reported."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_run import Small, assert_same, drawn, events, run_records, without_last

from nemotron_h.checkpoint import folders
from nemotron_h.core import progress
from nemotron_h.report.incidents import processes
from nemotron_h.report.run import read_run

STEPS = 12
pytestmark = pytest.mark.slow


def spike_window(run: Path) -> dict[str, list[float]]:
    """What the last checkpoint has of the callback that tells spikes."""
    common = torch.load(folders.finished(run)[0] / "weights/common.pt", weights_only=False)
    return common["callbacks"]["Incidents"]


def test_straight_equals_killed_and_resumed(small: Small, straight: dict[int, dict]) -> None:
    killed = small.train("resumed", "kill=6", check=False)
    assert killed.returncode < 0
    assert max(small.steps("resumed")) == 6
    again = small.train("resumed", "kill=9", check=False)
    assert "resumed at step 4" in again.stdout
    assert "changed from" not in again.stdout
    out = small.train("resumed")
    assert "resumed at step 8" in out.stdout
    assert_same(small, "resumed", "straight")
    lines = (small.run_dir("resumed") / progress.STEPS).read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]  # a step is repeated with its validation
    assert steps == [*range(1, 6), 5, 6, 6, 7, 8, *range(9, 13), 12], "of three processes"
    run = read_run(small.run_dir("resumed"))
    assert (run.state, run.starts, list(run.validation)) == (("finished", ""), [0, 4, 8], [0, 6, 12])
    assert [step.loss for step in run.steps] == [float.fromhex(straight[s]["loss"]) for s in range(1, STEPS + 1)]
    norms = [float.fromhex(straight[s]["grad_norm"]) for s in range(1, STEPS + 1)]
    assert run.values("grad_norm").tolist() == norms
    assert [(phase.name, phase.first, phase.end) for phase in run.phases] == [("first", 0, 6), ("second", 6, 12)]
    first, second, third = processes(run.folder)
    assert [(p.end.kind, p.end.first_step, p.end.step) for p in (first, second)] == [("killed", 0, 5), ("killed", 4, 8)]
    assert (third.end.kind, third.end.first_step, third.end.step) == ("finished", 8, 12)
    assert "last seen at step" in first.end.message
    assert first.end.lost_seconds < first.wall
    noted = [spike_window(small.run_dir(name)) for name in ("straight", "resumed")]
    assert noted[0] == noted[1], "so a resumed run tells the spikes of an unbroken one"
    assert noted[0]["loss"] == [float.fromhex(straight[s]["loss"]) for s in range(1, STEPS + 1)]
    assert "in 3 processes" in drawn(run.folder)
    # the steps that validations follow, counted from 0
    assert list(events(small.run_dir("straight"))["val_loss"]) == [5, 11]
    losses = [float.fromhex(straight[s]["loss"]) for s in range(1, STEPS + 1)]
    assert losses[-1] < losses[0] - 0.3
    assert sorted(i for s in straight.values() for i in s["samples"]) == list(range(STEPS * 8))
    assert small.same_tensors("straight", "resumed", STEPS)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True")),
        (2, ("trainer.strategy.pipeline_model_parallel_size=2",)),
        (2, ("model.config.recompute_ffn=layer", "model.config.recompute_offload=True")),
        (2, ("trainer.strategy.context_parallel_size=2",)),
    ],
    ids=["tensor and sequence", "pipeline", "data, offloaded", "context"],
)
def test_a_checkpoint_continues_in_another_layout_and_there_exactly(
    small: Small, straight: dict[int, dict], ranks: int, options: tuple[str, ...]
) -> None:
    name = "layout" + "".join(c for c in "".join(options) if c.isalpha())
    settings = (*options, f"trainer.devices={ranks}", "log.ckpt.every_steps=2")
    for run in (name, f"{name}_killed"):
        without_last(small, "straight", run)
    small.train(name, *settings, ranks=ranks)
    continued = small.steps(name)
    # in that layout, a run of which all ranks were killed at step 11 is the run that was not
    small.train(f"{name}_killed", *settings, "kill=11", ranks=ranks, check=False)
    assert "resumed at step 10" in small.train(f"{name}_killed", *settings, ranks=ranks).stdout
    assert small.steps(f"{name}_killed") == continued
    assert run_records(small.run_dir(f"{name}_killed")) == run_records(small.run_dir(name))
    assert small.same_tensors(name, f"{name}_killed", STEPS)
    assert sorted(continued) == list(range(9, STEPS + 1))
    for step, record in continued.items():
        for key, tolerance in (("loss", 2e-2), ("grad_norm", 6e-2), ("lr", 1e-9)):  # bf16
            expected = float.fromhex(straight[step][key])
            assert float.fromhex(record[key]) == pytest.approx(expected, rel=tolerance), (step, key)


CHANGED = {"peak_lr": 5e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.3}


def test_changed_settings_hold_from_the_next_step_on_and_are_recorded(small: Small, straight: dict[int, dict]) -> None:
    """Set on the command line or in the recipe, in a run that is made longer too: the same steps come out."""
    recipe = small.variant(
        "changed_in_recipe",
        ("tokens: 6144 # 12 steps", "tokens: 8192"),
        ("peak_lr: 1e-2,", ", ".join(f"{key}: {value}" for key, value in CHANGED.items()) + ","),
        ("warmup_tokens: 1024", "warmup_tokens: 512"),
    )
    options = [f"optim.{key}={value}" for key, value in CHANGED.items()]
    options += ["optim.warmup_steps=1", "trainer.max_steps=16"]
    for name in ("changed_in_recipe", "changed_on_the_line"):
        without_last(small, "straight", name)
    said = small.train("changed_on_the_line", *options, "kill=13", check=False).stdout
    assert "resumed at step 8" in said
    assert "changed from step 8 on (learning rate of the next step: 0.00281)" in said
    assert "  optim.peak_lr: 0.01 -> 0.005\n" in said
    assert "changed from" not in small.train("changed_on_the_line", *options).stdout
    small.train("changed_in_recipe", recipe=recipe)

    steps = small.steps("changed_on_the_line")
    assert sorted(steps) == list(range(9, 17))
    assert small.steps("changed_in_recipe") == steps
    for step, done in steps.items():
        rate = 1e-4 + (5e-3 - 1e-4) * 0.5 * (1 + math.cos(math.pi * (step - 1) / 15))
        assert float.fromhex(done["lr"]) == pytest.approx(rate, rel=1e-12)
        assert sorted(done["adam"]) == [[0.8, 0.99, 1e-6, 0.0], [0.8, 0.99, 1e-6, 0.3]]
        assert done["samples"] == list(range(8 * step - 8, 8 * step))
    before = {"peak_lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    expected = {f"optim.{key}": [before[key], CHANGED[key]] for key in CHANGED}
    expected |= {"from_step": 8, "trainer.max_steps": [12, 16], "optim.warmup_steps": [2, 1]}
    for name in ("changed_in_recipe", "changed_on_the_line"):
        written = json.loads((small.run_dir(name) / "run.json").read_text())
        assert written["changes"] == [expected]
        assert written["settings"]["optim.peak_lr"] == 5e-3
        assert "# From step 8 on: optim.peak_lr: 0.01 -> 0.005\n" in (small.run_dir(name) / "recipe.yaml").read_text()


@pytest.mark.parametrize(("decay_steps", "exponential"), [(None, False), (4, False), (4, True)])
def test_a_schedule_takes_the_step_alone_from_a_checkpoint(decay_steps: int | None, exponential: bool) -> None:
    from nemotron_h.training.optimizer import Schedule

    def at(step: int, peak: float, max_steps: int, state: dict | None = None) -> tuple[dict, list[float]]:
        """Return the state after so many steps, and the rates from the next step on."""
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak}])
        module = Schedule(2, decay_steps, 1e-4, max_steps, exponential)
        schedule = module.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
        if state is not None:
            schedule.load_state_dict(state)
        rates = []
        while schedule.last_epoch < max_steps:
            if schedule.last_epoch == step:
                state = copy.deepcopy(schedule.state_dict())
            rates += [optimizer.param_groups[0]["lr"]] * (schedule.last_epoch >= step)
            optimizer.step()
            schedule.step()
        return state, rates

    state, rates = at(7, 1e-2, 12)
    assert at(7, 1e-2, 12, state)[1] == rates
    assert at(7, 1e-3, 20, state)[1] == at(7, 1e-3, 20)[1] != rates


def test_newer_checkpoints_are_set_aside_in_this_run_alone_and_twice(tmp_path: Path) -> None:
    from nemo.utils.app_state import AppState

    from nemotron_h.training.resume import ResumeRun

    own = tmp_path / "checkpoints"
    before, AppState().log_dir = AppState().log_dir, str(tmp_path)
    try:
        for _ in range(3):
            for step in (4, 8, 12):
                (own / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
            ResumeRun._set_newer_aside(8)
    finally:
        AppState().log_dir = before
    aside = ["aside-step-000012", "aside-step-000012-2", "aside-step-000012-3"]
    assert sorted(path.name for path in own.iterdir()) == [*aside, "step-000004", "step-000008"]


def test_a_run_that_continues_from_another_leaves_it_as_it_is(small: Small, straight: dict[int, dict]) -> None:
    shutil.copytree(small.run_dir("straight"), small.run_dir("host"))
    folder = small.run_dir("host") / "checkpoints"
    chosen, before = folder / "step-000008", sorted(folder.iterdir())
    written = json.loads((chosen / folders.RECORD).read_text())
    del written["settings"]  # as a checkpoint of an older version
    (chosen / folders.RECORD).write_text(json.dumps(written))
    folders.write_integrity(chosen, folders.describe(chosen, folders.content(chosen)))
    done = small.train("guest", f"resume.resume_from_path={chosen}", "trainer.max_steps=10")
    assert "resumed at step 8" in done.stdout
    assert "does not record the settings that it was trained with" in done.stdout
    assert sorted(folder.iterdir()) == before
    assert [path.name for path in folders.finished(small.run_dir("guest"))] == ["step-000010"]


def test_two_ranks_share_the_reading_of_a_checkpoint(small: Small, straight: dict[int, dict]) -> None:
    without_last(small, "straight", "shared")
    written = small.run_dir("shared") / "checkpoints" / f"step-{STEPS:06d}"
    small.train("shared", "trainer.devices=2", ranks=2)
    described = folders.describe(written, folders.content(written))
    assert json.loads((written / folders.INTEGRITY).read_text()) == described
    assert len(described) > 4
    # a file of the second rank: the first alone would not see it
    name = next(n for n in sorted(described)[1::2] if n.endswith(".distcp"))
    content = bytearray((written / name).read_bytes())
    content[len(content) // 2] ^= 1
    (written / name).write_bytes(content)
    assert folders.damage(written, 0, 2) == []
    done = small.train("shared", "trainer.devices=2", ranks=2, check=False)
    assert done.returncode != 0
    assert f"{written.name} is damaged: {name}: its content changed" in done.stderr


def test_a_declared_change_of_the_data_takes_over_at_its_step(small: Small, straight: dict[int, dict]) -> None:
    without_last(small, "straight", "changed")
    folder = small.run_dir("changed") / "checkpoints"
    small.train("changed", "data.global_batch_size=4", "resume.blend_change=from_step")
    samples = [record["samples"] for _, record in sorted(small.steps("changed").items())]
    assert samples == [list(range(64 + 4 * n, 68 + 4 * n)) for n in range(4)]
    order = json.loads((folder / f"step-{STEPS:06d}" / folders.RECORD).read_text())["data"]["order"]
    assert (order["step"], order["consumed_samples"]) == (STEPS, 80)
    assert (order["origin"]["step"], order["plan"]["global_batch_size"]) == (8, 4)
    assert [record["plan"]["global_batch_size"] for record in order["history"]] == [8]


def test_damage_is_reported_and_an_older_one_is_taken_only_when_told(small: Small, straight: dict[int, dict]) -> None:
    shutil.copytree(small.run_dir("straight"), small.run_dir("damaged"))
    folder = small.run_dir("damaged") / "checkpoints"
    shard = next((folder / "step-000012" / "weights").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 100)
    done = small.train("damaged", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "step-000012 is damaged" in done.stderr
    assert f"resume.resume_from_path={folder / 'step-000008'}" in done.stderr
    done = small.train("damaged", f"resume.resume_from_path={folder / 'step-000008'}")
    assert "resumed at step 8" in done.stdout
    assert (folder / "aside-step-000012").is_dir()


def test_a_finished_run_ends_well_and_another_model_is_an_error(small: Small, straight: dict[int, dict]) -> None:
    done = small.train("straight")
    assert "is complete: step 12 of 12" in done.stdout
    done = small.train("straight", "model.config.ffn_hidden_size=128", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "ffn_hidden_size: 96 in the checkpoint, 128 now" in done.stderr
    done = small.train("straight", "model.config.init_seed=7", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "init_seed: 1234 in the checkpoint, 7 now" in done.stderr
    done = small.train("straight", "optim.peak_lr=5e-5", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "optim.final_lr = 0.0001 is not between 0 and optim.peak_lr = 5e-05" in done.stderr
    done = small.train("whole", "optim.distributed_optimizer=False", check=False)
    assert done.returncode == 2
    assert "parallel.distributed_optimizer = false with bfloat16 weights" in done.stderr
