"""A loss or gradient that is not finite stops the run where it happens, says where, and leaves checkpoints alone."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import Small, drawn

from nemotron_h.checkpoint import folders
from nemotron_h.report.incidents import processes, summary


def stopped(small: Small, name: str, *poison: str) -> str:
    """What a run says that is poisoned, and which ends as a user's error does."""
    done = small.train(name, *(f"poison={each}" for each in poison), check=False)
    assert done.returncode == 2, done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
def test_names_step_samples_and_layer_and_keeps_the_checkpoint(small: Small) -> None:
    said = stopped(small, "poisoned", "6:weight")
    (process,) = processes(small.run_dir("poisoned"))
    assert (process.end.kind, process.end.step, process.end.checkpoint) == ("numerics", 5, 4)
    assert process.end.message.startswith("the loss of step 6 is not finite (micro-batch 1 of 4 on rank 0, ")
    assert 0 < process.end.lost_seconds < process.wall - process.end.seconds["setup"]
    # 8 samples a step in micro-batches of 2: the sixth step begins with sample 40
    assert "the loss of step 6 is not finite (micro-batch 1 of 4 on rank 0, samples 40 (" in said
    assert "It first appears in the output of layer 3 (attention)." in said
    assert (
        "Weights that are not finite: decoder.layers.3.self_attention.linear_proj.weight. Run again it has the same"
        in said
    )
    found = folders.finished(small.run_dir("poisoned"))
    assert [folders.step_of(path) for path in found] == [4]
    assert str(found[0]) in said
    page = drawn(small.run_dir("poisoned"))
    assert "stopped at step 5 of" in page
    assert "<p>the loss of step 6 is not finite (" in page
    record = json.loads((found[0] / folders.RECORD).read_text())
    assert record["throughput"]["steps"] == 1  # after three steps of warm-up
    rates = record["throughput"]
    assert rates["tflops_per_rank"] == pytest.approx(
        rates["flops_per_step_and_rank"] / rates["seconds_per_step"] / 1e12
    )
    assert "mfu" not in rates, "a CPU has no stated peak"


@pytest.mark.slow
def test_names_step_samples_and_weight_of_a_gradient(small: Small) -> None:
    said = stopped(small, "overflown", "6:gradient")
    (process,) = processes(small.run_dir("overflown"))
    assert (process.end.kind, process.end.step) == ("numerics", 5)
    assert process.end.message.startswith("a gradient of step 6 is not finite")
    where = "(micro-batch 1 of 4 on rank 0, samples 40 (low), 41 (low))"
    assert f"a gradient of step 6 is not finite, though its loss is {where}. Of 1 of " in said
    assert "<p>a gradient of step 6 is not finite, though its loss is (" in drawn(small.run_dir("overflown"))
    assert "first in the backward pass: decoder.layers.3.self_attention.linear_proj.weight." in said
    found = folders.finished(small.run_dir("overflown"))
    assert [folders.step_of(path) for path in found] == [4]
    assert str(found[0]) in said


@pytest.mark.slow
def test_other_values_the_second_time_are_told(small: Small) -> None:
    said = stopped(small, "unsteady", "6:unsteady")
    assert "linear_proj.weight. Run again it is not finite either, with other values: a fault of the machine" in said


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def weight_files(small: Small, name: str) -> dict:
    """Sizes and hashes of the last checkpoint's files of weights and optimizer; others name the run's folder."""
    listed = folders.read_integrity(folders.finished(small.run_dir(name))[0])
    files = {file: entry for file, entry in listed.items() if file.endswith(".distcp")}
    assert files
    return files


