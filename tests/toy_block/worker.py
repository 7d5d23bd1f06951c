"""tests/training/worker.py with the toy block registered."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from register import register

register()
runpy.run_path(str(Path(__file__).parents[1] / "training" / "worker.py"), run_name="__main__")
