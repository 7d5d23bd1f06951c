"""Write what a comparison came to: CSV, JSON, figure, page, and the table of a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from nemotron_h.core import plot
from nemotron_h.core.files import whole_file, write_csv, write_json
from nemotron_h.core.page import for_both, render
from nemotron_h.core.units import brief, duration
from nemotron_h.evaluation.coverage.measures import Crossing, Lead
from nemotron_h.evaluation.coverage.results import ALL, SAMPLES, SECONDS, Results, Tally

_TITLE = "Problems solved over seconds of each"
_PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}coverage: {{ models | join(", ") }}{% endblock %}
{% block head %}<h1>Coverage in equal time</h1>
<p class="note">{{ models | join(", ") }}; {{ setting }}</p>{% endblock %}
{% block main %}{{ facts(numbers) }}
{{ chart(title, note, svg) }}
{% for sentence in crossings %}<p>{{ sentence }}</p>{% endfor %}
<h2>By seconds of each problem</h2>{{ table(columns, by_seconds) }}
<h2>By samples of each problem</h2>{{ table(columns, by_samples) }}
<h2>Engine</h2>{{ table(engine_columns, engine) }}{% endblock %}
{% block foot %}Drawn by <code>nemotron-h coverage</code> from its samples.{% endblock %}
"""
_NOTE = (
    "A budget pays as many samples of a problem as its mean cost allows; a problem is solved if one of them is right. "
    "Bands: 95 % of a bootstrap over problems."
)
_HEADINGS = ("model", "task", "at", "samples", "coverage", "95 %", "majority", "95 %", "best of n", "95 %")
_ENGINE = ("model", "batch", "samples", "tokens each", "seconds each", "tokens/s", "ended by")


