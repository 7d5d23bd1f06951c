"""FP8 over two tensor-parallel ranks is FP8 on one, where the shards have the whole tensor's amax."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forks import FORKS

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
RECIPES = ("fp8_current_scaling", "fp8_blockwise")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of one rank and of two."""
    found = []
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("ranks") / f"{ranks}.pt"
        FORKS.launch(WORKER, str(out), *RECIPES, folder=out.parent, ranks=ranks)
        found.append(torch.load(out))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor and sequence"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_two_ranks_equal_one(results: list[dict], kind: str, recipe: str, sequence: bool) -> None:
    one, two = results[0][kind, recipe, False], results[1][kind, recipe, sequence]
    assert one.keys() == two.keys()
    for name, expected in one.items():
        error = float((two[name] - expected).abs().max() / expected.abs().max())
        assert error < 2e-6, (name, error)  # the sum over ranks is in another order
