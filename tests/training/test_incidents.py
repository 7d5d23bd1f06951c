"""Spikes and causes are told from what happened, and a run ends as it would have without a line of it."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemotron_h.core import incidents
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.incidents import INCIDENTS, read_incidents
from nemotron_h.core.spikes import Spikes
from nemotron_h.launch import runs
from nemotron_h.report.incidents import evidence, processes
from nemotron_h.training.attribution import cause_of
from nemotron_h.training.callbacks import incidents as callback
from nemotron_h.training.callbacks.incidents import Incidents


def test_a_spike_is_above_six_deviations_of_the_last_steps_and_hides_no_other() -> None:
    rng = random.Random(1)
    values = [2 + 0.01 * rng.gauss(0, 1) for _ in range(400)]
    spikes = Spikes()
    assert [spikes.add(value) for value in values] == [None] * 400
    mean, deviation = 2.0, 0.01
    assert spikes.add(mean + 5 * deviation) is None
    told = spikes.add(50.0)
    assert told["value"] == 50.0
    assert told["mean"] == pytest.approx(mean, abs=0.01)
    assert told["deviation"] == pytest.approx(deviation, rel=0.2)
    assert spikes.add(mean + 12 * deviation) is not None, "the one before does not count in full"
    assert spikes.add(0.0) is None, "a loss that falls is none"
    assert spikes.add(float("nan")) is None
    level = [spikes.add(3.0) for _ in range(100)]
    assert level[0] is not None
    assert level[-1] is None, "a new level is none after a while"


def test_a_warm_up_has_no_spikes() -> None:
    falling, spikes = [6 * 0.97**step + 2 for step in range(300)], Spikes()
    assert [spikes.add(value) for value in falling] == [None] * 300
    first = Spikes()
    assert [first.add(value) for value in [1.0, 1.1] * 10 + [50.0]] == [None] * 21, "too few steps for a verdict"
    constant = Spikes()
    assert [constant.add(1.0) for _ in range(40)] == [None] * 40
    assert constant.add(1.1) is None, "no deviation is known"


def trainer_in(folder: Path, **values: object) -> SimpleNamespace:
    defaults = {"is_global_zero": True, "global_rank": 0, "global_step": 0, "callbacks": []}
    defaults["optimizers"] = [SimpleNamespace(skip_spikes=False)]
    checkpoints = SimpleNamespace(dirpath=folder / "checkpoints", seconds=0.0)
    return SimpleNamespace(**{**defaults, **values}, checkpoint_callback=checkpoints, strategy=SimpleNamespace())


def trained(folder: Path, steps: range, values: list[float], state: dict | None, began: float) -> dict[int, dict]:
    """Train in a process that began then; return the state that a checkpoint of each step would have."""
    noting = Incidents()
    noting.began = began
    trainer = trainer_in(folder, global_step=steps.start)
    noting.setup(trainer, None, "fit")
    noting.load_state_dict(state or {})
    noting.on_train_start(trainer, None)
    states = {}
    for step in steps:
        trainer.optimizers[0].is_spike(values[step], 1.0)
        trainer.global_step = step + 1
        states[step + 1] = noting.state_dict()
    noting.end(trainer, incidents.PREEMPTION, "SIGTERM")
    return states


def test_a_resumed_run_notes_the_spikes_of_an_unbroken_one(tmp_path: Path) -> None:
    rng = random.Random(2)
    values = [3 + rng.gauss(0, 0.1) for _ in range(300)]
    for step in (50, 104, 107, 250):
        values[step] += 5
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    trained(whole, range(300), values, None, began=100.0)
    states = trained(resumed, range(106), values, None, began=100.0)
    trained(resumed, range(100, 300), values, states[100], began=200.0)  # from a checkpoint of step 100
    told = [[(s.step, s.details) for p in processes(folder) for s in p.events] for folder in (whole, resumed)]
    assert [step for step, _ in told[0]] == [51, 105, 108, 251]
    assert told[0] == told[1]
    assert "loss 7.773, 2.965 +- 0.11" in processes(whole)[0].events[0].message


def test_a_skipped_step_is_one_line_with_all_its_reasons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng, noting = random.Random(3), Incidents()
    trainer = trainer_in(tmp_path, optimizers=[SimpleNamespace(skip_spikes=True)])
    noting.setup(trainer, None, "fit")
    noting.on_train_start(trainer, None)
    for trainer.global_step in range(40):
        assert not trainer.optimizers[0].is_spike(rng.gauss(3, 0.1), rng.gauss(1, 0.1))
    trainer.global_step = 40
    assert trainer.optimizers[0].is_spike(9.0, 8.0)
    trainer.global_step = 41
    noting.end(trainer, incidents.PREEMPTION, "SIGTERM")
    (process,) = processes(tmp_path)
    (event,) = process.events
    assert (event.kind, event.step, list(event.details)) == ("skipped", 41, ["loss", "gradient norm"])
    assert event.message.startswith("update not applied: loss 9, 2.997 +- 0.1 ")
    assert "; gradient norm 8, " in event.message
    assert f"warning: step 41: {event.message}" in capsys.readouterr().err
    other = trainer_in(tmp_path, global_rank=1, is_global_zero=False, optimizers=trainer.optimizers)
    assert Incidents().look(other, 9.0, 8.0) is False
    assert len(processes(tmp_path)[0].events) == 1


def raised(action: Callable) -> BaseException:
    with pytest.raises(BaseException) as error:  # noqa: PT011
        action()
    return error.value


def test_causes_are_told_by_the_exception_and_by_where_it_was_raised(tmp_path: Path) -> None:
    from nemotron_h.checkpoint.folders import read_integrity
    from nemotron_h.data.blend import load_blend
    from nemotron_h.recipe.compose import compose

    def full() -> None:
        with naming("report"):
            raise OSError(errno.ENOSPC, "No space left on device", "/x/y.bin")

    def throw(error: BaseException) -> Callable:
        def action() -> None:
            raise error

        return action

    for action, kind in (
        (full, incidents.STORAGE),
        (lambda: read_integrity(tmp_path), incidents.STORAGE),
        (lambda: load_blend(str(tmp_path / "none.yaml")), incidents.DATA),
        (lambda: compose("no_such_recipe"), incidents.MISTAKE),
        (lambda: torch.empty(2**55), incidents.MEMORY),
        (throw(MemoryError()), incidents.MEMORY),
        (throw(torch.OutOfMemoryError("CUDA out of memory")), incidents.MEMORY),
        (throw(RuntimeError("[gloo/pair.cc:553] Connection closed by peer")), incidents.LOST_RANK),
        (throw(RuntimeError("[gloo/buffer.cc:78] Timed out waiting 15000ms for recv")), incidents.HANG),
        (throw(RuntimeError("CUDA error: uncorrectable ECC error encountered")), incidents.GPU),
        (throw(KeyboardInterrupt()), incidents.PREEMPTION),
        (throw(ValueError("a bug")), incidents.ERROR),
    ):
        cause = cause_of(raised(action))
        assert cause.kind == kind, (cause, kind)
    assert cause_of(raised(full)).file == "/x/y.bin"


def test_another_rank_notes_an_end_of_its_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback.time, "sleep", lambda _: None)
    first, second = (trainer_in(tmp_path, global_rank=rank, is_global_zero=not rank) for rank in (0, 1))
    noting, other = Incidents(), Incidents()
    noting.setup(first, None, "fit")
    other.setup(second, None, "fit")
    other.end(second, incidents.FINISHED)
    other.end(second, "", error=ValueError("of rank 1"))
    noting.end(first, "", error=RuntimeError("[gloo] Connection closed by peer"))
    noting.end(first, "", "no answer from ranks [1]", RuntimeError("[gloo] Connection closed by peer"))
    noting.end(first, "", error=SystemExit(1))
    lines, _ = read_incidents(tmp_path / INCIDENTS)
    assert [(line.kind, line.rank) for line in lines] == [
        ("started", 0),
        ("error", 1),
        ("lost rank", 0),
        ("lost rank", 0),
    ]
    (process,) = processes(tmp_path)
    assert (process.end.kind, process.end.message, process.began) == ("error", "of rank 1", noting.began)
    third = Incidents()
    third.end(second, "", error=UserError("of all ranks"))
    assert len(read_incidents(tmp_path / INCIDENTS)[0]) == 4, "an end is noted already"


def test_an_error_of_a_gpu_names_host_and_device(tmp_path: Path) -> None:
    noting, trainer = Incidents(), trainer_in(tmp_path, local_rank=3)
    noting.end(trainer, error=RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    (process,) = processes(tmp_path)
    assert process.end.kind == "gpu"
    assert evidence(process.end).startswith(f"{socket.gethostname()}, GPU 3: RuntimeError: CUDA error: uncorrectable")


def test_memory_says_what_it_was_for(tmp_path: Path) -> None:
    noting, trainer = Incidents(), trainer_in(tmp_path)
    noting.setup(trainer, None, "fit")
    noting.on_train_start(trainer, None)
    noting.on_validation_start(trainer, None)
    noting.end(trainer, "", error=MemoryError("no more"))
    (process,) = processes(tmp_path)
    assert process.end.details["part"] == "validation"
    before, now = process.end.details["memory_gib"]
    assert 0 < before <= now + 1


def test_signals_of_ranks_that_it_started_are_evidence(tmp_path: Path) -> None:
    noting, trainer = Incidents(), trainer_in(tmp_path)
    started = [SimpleNamespace(poll=lambda code=code: code) for code in (None, -9, 1)]
    trainer.strategy.launcher = SimpleNamespace(procs=started)
    noting.end(trainer, error=RuntimeError("[gloo] Connection closed by peer"))
    (process,) = processes(tmp_path)
    assert process.end.details["signals"] == {"2": 9}
    assert "rank 2 was ended by signal 9" in evidence(process.end)


def test_a_command_notes_the_end_of_a_run_that_it_followed(tmp_path: Path) -> None:
    run = SimpleNamespace(name="small", folder=tmp_path)
    output = SimpleNamespace(newest=lambda: "small.log", text=lambda: "")
    Incidents().setup(trainer_in(tmp_path), None, "fit")
    with pytest.raises(UserError, match="small was ended by SIGKILL") as raised:
        runs.check_ended(run, 12, SimpleNamespace(code=-9, output=output, again="run it again"))
    assert raised.value.hint == "run it again; see small.log"
    (process,) = processes(tmp_path)
    assert (process.end.kind, process.end.message) == ("killed", "was ended by SIGKILL")


def test_incidents_that_cannot_be_written_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    noting, trainer = Incidents(), trainer_in(tmp_path / "none")
    noting.setup(trainer, None, "fit")
    noting.end(trainer, incidents.FINISHED)
    said = capsys.readouterr().err
    assert said.count("warning: incidents.jsonl was not written: FileNotFoundError") == 2
