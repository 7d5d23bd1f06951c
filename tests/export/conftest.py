"""The small model of `tests/model`, checkpoints of `tests/inference`, and megatron-core in this process."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from megatron_on_one_rank import megatron  # noqa: F401
from save_checkpoint import save
from small_model import small_config, small_model
from small_tokenizer import train_small

from nemotron_h.data.tokenizer import fingerprint


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as large as the small model's vocabulary, with the chat tokens."""
    return train_small(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def run(
    megatron: None,  # noqa: F811
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of the small model with one checkpoint, which names its tokenizer and its hash."""
    folder = tmp_path_factory.mktemp("run")
    data = {"tokenizer": str(tokenizer), "tokenizer_sha256": fingerprint(tokenizer), "seq_length": 128}
    save(small_model(small_config()), folder / "checkpoints" / "step-000001", data=data)
    return folder
