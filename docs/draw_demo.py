"""Draw the loss of `make demo` for the documents: `python docs/draw_demo.py runs/nemotron_h_tiny`.

Writes `docs/img/demo_loss.svg`, of `docs/reports.md`, which takes the light or dark scheme of its reader.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemotron_h.report.page import save_loss
from nemotron_h.report.run import read_run

PICTURE = Path(__file__).resolve().parent / "img" / "demo_loss.svg"


if __name__ == "__main__":
    save_loss(read_run(Path(sys.argv[1])), PICTURE)
    print(PICTURE)
