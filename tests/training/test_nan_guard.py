"""A loss or gradient that is not finite stops the run where it happens, says where, and leaves checkpoints alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import FORKS, Small

from nemotron_h.checkpoint import folders
from nemotron_h.report.incidents import processes, summary
from nemotron_h.report.run import REPORT


def stopped(small: Small, name: str, part: str, step: int = 6) -> str:
    """What a run says whose weight or gradient is poisoned at a step, and which ends as a user's error does."""
    recipe, worker = small.recipe(name), Path(__file__).with_name("nan_worker.py")
    code = FORKS.run(str(worker), str(recipe), str(step), part, folder=small.folder, name=name, seconds=200)
    said = (small.folder / f"{name}.err").read_text()
    assert code == 2, said[-4000:]
    return said


@pytest.mark.slow
def test_names_step_samples_and_layer_and_keeps_the_checkpoint(small: Small) -> None:
    said = stopped(small, "poisoned", "weight")
    (process,) = processes(small.run_dir("poisoned"))
    assert (process.end.kind, process.end.step, process.end.checkpoint) == ("numerics", 5, 4)
    assert process.end.message.startswith("the loss of step 6 is not finite (micro-batch 1 of 4 on rank 0, ")
    assert 0 < process.end.lost_seconds < process.wall - process.end.seconds["setup"]
    # 8 samples a step in micro-batches of 2: the sixth step begins with sample 40
    assert "the loss of step 6 is not finite (micro-batch 1 of 4 on rank 0, samples 40 (" in said
    assert "It first appears in the output of layer 3 (attention)." in said
    assert "linear_proj.weight" in said
    found = folders.finished(small.run_dir("poisoned"))
    assert [folders.step_of(path) for path in found] == [4]
    assert str(found[0]) in said
    page = (small.run_dir("poisoned") / REPORT).read_text()
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
    said = stopped(small, "overflown", "gradient")
    (process,) = processes(small.run_dir("overflown"))
    assert (process.end.kind, process.end.step) == ("numerics", 5)
    assert process.end.message.startswith("a gradient of step 6 is not finite")
    assert "a gradient of step 6 is not finite, though its loss is (rank 0, samples 40, 41, " in said
    assert "Of 1 of " in said
    assert (
        "<p>a gradient of step 6 is not finite, though its loss is ("
        in (small.run_dir("overflown") / REPORT).read_text()
    )
    assert "first in the backward pass: decoder.layers.3.self_attention.linear_proj.weight." in said
    found = folders.finished(small.run_dir("overflown"))
    assert [folders.step_of(path) for path in found] == [4]
    assert str(found[0]) in said


@pytest.mark.slow
def test_a_full_disk_in_the_middle_is_noted_as_storage_and_the_next_start_goes_on(small: Small) -> None:
    said = stopped(small, "full", "disk")
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
    said = stopped(small, "saved", "saved", 4)
    assert "step-000004 is not written (rank 0): NaN or infinite weights in decoder.layers.3.self_attention.li" in said
    assert folders.newest(small.run_dir("saved")) is None
    assert not folders.unfinished(small.run_dir("saved"))


def test_names_the_sources_of_a_window_of_several() -> None:
    from nemotron_h.data.feed.packing import PackedOrder
    from nemotron_h.training.callbacks.nan_guard import NanGuard

    order = PackedOrder({"code": np.array([5] * 4), "talk": np.array([5] * 4)}, {"code": 0.5, "talk": 0.5}, 40, seed=1)
    trainer = SimpleNamespace(datamodule=SimpleNamespace(order=order))
    assert NanGuard._samples(trainer, {"sample_ids": torch.tensor([0, 1])}) == "0 (code, talk), 1 (code, talk)"
