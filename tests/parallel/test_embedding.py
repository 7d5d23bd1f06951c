"""The embedding that adds to Megatron's gradient buffer is megatron-core's, on one rank and two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forks import FORKS

WORKER = Path(__file__).with_name("embedding_worker.py")


@pytest.mark.slow
def test_two_ranks_equal_one_and_megatron(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        FORKS.launch(WORKER, str(out), folder=tmp_path, ranks=ranks)
        found.append(torch.load(out))
    one, two = found
    expected = one["VocabParallelEmbedding", False]
    assert expected["gradient"].abs().max() > 1
    others = {**{("one", *key): value for key, value in one.items()}, **two}
    assert len(others) == 6
    for key, result in others.items():
        assert torch.equal(result["output"], expected["output"]), key
        torch.testing.assert_close(result["gradient"], expected["gradient"], rtol=1e-6, atol=1e-6)
