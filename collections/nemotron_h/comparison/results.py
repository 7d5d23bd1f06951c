"""Results of a comparison: gaps, noise and casts as JSON, and the short table. Imports no torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from nemotron_h.architecture.gemms import CAST_STATISTICS, OPERANDS
from nemotron_h.comparison.runs import Comparison
from nemotron_h.core.files import read_json
from nemotron_h.core.paired import Curve, read_losses, train_curve, validation_curve
from nemotron_h.core.units import short_count


class OverPairs(NamedTuple):
    """Mean of the last gaps of several pairs, with its standard error.

    The median is there because one pair whose runs learn something at different times moves the mean by more than FP8.
    """

    mean: float
    standard_error: float
    median: float


def over_pairs(curves: Sequence[Curve]) -> OverPairs:
    """Return the statistics over two pairs or more."""
    last = [curve.summary()["last"] for curve in curves]
    return OverPairs(statistics.mean(last), statistics.stdev(last) / len(last) ** 0.5, statistics.median(last))


@dataclass(frozen=True)
class Results:
    """The gaps of a comparison.

    Attributes:
        comparison: the runs.
        window: steps that training losses are smoothed over.
        train, validation: of each pair, that from the recipe's initial weights first; empty where nothing was
            validated.
        noise_train, noise_validation: the same of the reference against itself from other initial weights.
        missing: run -> steps whose training loss is not known, left out of the curves; see `gap.Losses`.
        casts: FP8 run of the pair -> rows of what its casts did; see `training.callbacks.cast_statistics`.
    """

    comparison: Comparison
    window: int
    train: list[Curve]
    validation: list[Curve]
    noise_train: list[Curve]
    noise_validation: list[Curve]
    casts: dict[str, list[dict[str, Any]]]
    missing: dict[str, tuple[int, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in plain containers."""
        made = self.comparison
        curves = {"train": self.train, "validation": self.validation}
        noise = {"train": self.noise_train, "validation": self.noise_validation}
        return {
            "recipe": made.recipe,
            "precision": made.precision,
            "against": made.against,
            "gap": f"({made.against} - {made.precision}) / {made.against}",
            "steps": made.steps,
            "tokens_per_step": made.tokens_per_step,
            "smoothing_steps": self.window,
            "runs": {run.name: str(run.folder) for run in made.runs},
            "pair": {kind: [{**c.summary(), **c.as_dict()} for c in found] for kind, found in curves.items()},
            "over_pairs": {kind: over_pairs(found)._asdict() for kind, found in curves.items() if len(found) > 1},
            "noise": {kind: [{**c.summary(), **c.as_dict()} for c in found] for kind, found in noise.items()},
            "missing_steps": {run: list(steps) for run, steps in self.missing.items()},
            "casts": self.casts,
        }

    def table(self) -> Table:
        """Return a table of the last and largest gap, of the pair and of the noise."""
        made = self.comparison
        tokens = short_count(made.steps * made.tokens_per_step)
        table = Table(
            box=None,
            padding=(0, 2, 0, 0),
            title_justify="left",
            title=f"{made.recipe}: relative loss gap over {made.steps:,} steps, {tokens} tokens",
        )
        table.add_column("(first - second) / first", no_wrap=True)
        for heading in ("loss", "last", "at tokens", "largest", "at tokens"):
            table.add_column(heading, justify="right", no_wrap=True)
        names = [f"{made.against}, {made.precision}", *(f"{a.name}, {b.name}" for a, b in made.paired[1:])]
        noise = [f"{made.against}, {run.name} (noise)" for run in made.others]
        smooth = f"train, mean of {self.window}" if self.window > 1 else "train"
        for loss, pairs, others in (
            (smooth, self.train, self.noise_train),
            ("validation", self.validation, self.noise_validation),
        ):
            for title, found in (*zip(names, pairs, strict=False), *zip(noise, others, strict=False)):
                s = found.summary()
                last, largest = short_count(s["last_at_tokens"]), short_count(s["largest_at_tokens"])
                table.add_row(title, loss, f"{s['last']:+.4%}", last, f"{s['largest']:+.4%}", largest)
            if len(pairs) > 1:
                over = over_pairs(pairs)
                last = f"{over.mean:+.4%} ± {over.standard_error:.4%}"
                table.add_row(f"mean of {len(pairs)} pairs, its standard error", loss, last, "", "", "")
                table.add_row(f"median of {len(pairs)} pairs", loss, f"{over.median:+.4%}", "", "", "")
        return table

    def missing_lines(self) -> list[str]:
        """Return a line for each run with steps that the curves leave out."""
        return [
            f"{run} has no loss of step {', '.join(map(str, steps))}: left out" for run, steps in self.missing.items()
        ]

    def cast_lines(self) -> list[str]:
        """Return the operands for which FP8 loses most, a line for each operand of an FP8 run."""
        lines = []
        for run, operand in itertools.product(self.casts, OPERANDS):
            rows = [row for row in self.casts[run] if row["operand"] == operand]
            worst = max(rows, key=lambda row: row["underflow"])
            saturated = max(rows, key=lambda row: row["saturation"])
            overflow = max(row["overflow"] for row in rows)
            lines.append(
                f"{run}, {operand} ({worst['format']}): at most {worst['underflow']:.3%} underflow{_place(worst)}, "
                f"{saturated['saturation']:.3%} saturated{_place(saturated)}, {overflow:.3%} overflow"
            )
        return lines


def read_casts(folder: Path) -> list[dict[str, Any]]:
    """Return what a run's processes measured, by step. NeMo moves earlier files to `run_0`, `run_1` and so on."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(folder.rglob(CAST_STATISTICS), key=lambda file: file.stat().st_mtime):
        rows = read_json(file)
        by_step |= {step: [row for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    return [row for _, rows in sorted(by_step.items()) for row in rows]


def _place(row: dict[str, Any]) -> str:
    return f" (layer {row['layer']} {row['product']}, step {row['step']:,})"


def results(comparison: Comparison, window: int) -> Results:
    """Read what the runs wrote.

    Args:
        comparison: its runs are finished.
        window: steps to smooth training losses over, at most the run's.
    Errors:
        UserError: losses are missing.
    """
    read = {run.name: read_losses(run.folder, comparison.steps) for run in comparison.runs}
    size = comparison.tokens_per_step

    def train(pairs: list[tuple[str, str]]) -> list[Curve]:
        return [train_curve(read[a], read[b], size, window) for a, b in pairs]

    def validation(pairs: list[tuple[str, str]]) -> list[Curve]:
        return [curve for a, b in pairs if (curve := validation_curve(read[a], read[b], size)) is not None]

    paired = [(a.name, b.name) for a, b in comparison.paired]
    others = [(paired[0][0], run.name) for run in comparison.others]
    casts = {run.name: read_casts(run.folder) for run in comparison.runs[:2]}
    return Results(
        comparison,
        window,
        train(paired),
        validation(paired),
        train(others),
        validation(others),
        {name: rows for name, rows in casts.items() if rows},
        {name: losses.missing for name, losses in read.items() if losses.missing},
    )
