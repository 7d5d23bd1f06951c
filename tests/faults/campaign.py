"""Disturb small runs at random moments, give the same command again, and compare with undisturbed runs.

`campaign.py [--cases N] [--seed SEED]` goes through all pairs of fault and stage; `--case SEED` tries one case again.
Prints a table by fault and stage and the failures, each with its command; exit code 1 where there are any.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

import verdict
from cases import KINDS, PAIRS
from stages import STAGES
from trial import FORKS, Ground, Result

from nemotron_h.core.progress import StageProgress


def table(results: list[Result]) -> Table:
    """Return the cases by fault and stage: how many passed of how many, and what the others came to."""
    shown = Table("fault", *STAGES, "cases", box=None, padding=(0, 2, 0, 0))
    shown.columns[0].no_wrap = True
    for kind in KINDS.values():
        row = [_cell([r for r in results if (r.fault, r.stage) == (kind, stage)]) for stage in STAGES]
        shown.add_row(kind, *row, _cell([r for r in results if r.fault == kind]))
    shown.add_row("all", *(_cell([r for r in results if r.stage == s]) for s in STAGES), _cell(results))
    return shown


def _cell(results: list[Result]) -> str:
    counts = collections.Counter(result.outcome for result in results)
    passed, others = counts.pop(verdict.PASS, 0), sum(counts.values())
    named = "".join(f", {number} {outcome.lower()}" for outcome, number in counts.items())
    return f"{passed}/{passed + others}{named}" if results else "-"


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=200, help=f"how many; {len(PAIRS)} pairs of fault and stage")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others' follow")
    parser.add_argument("--case", type=int, help="try the case of this seed alone, and keep its folder")
    parser.add_argument("--out", type=Path, default=Path("runs/faults.jsonl"), help="a JSON line for each case")
    given = parser.parse_args()
    seeds = [given.case] if given.case is not None else range(given.seed, given.seed + given.cases)
    console, folder, results = Console(soft_wrap=True), Path(tempfile.mkdtemp(prefix="faults-")), []
    begun = time.monotonic()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        ground = Ground(folder)
        with given.out.open("w") as out, StageProgress(console, "cases", len(seeds)) as progress:
            for seed in seeds:
                result = ground.trial(seed)
                results.append(result)
                out.write(result.json() + "\n")
                out.flush()
                if result.failed() or given.case is not None:
                    progress.say(
                        f"{result.outcome}: {result.fault}, {result.stage}, {result.moment}: {result.problems}"
                    )
                progress.advance(title=f"cases ({result.fault}, {result.stage})")
    except KeyboardInterrupt:
        console.print("ctrl-c: what was tried so far")
    finally:
        FORKS.close()
    failed = [result for result in results if result.failed()]
    console.print(table(results))
    for result in failed:
        console.print(
            f"\n{result.outcome}: {result.fault}, {result.stage}, {result.moment}, exit codes {result.codes}",
            *(f"\n  {outcome}: {said}" for outcome, said in result.problems.items()),
            f"\n  again: python tests/faults/campaign.py --case {result.seed}",
            highlight=False,
            markup=False,
        )
    minutes = (time.monotonic() - begun) / 60
    console.print(f"\n{len(results)} cases in {minutes:.0f} minutes, {len(failed)} failures; {given.out}")
    if failed or given.case is not None:
        console.print(f"folders: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