DROPOUT = "model.config.hidden_dropout=0.1"
TENSOR = ("trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2")
PIPELINE = ("trainer.devices=2", "trainer.strategy.pipeline_model_parallel_size=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "poison"),
    [
        ("data", ("trainer.devices=2", DROPOUT), ["5:output_once:1", "7:gradient_once:1"]),
        ("pipeline", PIPELINE, ["5:gradient_once", "7:output_once"]),
        ("tensor", TENSOR, ["5:duplicate_once:1", "7:output_once"]),
    ],
)
def test_a_transient_fault_of_one_rank_leaves_no_trace(
    small: Small, name: str, settings: tuple[str, ...], poison: list[str]
) -> None:
    one, two = f"{name}_unbroken", f"{name}_transient"
    small.train(one, *settings, ranks=2)
    done = small.train(two, *settings, *(f"poison={each}" for each in poison), ranks=2)
    assert small.steps(one) == small.steps(two)
    assert weight_files(small, one) == weight_files(small, two)
    (process,) = processes(small.run_dir(two))
    assert [(event.kind, event.step) for event in process.events] == [("transient", 5), ("transient", 7)]
    for event in process.events:
        loss, norm = (event.details[each] for each in ("loss", "gradient norm"))
        lost = poison[event.step // 7].split(":")[1] == "output_once"
        assert (loss[0] == "nan", norm[0] in ("nan", "inf")) == (lost, True)
        step = small.steps(one)[event.step]
        assert [float32(value[1]).hex() for value in (loss, norm)] == [step["loss"], step["grad_norm"]]
        ranks = [1] if name != "tensor" else [0, 1]  # which have one loss
        assert [int(seen.split()[1]) for seen in event.details["seen"]] == ranks * lost
        assert f"warning: step {event.step}: loss " in done.stderr


@pytest.mark.slow
def test_skipped_steps_change_nothing_and_a_resumed_run_skips_the_same(small: Small) -> None:
    spikes = ("poison=7:spike", "poison=10:spike", "optim.skip_spikes=true", *PIPELINE)
    small.train("skipped", *spikes, ranks=2)
    small.train("skipped_killed", *spikes, "kill=9", ranks=2, check=False)
    assert "resumed at step 8" in small.train("skipped_killed", *spikes, ranks=2).stdout
    steps = small.steps("skipped")
    assert small.steps("skipped_killed") == steps
    assert weight_files(small, "skipped") == weight_files(small, "skipped_killed")
    (process,) = processes(small.run_dir("skipped"))
    assert [(event.kind, event.step) for event in process.events] == [("skipped", 7), ("skipped", 10)]
    resumed = processes(small.run_dir("skipped_killed"))
    assert [event.details for each in resumed for event in each.events] == [e.details for e in process.events]
    value = process.events[0].details["gradient norm"]["value"]
    assert float32(value).hex() == steps[7]["grad_norm"], "before clipping"
    shown = small.command("skipped_incidents", "incidents", str(small.run_dir("skipped"))).stdout
    assert "2 skipped" in shown


@pytest.mark.slow
def test_a_full_disk_in_the_middle_is_noted_as_storage_and_the_next_start_goes_on(small: Small) -> None:
    said = stopped(small, "full", "6:disk")
    assert "one checkpoint takes up to" in said
    small.train("full")
    full, last = processes(small.run_dir("full"))
    assert (full.end.kind, full.end.step, full.end.checkpoint) == ("storage", 8, 4)
    assert full.end.message.startswith(f"{small.run_dir('full')} has 0.0 MiB free")
    assert (last.end.kind, last.end.first_step, last.end.step) == ("finished", 4, 12)
    total = summary([full, last])
    assert (total.failures, total.restarts) == (1, 1)
    assert total.seconds["redone"] == pytest.approx(full.end.seconds["training"] / 2, rel=1e-6), "4 of 8 steps"
    counted = full.end.seconds["training"] / 2 + last.end.seconds["training"]
    assert total.goodput == pytest.approx(counted / total.wall, rel=1e-6)
    assert min(last.end.seconds.values()) > 0
    assert sum(last.end.seconds.values()) < last.wall


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_in_no_checkpoint(small: Small) -> None:
    said = stopped(small, "saved", "4:saved")
    assert "step-000004 is not written (rank 0): NaN or infinite weights in decoder.layers.3.self_attention.li" in said
    assert folders.newest(small.run_dir("saved")) is None
    assert not folders.unfinished(small.run_dir("saved"))


def test_all_ranks_know_what_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.training import guarded_optimizer
    from nemotron_h.training.guarded_optimizer import agreed

    def told(other: list[float], last: bool, loss: float, norm: float, others: tuple = ()) -> tuple[float, float]:
        """What a rank takes as its own and another's, which has (loss, norm) packed so."""
        monkeypatch.setattr(guarded_optimizer.parallel_state, "is_pipeline_last_stage", lambda: last)
        monkeypatch.setattr(guarded_optimizer.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(guarded_optimizer.torch.cuda, "current_device", lambda: "cpu")
        monkeypatch.setattr(
            guarded_optimizer.dist,
            "all_reduce",
            lambda mine, op: mine.copy_(torch.maximum(mine, torch.tensor(other, dtype=torch.float64))),
        )
        return agreed(torch.tensor(loss), norm, [torch.tensor(each) for each in others])

    inf, nan, none = float("inf"), float("nan"), float("-inf")
    assert told([0, 0, none, 2.0], True, 3.5, 2.0) == (3.5, 2.0), "the other is of an earlier stage"
    assert told([0, 0, 3.5, 2.0], False, 0.0, 2.0) == (3.5, 2.0), "and there"
    assert told([0, 0, -3.5, 2.0], False, 0.0, 2.0) == (-3.5, 2.0)
    assert str(told([2, 0, none, 2.0], True, 3.5, 2.0)) == str((nan, 2.0))
    assert told([0, 1, 3.5, none], True, 3.5, 2.0) == (3.5, inf)
    assert told([0, 0, 3.5, 2.0], True, none, 2.0) == (inf, 2.0)
    assert str(told([0, 0, 3.5, 2.0], True, nan, inf)) == str((nan, inf))
    assert str(told([0, 0, 3.5, 2.0], True, 3.5, 2.0, ([1.0], [1.0, nan]))) == str((3.5, nan)), "a duplicate's"
    assert told([0, 0, 3.5, 2.0], True, 3.5, 2.0, ([1.0], [5.0])) == (3.5, 2.0)


def test_names_the_sources_of_a_window_of_several() -> None:
    from nemotron_h.data.feed.packing import PackedOrder
    from nemotron_h.training.callbacks.nan_guard import samples

    order = PackedOrder({"code": np.array([5] * 4), "talk": np.array([5] * 4)}, {"code": 0.5, "talk": 0.5}, 40, seed=1)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(order=order))
    assert samples(trainer, {"sample_ids": torch.tensor([0, 1])}) == "0 (code, talk), 1 (code, talk)"
