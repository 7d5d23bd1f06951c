"""The small model of `tests/model`, and megatron-core in this process."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from megatron_on_one_rank import megatron  # noqa: F401
