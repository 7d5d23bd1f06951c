"""Every shipped recipe's shrunken twin trains three steps on the CPU, in one process; see `twins.py`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_h.recipe.compose import known_recipes

WORKER = Path(__file__).with_name("twins.py")
NAMES = [name for name in known_recipes() if name.endswith("/pretrain")]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Recipe -> losses of its twin's steps, and the share of weight tensors that moved."""
    folder = tmp_path_factory.mktemp("twins")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *NAMES],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return {r["recipe"]: r for r in map(json.loads, (folder / "losses.jsonl").read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_twin_trains(twins: dict[str, dict], name: str) -> None:
    losses = twins[name]["losses"]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert abs(losses[0] - math.log(512)) < 0.5, "the first loss is not that of a fresh model"
    assert twins[name]["moved"] > 0.6, "training left weights as they were"
