"""Make `nemotron_h` importable from the checkout where it is not installed (its YAML folders lie at the top)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def import_repository() -> None:
    """Does nothing where the package is installed."""
    try:
        import nemotron_h
    except ModuleNotFoundError:
        sys.path.insert(0, str(ROOT / "collections"))
        import nemotron_h
    if importlib.util.find_spec("nemotron_h.configs") is None:
        nemotron_h.__path__.append(str(ROOT))
