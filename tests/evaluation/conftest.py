"""The small model of `tests/model`, checkpoints of `tests/inference`, the local corpus of `tests/data`."""

import sys
from pathlib import Path

for folder in ("model", "inference", "data"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from megatron_on_one_rank import megatron  # noqa: E402, F401
