"""All cases that were ever tried, in `ledger.json`: how many of each stage and fault ended how, and what failed.

`python tests/faults/ledger.py` writes the tables of `docs/faults.md` from it, as a campaign does at its end.
"""

from __future__ import annotations

import collections
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import verdict
from cases import KINDS
from stages import STAGES
from trial import Result

from nemotron_h.core.files import read_json_object, write_json

FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
#: between these the page is written
BEGIN, END = "<!-- cases: written by tests/faults/ledger.py -->\n", "<!-- end of cases -->\n"


def commit() -> str:
    """Return the commit that is tried, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    library = ["--", ":/collections", ":/configs", ":/recipes"]
    changed = subprocess.run([*git, "status", "--porcelain", *library], capture_output=True, text=True, check=False)
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout else "")


class Ledger:
    """Counts of all campaigns.

    Attributes:
        campaigns: day, commit, cases, failures, seconds and processes of each.
        counts: stage -> kind -> outcome -> how many.
        failures: case -> outcome, what was said, at which commit, and `passes_at` where it was tried again and passed.
        chaos: day, commit, command, points and verdicts of each time that ckpt-chaos judged.
    """

    def __init__(self, file: Path = FILE) -> None:
        content = read_json_object(file) if file.is_file() else {}
        self.file = file
        self.campaigns: list[dict[str, Any]] = content.get("campaigns", [])
        self.counts: dict[str, dict[str, dict[str, int]]] = content.get("counts", {})
        self.failures: dict[str, dict[str, str]] = content.get("failures", {})
        self.chaos: list[dict[str, Any]] = content.get("chaos", [])

    def tried(self) -> dict[tuple[str, str], int]:
        """Return (stage, kind) -> how many cases were tried."""
        pairs = [(stage, kind) for stage, kinds in self.counts.items() for kind in kinds]
        return {(stage, kind): sum(self.counts[stage][kind].values()) for stage, kind in pairs}

    def begin(self, commit: str, jobs: int) -> None:
        """Begin a campaign."""
        day = time.strftime("%Y-%m-%d")
        self.campaigns.append({"day": day, "commit": commit, "cases": 0, "failed": 0, "seconds": 0, "jobs": jobs})

    def add(self, result: Result, seconds: float) -> None:
        """Count a case, `seconds` after the campaign began, and write the file."""
        stage, kind = result.pair
        outcomes = self.counts.setdefault(stage, {}).setdefault(kind, {})
        outcomes[result.outcome] = outcomes.get(result.outcome, 0) + 1
        campaign = self.campaigns[-1]
        campaign["cases"] += 1
        campaign["failed"] += result.failed()
        campaign["seconds"] = round(seconds)
        if result.failed():
            said = result.problems[result.outcome][:300]
            self.failures[result.case] = {"outcome": result.outcome, "said": said, "commit": campaign["commit"]}
        self.save()

    def again(self, result: Result, commit: str) -> None:
        """Note that a case which failed passes now."""
        if result.case in self.failures and result.outcome == verdict.PASS:
            self.failures[result.case]["passes_at"] = commit
            self.save()

    def save(self) -> None:
        """Write the file."""
        order = {name: place for place, name in enumerate([*STAGES, *KINDS])}
        counts = {
            stage: {kind: dict(sorted(kinds[kind].items())) for kind in sorted(kinds, key=order.get)}
            for stage, kinds in sorted(self.counts.items(), key=lambda item: order[item[0]])
        }
        failures = dict(sorted(self.failures.items()))
        parts = {"campaigns": self.campaigns, "counts": counts, "failures": failures, "chaos": self.chaos}
        write_json(self.file, parts)

    def cell(self, has: Callable[[str, str], bool]) -> str:
        """Return "passed/tried" over the pairs of stage and kind that a function has; "-" where none was tried."""
        total: collections.Counter[str] = collections.Counter()
        for stage, kinds in self.counts.items():
            for kind, outcomes in kinds.items():
                if has(stage, kind):
                    total.update(outcomes)
        tried = sum(total.values()) - total[verdict.SKIPPED]
        return f"{total[verdict.PASS] + total[verdict.MISSED]}/{tried}" if tried else "-"

    def page(self) -> str:
        """Return the part of the page: campaigns, the table, failures."""
        stages = list(STAGES)
        rows = [["fault", *(stage.replace("_", " ") for stage in stages), "all"], ["---"] * (len(stages) + 2)]
        for kind, title in KINDS.items():
            cells = [self.cell(lambda s, k, stage=stage, kind=kind: (s, k) == (stage, kind)) for stage in stages]
            rows.append([title, *cells, self.cell(lambda s, k, kind=kind: k == kind)])
        cells = [self.cell(lambda s, k, stage=stage: s == stage) for stage in stages]
        rows.append(["all", *cells, self.cell(lambda s, k: True)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", "| day | commit | cases | failed | minutes | processes |", "|---|---|---|---|---|---|"]
        for each in (each for each in self.campaigns if each["cases"]):
            minutes = round(each["seconds"] / 60)
            values = (each["day"], each["commit"], each["cases"], each["failed"], minutes, each["jobs"])
            lines.append("| " + " | ".join(map(str, values)) + " |")
        if self.failures:
            lines += ["", "| case that failed | outcome | at | passes at |", "|---|---|---|---|"]
        for case, failure in sorted(self.failures.items()):
            passes = failure.get("passes_at", "-")
            lines.append(f"| {case} | {failure['outcome'].lower()} | {failure['commit']} | {passes} |")
        lines += ["", "| ckpt-chaos | day | commit | points | verdicts |", "|---|---|---|---|---|"]
        for each in self.chaos:
            verdicts = ", ".join(f"{number} {name}" for name, number in sorted(each["verdicts"].items()))
            values = (f"`{each['command']}`", each["day"], each["commit"], each["points"], verdicts)
            lines.append("| " + " | ".join(map(str, values)) + " |")
        return "\n".join(lines) + "\n"


def write_page(ledger: Ledger) -> str:
    """Write the page's part anew; return the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    page = before + BEGIN + "\n" + ledger.page() + "\n" + END + rest.split(END)[1]
    PAGE.write_text(page)
    return page


if __name__ == "__main__":
    write_page(Ledger())