@plot.styled
def draw(results: Results, width: int, height: int) -> Figure:
    """Plot coverage over seconds, a line with its band for each model.

    Args:
        width, height: in CSS pixels.
    """
    figure, axes = plot.canvas(width, height)
    for (name, curve), colour in zip(results.curves.items(), plot.colours(len(results.curves)), strict=True):
        marker = "o" if len(curve.budgets) == 1 else None
        axes.plot(curve.budgets, curve.mean, color=colour, label=name, marker=marker)
        axes.fill_between(curve.budgets, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log")
    ticks = sorted({row["at"] for row in results.rows if row["by"] == SECONDS})
    axes.set_xticks(ticks if len(ticks) < 12 else ticks[:: len(ticks) // 8])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="seconds of each problem", ylabel="share of problems solved", ylim=(0, None))
    axes.legend(loc="best")
    return figure


def _engine(tally: Tally) -> list[str]:
    drawn = int(tally.drawn.sum())
    ends = ", ".join(f"{end} {count / drawn:.0%}" for end, count in sorted(tally.ended_by.items()))
    return [
        tally.name,
        f"{tally.batch:,}",
        f"{drawn:,}",
        f"{tally.tokens / drawn:,.1f}",
        f"{tally.seconds / drawn:.3g}",
        f"{tally.tokens / tally.seconds:,.0f}",
        ends,
    ]


def _line(row: dict[str, Any]) -> list[str]:
    least = "≥ " * row["lower_bound"]
    at = f"{row['at']:g} s" if row["by"] == SECONDS else f"{row['at']:,}"
    cells = [row["model"], row["task"], at, f"{least}{row['samples']:,.1f}"]
    for measure in ("coverage", "majority", "best_of"):
        mark = least if measure == "coverage" else ""
        interval = f"{row[f'{measure}_low']:.3f} - {row[f'{measure}_high']:.3f}"
        cells += [f"{mark}{row[measure]:.3f}", interval]
    return cells


def _lead(one: str, other: str, lead: Lead) -> str:
    if not lead.difference:
        return f"at {lead.seconds:g} s both solve as many"
    ahead, sign = (one, 1) if lead.difference > 0 else (other, -1)
    low, high = sorted((sign * lead.low, sign * lead.high))
    return f"at {lead.seconds:g} s {ahead} solves {sign * lead.difference:.3f} more ({low:.3f} to {high:.3f})"


def crossing_text(one: str, other: str, crossing: Crossing | None) -> str:
    """Return what is to be said of two models, a sentence."""
    if crossing is None:
        return f"{one}, {other}: there are samples for less than two budgets of both, so nothing is said of a crossing."
    if crossing.seconds is None:
        said = "no crossing"
    else:
        more = f", the last of {crossing.changes} changes of the lead" if crossing.changes > 1 else ""
        said = f"crossing at {crossing.seconds:.3g} s{more}"
    return f"{one}, {other}: {said}; {_lead(one, other, crossing.first)}, {_lead(one, other, crossing.last)}."


def tables(results: Results) -> list[Table]:
    """Return the tables of a terminal: over all problems by seconds, and the engine."""
    grids = []
    for headings, lines, left in (
        (_HEADINGS, [_line(row) for row in results.rows if row["by"] == SECONDS and row["task"] == ALL], 2),
        (_ENGINE, [_engine(tally) for tally in results.tallies], 1),
    ):
        grids.append(Table(box=None, padding=(0, 2, 0, 0)))
        for number, heading in enumerate(headings):
            grids[-1].add_column(heading, justify="left" if number < left else "right", no_wrap=True)
        for line in lines:
            grids[-1].add_row(*line)
    return grids


def sentences(results: Results) -> list[str]:
    """Return what is to be said of each pair of models."""
    return [crossing_text(*pair, crossing) for pair, crossing in results.crossings.items()]


def write(results: Results, settings: dict[str, Any], setting: str, folder: Path) -> list[Path]:
    """Write `coverage.csv`, `.json`, `.svg` and `report.html`, and return them.

    Args:
        settings: of all models, for the JSON.
        setting: the same in words, for the page.
    """
    files = [folder / name for name in ("coverage.csv", "coverage.json", "coverage.svg", "report.html")]
    write_csv(results.rows, files[0])
    crossings = [
        {"models": list(pair), **({} if crossing is None else dataclasses.asdict(crossing))}
        for pair, crossing in results.crossings.items()
    ]
    engine = [dict(zip(_ENGINE, _engine(tally), strict=True)) for tally in results.tallies]
    write_json(files[1], {"settings": settings, "engine": engine, "rows": results.rows, "crossings": crossings})
    plot.save(draw(results, 720, 400), files[2], _TITLE)
    with whole_file(files[3]) as temporary:
        temporary.write_text(_html(results, setting), encoding="utf-8")
    return files


def _html(results: Results, setting: str) -> str:
    names = [tally.name for tally in results.tallies]
    problems = len(results.tallies[0].drawn)
    numbers = [
        ("problems", f"{problems:,}", ""),
        ("samples", f"{sum(int(tally.drawn.sum()) for tally in results.tallies):,}", "all models"),
        ("engine", duration(sum(tally.seconds for tally in results.tallies)), "prefill and steps, all models"),
        *((tally.name, brief(tally.seconds / tally.drawn.sum()), "a sample") for tally in results.tallies),
    ]
    return render(
        _PAGE,
        models=names,
        setting=setting,
        numbers=numbers,
        title=_TITLE,
        note=_NOTE,
        svg=for_both(lambda width, height: draw(results, width, height), _TITLE),
        crossings=sentences(results),
        columns=_columns(_HEADINGS, 2),
        by_seconds=[_line(row) for row in results.rows if row["by"] == SECONDS],
        by_samples=[_line(row) for row in results.rows if row["by"] == SAMPLES],
        engine_columns=_columns(_ENGINE, 1),
        engine=[_engine(tally) for tally in results.tallies],
    )


def _columns(headings: Sequence[str], left: int) -> list[tuple[str, str]]:
    return [(heading, "n" if number >= left else "") for number, heading in enumerate(headings)]
