"""The small model of `tests/model`, checkpoints of `tests/inference`, and megatron-core in this process."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from megatron_on_one_rank import megatron  # noqa: F401
from small_model import VOCABULARY

from nemotron_h.data.tokenizer import train_bpe


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as large as the small model's vocabulary, with the chat tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghöß日本🙂", k=4)) for _ in range(50)]
    train_bpe([" ".join(draw.choices(words, k=500))], VOCABULARY, folder)
    return folder
