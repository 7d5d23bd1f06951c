"""A small recipe over a prepared blend, and sweeps over it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from small_run import Small, prepared


class Here(Small):
    """Prepares in this process: most tests start no run."""

    def prepare(self, blend: str) -> None:
        from nemotron_h.data.blend import load_blend
        from nemotron_h.data.prepare.pipeline import prepare

        prepare(load_blend(str(self.folder / blend)), self.folder / "data")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Text, prepared, and `base.yaml`, whose runs have four steps."""
    small = prepared(tmp_path_factory.mktemp("sweep"), Here)
    small.variant(
        "base",
        ("tokens: 6144 # 12 steps", "tokens: 2048"),
        ("warmup_tokens: 1024", "warmup_tokens: 512"),
        ("checkpoint: {every_steps: 4}", "checkpoint: {every_steps: 1}"),
        ("validate_every_steps: 6", "validate_every_steps: 2"),
    )
    return small
