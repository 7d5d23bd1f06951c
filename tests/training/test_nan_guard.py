"""A loss that is not finite stops the run where it happens, says where it came from, and leaves checkpoints alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Small

from nemotron_h.training import checkpoints


@pytest.mark.slow
def test_names_step_samples_and_layer_and_keeps_the_checkpoint(small: Small) -> None:
    recipe = small.recipe("poisoned")
    worker = Path(__file__).with_name("nan_worker.py")
    errors = small.folder / "poisoned.err"
    # Files, not pipes, and a session of its own: the checkpoint writer's helper process outlives the run
    with errors.open("w") as stderr, (small.folder / "poisoned.out").open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, str(worker), str(recipe), "6"],
            stdout=stdout,
            stderr=stderr,
            cwd=small.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            assert process.wait(timeout=200) == 2, errors.read_text()[-4000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = errors.read_text()
    # 8 samples a step in micro-batches of 2: the sixth step begins with sample 40
    assert "the loss of step 6 is not finite (micro-batch 1 of 4 on rank 0, samples 40 (" in said
    assert "It first appears in the output of layer 3 (attention)." in said
    assert "linear_proj.weight" in said
    found = checkpoints.finished(small.run_dir("poisoned"))
    assert [checkpoints.step_of(path) for path in found] == [4]
    assert str(found[0]) in said
    record = json.loads((found[0] / checkpoints.RECORD).read_text())
    assert record["throughput"]["steps"] == 1  # after three steps of warm-up
    rates = record["throughput"]
    assert rates["tflops_per_rank"] == pytest.approx(
        rates["flops_per_step_and_rank"] / rates["seconds_per_step"] / 1e12
    )
    assert "mfu" not in rates, "a CPU has no stated peak"
