"""Results of a benchmark, kept as they come."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Report:
    """Results as they come: one line of JSON each, on the screen and in a file."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.file = (out / "results.jsonl").open("a")
        self.began = time.perf_counter()

    def add(self, section: str, **values: Any) -> None:
        """One result."""
        line = json.dumps({"section": section, "at_s": round(time.perf_counter() - self.began, 1), **values})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began
