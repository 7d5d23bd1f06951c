"""Every recipe as `nemo llm pretrain --factory NAME`: it resolves, overrides and dry-runs on a machine without GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_h.compose import known_recipes

NAMES = [name.split("/")[0] for name in known_recipes() if name.endswith("/pretrain")]


@pytest.fixture(scope="module")
def parsed():
    """Parse a factory and settings as the command does; NeMo has factories of its own, some of the same name."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    from nemotron_h import factories  # noqa: F401 - what the entry point loads

    def parse(name: str, *settings: str) -> run.Partial:
        return parse_cli_args(llm.pretrain, list(settings), parse_factory(llm.pretrain, "factory", run.Partial, name))

    return parse


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_factory_resolves_and_overrides(parsed, name: str) -> None:
    from nemotron_h.model.module import NemotronHConfig

    task = parsed(
        name,
        "trainer.max_steps=20",
        "optim.peak_lr=1e-3",
        "trainer.strategy.tensor_model_parallel_size=1",
        "data.seed=7",
        "model.config.init_seed=3",
    )
    assert task.model.config.__fn_or_cls__ is NemotronHConfig
    assert task.model.config.definition_name == name
    assert (task.trainer.max_steps, task.optim.peak_lr, task.data.seed) == (20, pytest.approx(1e-3), 7)
    assert task.trainer.strategy.tensor_model_parallel_size == 1
    assert task.model.config.init_seed == 3


@pytest.mark.slow
def test_the_command_dry_runs(tmp_path: Path) -> None:
    nemo = Path(sys.executable).with_name("nemo")
    done = subprocess.run(
        [nemo, "llm", "pretrain", "--factory", "nemotron_h_56b", "--dryrun", "--yes", "optim.peak_lr=3e-4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nemotron_h_56b" in done.stdout
    assert "0.0003" in done.stdout
    assert not list(tmp_path.glob("runs/*")), "a dry run wrote a run"
