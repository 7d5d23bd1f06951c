"""Does Puzzle's search choose well? `python demos/puzzle.py`.

Reads compressions whose children have been compared, with up to three seeds and of parents with up to three initial
weights, and MiniPuzzle's of the first, those that there are (the commands are in `docs/results/puzzle.md`), and writes
the tables of that page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from nemotron_h.checkpoint.reader import read_record
from nemotron_h.compression.puzzle.pipeline.report import points_of
from nemotron_h.compression.recovery import recovered
from nemotron_h.compression.scoring import predict
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_between
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.sampler import ValidationText
from nemotron_h.data.manifest import check_manifest
from nemotron_h.inference.model import load_model
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/puzzle.md"
BEGIN, END = "<!-- tables: written by demos/puzzle.py -->\n", "<!-- end of tables -->\n"
#: parent, and seed of the variants' text and of the random children -> compression
RUNS = {
    "1, 1": "nemotron_h_tiny_heads_puzzle",
    "1, 2": "heads_text2",
    "1, 3": "heads_text3",
    "2, 1": "heads_seed2_puzzle",
    "3, 1": "heads_seed3_puzzle",
}
FIRST = next(iter(RUNS))
HOMOGENEOUS = "nemotron_h_tiny_heads_minipuzzle"
#: of the text that no choice has seen
LENGTH, WINDOWS = 256, 64


def read(run: str, *path: str) -> Any:
    """Return a JSON file of a compression.

    Errors:
        UserError: there is none.
    """
    file = Path("runs", run, *path)
    if not file.is_file():
        raise UserError(f"there is no {file}", hint="run the commands of docs/results/puzzle.md")
    return json.loads(file.read_text())


def tables() -> str:
    """Return both tables.

    Errors:
        UserError: no compression has compared its children.
    """
    there = {seeds: run for seeds, run in RUNS.items() if Path("runs", run, "compare", "compared.json").is_file()}
    if not there:
        raise UserError("no children have been compared", hint="run the commands of docs/results/puzzle.md")
    blend = load_blend("sample_small")
    manifest = check_manifest(None, blend)
    text = ValidationText.halves(blend, manifest, LENGTH)[1].read(manifest, WINDOWS)
    searched = [
        "| seeds | sums: program | greedy | best random | KL: program | greedy | random: best, median | Spearman |",
        "|---|---|---|---|---|---|---|---|",
    ]
    healed = [
        "| seeds | parent | child, put together | healed | recovered | parameters | s a batch, foretold/measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for seeds, run in there.items():
        found, compared = read(run, "search", "solutions.json"), read(run, "compare", "compared.json")
        lost, chosen = compared["lost"], compared["chosen"]
        pairs = [pair for group in points_of(compared, found).values() for pair in group]
        searched.append(
            f"| {seeds} | {chosen['score']:.4f} | {found['greedy']['score']:.4f} "
            f"| {min(row['score'] for row in found['random']):.4f} | {lost['solutions'][chosen['solution']]:.4f} "
            f"| {lost['greedy'][0]:.4f} | {min(lost['random']):.4f}, {median(lost['random']):.4f} "
            f"| {spearmanr(*zip(*pairs, strict=True)).statistic:.3f} of {len(pairs)} |"
        )
        if not Path("runs", run, "report", "result.json").is_file():
            continue
        result = read(run, "report", "result.json")
        seconds = result["latency"]
        timed = f"{seconds['foretold']:.3f}/{seconds['child']:.3f}" if seconds else ""
        models = (read_parent(run), Path("runs", run, "child/pruned"), Path(result["checkpoint"]))
        healed.append(f"| {seeds} | {_losses(models, text)} | {result['parameters']['child']:,} | {timed} |")
    if Path("runs", HOMOGENEOUS, "export", "result.json").is_file() and FIRST in there:
        other = read(HOMOGENEOUS, "export", "result.json")
        winner = read(HOMOGENEOUS, "select", "winner.json")
        models = (read_parent(RUNS[FIRST]), Path(winner["pruned"]["checkpoint"]), Path(other["child"]["checkpoint"]))
        healed.append(f"| 1, MiniPuzzle | {_losses(models, text)} | {other['parameters']['child']:,} | |")
    return "\n".join([*searched, "", *healed]) + "\n"


def read_parent(run: str) -> Path:
    """Return the checkpoint of a compression's parent."""
    return Path(read_record(Path("runs", run, "child/pruned"))["puzzle"]["from"])


def _losses(models: Sequence[Path], text: np.ndarray) -> str:
    """Return the losses of parent, child as it was put together and healed child, and what healing brought back."""
    parent, pruned, child = (predict(load_model(checkpoint), text, 16).loss for checkpoint in models)
    return f"{parent:.4f} | {pruned:.4f} | {child:.4f} | {recovered(parent, pruned, child):.1%}"


def main() -> None:
    """Write the tables."""
    text = tables()
    write_between(PAGE, BEGIN, END, text)
    print(text, end="")


if __name__ == "__main__":
    report_mistakes()
    main()
