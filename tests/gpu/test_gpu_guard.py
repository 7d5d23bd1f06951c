"""On a GPU: a step that came to NaN once is run again and leaves no trace; one whose weight is NaN ends the run.

`python tests/gpu/test_gpu_guard.py` does it without pytest. Without a GPU it tries itself on the CPU tests' model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu_runs import FIXED_ORDER, ON_GPU, PROCESSES, STEPS, main, recipe, run_checks, small_run

from nemotron_h.report.incidents import processes

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]


def a_transient_fault_leaves_no_trace(small: small_run.Small) -> None:
    """Disturb an output, which makes the loss NaN, and a gradient, each once, and compare with a run left alone."""
    PROCESSES.environment = FIXED_ORDER
    dropout = "model.config.hidden_dropout=0.1"  # from the generators that the step began with
    small.train("unbroken", dropout, recipe=recipe(small, "unbroken"))
    poison = ("poison=5:output_once", "poison=7:gradient_once")
    small.train("transient", dropout, *poison, recipe=recipe(small, "transient"))
    (process,) = processes(small.run_dir("transient"))
    events = [(event.kind, event.step) for event in process.events]
    assert events == [("transient", 5), ("transient", 7)], process.events
    pairs = zip(small.steps("unbroken").items(), small.steps("transient").items(), strict=True)
    differing = [(one, two) for one, two in pairs if one != two]
    assert not differing, differing[0]
    assert small.same_tensors("unbroken", "transient", STEPS)


def a_lasting_fault_is_named(small: small_run.Small) -> None:
    """Make a weight NaN: the run ends as a user's error, names layer and weight, and keeps the last checkpoint."""
    PROCESSES.environment = FIXED_ORDER
    done = small.train("lasting", "poison=6:weight", check=False, recipe=recipe(small, "lasting"))
    assert done.returncode == 2, done.stderr[-4000:]
    assert "It first appears in the output of layer 3 (attention)." in done.stderr, done.stderr[-4000:]
    assert "decoder.layers.3.self_attention.linear_proj.weight. Run again it has the same" in done.stderr
    (process,) = processes(small.run_dir("lasting"))
    assert (process.end.kind, process.end.step, process.end.checkpoint) == ("numerics", 5, 4)


CHECKS = (a_transient_fault_leaves_no_trace, a_lasting_fault_is_named)

if pytest is not None:

    def test_the_guard_on_a_gpu(tmp_path: Path) -> None:
        run_checks(tmp_path, CHECKS)


if __name__ == "__main__":
    main(CHECKS)
