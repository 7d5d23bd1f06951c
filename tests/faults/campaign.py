"""Disturb small runs at random moments, give the same command again, and compare with undisturbed runs.

`campaign.py --cases N` tries N cases that were never tried, of the pairs of stage and fault with the fewest first, and
adds them to `ledger.json` and `docs/faults.md`; `--case STAGE/FAULT/NUMBER` tries one again, `--failed` all that failed
and have not passed since. Prints each failure with its command; exit code 1 where there are any.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

import verdict
from cases import KINDS, PAIRS, next_cases
from ledger import FILE, Ledger, commit, write_page
from trial import FORKS, Ground, Result

from nemotron_h.core.progress import StageProgress

_GROUNDS: list[Ground] = []


def _prepare(folder: Path) -> None:
    _GROUNDS.append(Ground(Path(tempfile.mkdtemp(dir=folder))))


def _trial(case: str) -> Result:
    return _GROUNDS[0].trial(case)


def results(cases: Sequence[str], jobs: int, folder: Path) -> Iterator[Result]:
    """Try cases, some at a time, each process in a folder of its own; results come as they are ready."""
    if jobs == 1:
        _prepare(folder)
        yield from map(_trial, cases)
        return
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, start, _prepare, (folder,)) as pool:
        tried = [pool.submit(_trial, case) for case in cases]
        try:
            yield from (each.result() for each in concurrent.futures.as_completed(tried))
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> int:
    """Run a campaign."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=200, help=f"how many; there are {len(PAIRS)} pairs")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time; a core and 2 GB each")
    parser.add_argument(
        "--outside", action="store_true", help="the installed `nemo` in a process of its own, half a minute a case"
    )
    parser.add_argument("--case", nargs="+", metavar="STAGE/FAULT/NUMBER", help="try these, keep their folders")
    parser.add_argument("--failed", action="store_true", help="try again what failed and has not passed since")
    parser.add_argument("--ledger", type=Path, default=FILE, help="counts of all campaigns")
    parser.add_argument("--out", type=Path, default=Path("runs/faults.jsonl"), help="a JSON line for each case")
    given = parser.parse_args()
    ledger, head = Ledger(given.ledger), commit()
    failed_before = [case for case, failure in ledger.failures.items() if "passes_at" not in failure]
    again = failed_before if given.failed else given.case or []
    cases = again or ([] if given.failed else next_cases(given.cases, ledger.tried(), given.outside))
    console, folder, failed = Console(soft_wrap=True, highlight=False), Path(tempfile.mkdtemp(prefix="faults-")), []
    begun, outcomes = time.monotonic(), dict.fromkeys((verdict.PASS, verdict.MISSED, verdict.SKIPPED), 0)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if not again:
        ledger.begin(head, given.jobs)
    try:
        with given.out.open("a") as out, StageProgress(console, "cases", len(cases)) as progress:
            for result in results(cases, given.jobs, folder):
                out.write(result.json() + "\n")
                out.flush()
                if again:
                    ledger.again(result, head)
                else:
                    ledger.add(result, time.monotonic() - begun)
                outcomes[result.outcome] = outcomes.get(result.outcome, 0) + 1
                if result.failed():
                    failed.append(result)
                if result.failed() or given.case:
                    progress.say(f"{result.outcome}: {result.line()}")
                progress.advance(title=f"cases ({KINDS[result.pair[1]]}, {result.pair[0]})")
    except KeyboardInterrupt:
        console.print("ctrl-c: what was tried so far is counted; the same command tries others")
    finally:
        FORKS.close()
    if given.ledger == FILE:
        write_page(ledger)
    for result in failed if not given.case else ():
        console.print(f"\n{result.line()}\n  again: python tests/faults/campaign.py --case {result.case}", markup=False)
    minutes = (time.monotonic() - begun) / 60
    counted = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items() if number)
    console.print(f"\n{sum(outcomes.values())} cases in {minutes:.1f} minutes: {counted}; {given.out}")
    if failed or given.case:
        console.print(f"folders: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
