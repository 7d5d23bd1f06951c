"""The small model of `tests/model`, checkpoints of `tests/inference`, text of `tests/data`, runs of `tests/training`,
and megatron-core here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))

import tiny_pipeline
from forks import FORKS, Forks
from megatron_on_one_rank import megatron  # noqa: F401

from nemotron_h.compression import distillations
from nemotron_h.launch import runs


@pytest.fixture(scope="session")
def forks() -> Forks:
    """Runs programs of one rank or more, without importing NeMo for each."""
    return FORKS


@pytest.fixture(scope="session")
def tiny(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tiny_pipeline.Tiny:
    """Text, a trained parent and the recipe of its compression; nothing of that has run yet."""
    return tiny_pipeline.write(tmp_path_factory.mktemp("tiny"), forks)


@pytest.fixture
def launched(tiny: tiny_pipeline.Tiny, monkeypatch: pytest.MonkeyPatch) -> tiny_pipeline.Tiny:
    """`tiny`, whose runs are the real ones in forks."""
    monkeypatch.setattr(runs, "train", tiny.launch)
    monkeypatch.setattr(distillations, "train_several", tiny.launch_several)
    tiny.started.clear()
    tiny.options.clear()
    return tiny


@pytest.fixture(scope="session")
def compressed(tiny: tiny_pipeline.Tiny) -> tuple[tiny_pipeline.Tiny, Result]:
    """`tiny` after `nemotron-h minipuzzle RECIPE`, and what the command said."""
    from nemotron_h.cli.main import app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", tiny.launch)
        patch.setattr(distillations, "train_several", tiny.launch_several)
        tiny.started.clear()
        said = CliRunner().invoke(app, ["minipuzzle", str(tiny.recipe_file)], catch_exceptions=False)
    tiny.of_the_whole = tuple(tiny.started)
    return tiny, said
