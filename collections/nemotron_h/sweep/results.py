"""Write what a sweep came to: `sweep.csv`, the table, figures, fits and `report.html`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from nemotron_h.core import plot
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file, write_csv
from nemotron_h.core.page import for_both, render
from nemotron_h.core.units import duration, short_count
from nemotron_h.sweep.figures import draw, title_of
from nemotron_h.sweep.file import SweepFile
from nemotron_h.sweep.fits import fitted
from nemotron_h.sweep.points import Point, folder_of
from nemotron_h.sweep.rows import Row, groups, row_of, spread

CSV, REPORT = "sweep.csv", "report.html"
_PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}{{ name }}: {{ state }}{% endblock %}
{% block head %}<h1>{{ name }}</h1><p><span class="state {{ state }}">{{ state }}</span></p>
<p class="note">{{ recipe }}; means over seeds, with one standard deviation</p>{% endblock %}
{% block main %}{{ facts(numbers) }}
{% for title, svg in figures %}<h2>{{ title }}</h2>{{ chart(title, "", svg) }}{% endfor %}
<h2>Means</h2>{{ table(mean_columns, means) }}
{% if fits %}<h2>Fits</h2>{% for title, text in fits %}<p class="note">{{ title }}</p><pre tabindex="0">{{ text }}</pre>
{% endfor %}{% endif %}
<h2>Runs</h2>{{ table(columns, rows) }}{% endblock %}
{% block foot %}Drawn by <code>nemotron-h sweep {{ file }}</code> from its runs.{% endblock %}
"""


class Results(NamedTuple):
    """Rows of all points, what the fits say or why they could not, and the files that were written."""

    rows: list[Row]
    fits: list[tuple[str, str]]
    files: list[Path]


def write_rows(points: Sequence[Point]) -> list[Row]:
    """Write `sweep.csv` as far as the runs are, and return its rows."""
    rows = [row_of(point) for point in points]
    write_csv(rows, folder_of(points) / CSV)
    return rows


def write(sweep: SweepFile, points: Sequence[Point]) -> Results:
    """Write table, figures and report of the points that are finished.

    Errors:
        UserError: a file cannot be read or written.
    """
    rows, folder = write_rows(points), folder_of(points)
    there = [(point, row) for point, row in zip(points, rows, strict=True) if row["state"] == "finished"]
    files, figures, fits = [folder / CSV], [], []
    if there:
        done, finished = zip(*there, strict=True)
        for number, figure in enumerate(sweep.schema.figures, 1):
            files.append(folder / f"figure-{number}.svg")
            title = f"{sweep.name}: {title_of(figure)}"
            plot.save(draw(figure, finished, 720, 400, done), files[-1], title)
            svg = for_both(lambda w, h, f=figure: draw(f, finished, w, h, done), title)
            figures.append((title_of(figure), svg))
        for fit in sweep.schema.fits:
            try:
                fits += [(title, str(result)) for title, result in fitted(fit, list(finished))]
            except UserError as error:
                fits.append((fit.name, f"not fitted: {error}"))
    files.append(folder / REPORT)
    with whole_file(files[-1]) as temporary:
        temporary.write_text(_html(sweep, points, rows, figures, fits), encoding="utf-8")
    return Results(rows, fits, files)


def _means(points: Sequence[Point], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of means; columns that no row has are left out."""
    losses = [key for key in ("train_loss", "validation_loss") if any(row.get(key) is not None for row in rows)]
    axes = list(dict.fromkeys(axis for labels, _ in groups(points, rows) for axis in labels))
    headings = [*axes, "parameters", "tokens", "FLOPs", "runs", *(key.replace("_", " ") for key in losses), "seconds"]
    lines = []
    for labels, members in groups(points, rows):
        done = [row for row in members if row["state"] == "finished"]
        sizes = [short_count(members[0]["parameters"]), short_count(members[0]["tokens"]), f"{members[0]['flops']:.3g}"]
        means = [str(spread(row[key] for row in done) or "-") for key in losses]
        seconds = spread(row["seconds"] for row in done)
        runs = str(len(done)) if len(done) == len(members) else f"{len(done)} of {len(members)}"
        shown = [str(labels.get(axis, "")) for axis in axes]
        lines.append([*shown, *sizes, runs, *means, f"{seconds.mean:,.0f}" if seconds else "-"])
    return headings, lines


def table(sweep: SweepFile, points: Sequence[Point], rows: Sequence[Row]) -> Table:
    """Return the table of means over seeds."""
    headings, lines = _means(points, rows)
    grid = Table(box=None, padding=(0, 2, 0, 0), title=f"{sweep.name}: mean ± standard deviation", title_justify="left")
    labels = len(headings) - headings[::-1].index("parameters") - 1
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if number < labels else "right", no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    return grid


def _html(
    sweep: SweepFile, points: Sequence[Point], rows: Sequence[Row], figures: list[tuple[str, Any]], fits: list[tuple]
) -> str:
    headings, means = _means(points, rows)
    done = [row for row in rows if row["state"] == "finished"]
    seconds = sum(row["seconds"] for row in done)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return render(
        _PAGE,
        name=sweep.name,
        recipe=sweep.schema.recipe,
        file=shlex.quote(str(sweep.path)),
        state="finished" if len(done) == len(rows) else "stopped",
        numbers=[
            ("runs", f"{len(done)} of {len(rows)}", ""),
            ("tokens", short_count(sum(row["tokens"] for row in done)) if done else "0", "all runs"),
            ("FLOPs", f"{sum(row['flops'] for row in done):.3g}", "all runs"),
            ("time", duration(seconds), "all runs, one after the other"),
        ],
        figures=figures,
        mean_columns=[
            (heading, "n" if number >= len(points[0].labels) else "") for number, heading in enumerate(headings)
        ],
        means=means,
        fits=fits,
        columns=[(column, "wide" if column == "folder" else "") for column in columns],
        rows=[[_cell(row.get(column)) for column in columns] for row in rows],
    )


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
