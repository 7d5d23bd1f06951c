"""Does Puzzle's search choose well? `python demos/puzzle.py`.

Reads the compressions of three parents, and MiniPuzzle's of the first (the commands are in `docs/results/puzzle.md`),
and writes the tables of that page.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/results/puzzle.md"
BEGIN, END = "<!-- tables: written by demos/puzzle.py -->\n", "<!-- end of tables -->\n"
#: compressions of parents with three initial weights
RUNS = {"1": "nemotron_h_tiny_heads_puzzle", "2": "heads_seed2_puzzle", "3": "heads_seed3_puzzle"}
HOMOGENEOUS = "nemotron_h_tiny_heads_minipuzzle"


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
        UserError: none of the compressions has ended.
    """
    there = {seed: run for seed, run in RUNS.items() if Path("runs", run, "report", "result.json").is_file()}
    if not there:
        raise UserError("no compression has ended", hint="run the commands of docs/results/puzzle.md")
    searched = [
        "| parent | sums: program | greedy | best random | KL: program | greedy | random (best, median) | Spearman |",
        "|---|---|---|---|---|---|---|---|",
    ]
    healed = [
        "| parent | its loss | child, put together | healed | recovered | parameters | s a batch, foretold/measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, run in there.items():
        found, compared, result = (
            read(run, *path)
            for path in (("search", "solutions.json"), ("compare", "compared.json"), ("report", "result.json"))
        )
        lost, chosen = compared["lost"], compared["chosen"]
        searched.append(
            f"| {seed} | {chosen['score']:.4f} | {found['greedy']['score']:.4f} "
            f"| {min(row['score'] for row in found['random']):.4f} | {lost['solutions'][chosen['solution']]:.4f} "
            f"| {lost['greedy'][0]:.4f} | {min(lost['random']):.4f}, {median(lost['random']):.4f} "
            f"| {result['spearman']:.3f} of {result['children']} |"
        )
        losses, seconds = result["validation"], result["latency"]
        timed = f"{seconds['foretold']:.3f}/{seconds['child']:.3f}" if seconds else ""
        healed.append(
            f"| {seed} | {_losses(losses)} | {result['recovered']:.1%} | {result['parameters']['child']:,} | {timed} |"
        )
    other = read(HOMOGENEOUS, "export", "result.json")
    share, parameters = other["recovered"], other["parameters"]["child"]
    healed.append(f"| 1, MiniPuzzle | {_losses(other['validation'])} | {share:.1%} | {parameters:,} | |")
    return "\n".join([*searched, "", *healed]) + "\n"


def _losses(losses: dict[str, Any]) -> str:
    return " | ".join(f"{losses[model]['loss']:.4f}" for model in ("parent", "pruned", "child"))


def main() -> None:
    """Write the tables."""
    text = tables()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    report_mistakes()
    main()
