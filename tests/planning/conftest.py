"""megatron-core in this process, from tests/model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

from megatron_on_one_rank import megatron  # noqa: F401
