"""The small model of `tests/model`, checkpoints of `tests/inference`, text of `tests/data`, and megatron-core here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from megatron_on_one_rank import megatron  # noqa: F401
