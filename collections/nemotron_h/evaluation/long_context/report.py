"""Write what long-context tasks came to: CSV, JSON, figures, page, and the table of a terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from rich.table import Table

from nemotron_h.core import plot
from nemotron_h.core.files import whole_file, write_csv, write_json
from nemotron_h.core.page import for_both, inline, render
from nemotron_h.evaluation.long_context.results import DEPTHS, EFFECTIVE, MEAN, Results

_LINES, _MAPS = "Score over length", "Score by length and depth of the answer"
_NOTE = "Mean over tasks, in percent. Bars: one standard error to each side."
_MAP_NOTE = "Percent of the answers that were found, by where in the haystack they stand: 0 is its begin."
_PAGE = """{% extends "page" %}{% from "parts" import facts, table, chart %}
{% block title %}long context: {{ models | join(", ") }}{% endblock %}
{% block head %}<h1>Long context</h1><p class="note">{{ models | join(", ") }}; {{ setting }}</p>{% endblock %}
{% block main %}
{% for remark in remarks %}<p>{{ remark }}</p>{% endfor %}
{{ chart(lines, note, line_svg) }}
<h2>Scores</h2>{{ table(columns, rows) }}
{% if map_svg %}<h2>{{ maps }}</h2>{{ chart(maps, map_note, map_svg) }}{% endif %}{% endblock %}
{% block foot %}Drawn by <code>nemotron-h ruler</code> from its answers.{% endblock %}
"""
#: ours: opacity of a score of 100; text on it stays legible in both schemes
_FULL = 0.6
#: of a heat map, in CSS pixels: a row of panels, a column of cells, all around
_ROW, _CELL, _AROUND = 230, 46, 120


@plot.styled
def draw_lines(results: Results, width: int, height: int) -> Figure:
    """Plot scores over length, a line for each model: the mean over tasks, or the one task's.

    Args:
        width, height: in CSS pixels.
    """
    figure, axes = plot.canvas(width, height)
    task = MEAN if len(results.tasks) > 1 else results.tasks[0]
    for model, colour in zip(results.models, plot.colours(len(results.models)), strict=True):
        rows = [row for row in results.rows if (row["model"], row["task"]) == (model, task)]
        axes.errorbar(
            [row["length"] for row in rows],
            [row["score"] for row in rows],
            [row["standard_error"] or 0 for row in rows],
            color=colour,
            label=model,
            marker="o",
            markersize=4,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="tokens of prompt and answer", ylabel="score, %", ylim=(-3, 103))
    axes.legend(loc="best")
    return figure


@plot.styled
def draw_maps(results: Results, width: int | None = None) -> Figure:
    """Plot scores over lengths and depths: a row of panels for each task, a column for each model.

    Args:
        width: in CSS pixels; None is what the cells need.
    """
    tasks = list(dict.fromkeys(row["task"] for row in results.depths))
    need = _AROUND + len(results.models) * (30 + _CELL * len(results.lengths))
    figure, grid = plot.canvas(
        width or need, 50 + _ROW * len(tasks), len(tasks), len(results.models), squeeze=False, sharex=True, sharey=True
    )
    column = {length: number for number, length in enumerate(results.lengths)}
    for line, task in enumerate(tasks):
        for place, model in enumerate(results.models):
            axes = grid[line, place]
            for row in results.depths:
                if (row["model"], row["task"]) == (model, task):
                    left, top = column[row["length"]], round(DEPTHS * row["from"])
                    cell = Rectangle((left, top), 1, 1, facecolor=plot.SERIES[0], alpha=_FULL * row["score"] / 100)
                    axes.add_patch(cell)
                    axes.text(left + 0.5, top + 0.5, f"{row['score']:.0f}", ha="center", va="center", fontsize=8)
            axes.grid(False)
            axes.set(xlim=(0, len(column)), ylim=(DEPTHS, 0))
            axes.set_xticks([number + 0.5 for number in column.values()], [f"{length:,}" for length in column])
            axes.set_yticks(range(0, DEPTHS + 1, 2), [f"{tick / DEPTHS:g}" for tick in range(0, DEPTHS + 1, 2)])
            axes.set_title(model if line == 0 else "")
            axes.set_xlabel("tokens" if line == len(tasks) - 1 else "")
            axes.set_ylabel(f"{task}\ndepth" if place == 0 else "")
    return figure


def cells(results: Results) -> list[list[str]]:
    """Return a line for each model and task: both, then the score at each length with its standard error."""
    lines = []
    for model in results.models:
        for task in [*results.tasks, MEAN][: len(results.tasks) + (len(results.tasks) > 1)]:
            at = {row["length"]: row for row in results.rows if (row["model"], row["task"]) == (model, task)}
            lines.append([model, task, *(_score(at.get(length)) for length in results.lengths)])
    return lines


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    error = row["standard_error"]
    return f"{row['score']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def headings(results: Results) -> list[str]:
    """Return the headings of `cells`."""
    return ["model", "task", *(f"{length:,}" for length in results.lengths)]


def table(results: Results) -> Table:
    """Return the table of a terminal."""
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings(results)):
        grid.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for line in cells(results):
        grid.add_row(*line)
    return grid


def remarks(results: Results) -> list[str]:
    """Return sentences on what scores can be compared with, and on effective lengths."""
    said = [f"Not comparable with published scores: {'; '.join(results.remarks)}."] if results.remarks else []
    for model in results.models:
        if (length := results.effective(model)) is not None:
            reached = f"{length:,} tokens" if length else "below the shortest length"
            said.append(f"{model}: effective length {reached} (mean of RULER's tasks of {EFFECTIVE} or more).")
    return said


def write(results: Results, settings: dict[str, Any], setting: str, folder: Path) -> list[Path]:
    """Write `ruler.csv`, `.json`, `.svg` and `report.html`, where answers have depths `depths.csv` and `.svg` too.

    Args:
        settings: of all models, for the JSON.
        setting: the same in words, for the page.
    """
    files = [folder / name for name in ("ruler.csv", "ruler.json", "ruler.svg", "report.html")]
    write_csv(results.rows, files[0])
    write_json(files[1], {"settings": settings, **dataclasses.asdict(results)})
    plot.save(draw_lines(results, 720, 400), files[2], _LINES)
    with whole_file(files[3]) as temporary:
        temporary.write_text(_html(results, setting), encoding="utf-8")
    maps = [folder / name for name in ("depths.csv", "depths.svg")]
    if not results.depths:
        for stale in maps:  # of other tasks
            stale.unlink(missing_ok=True)
        return files
    write_csv(results.depths, maps[0])
    plot.save(draw_maps(results), maps[1], _MAPS)
    return [*files, *maps]


def _html(results: Results, setting: str) -> str:
    return render(
        _PAGE,
        models=results.models,
        setting=setting,
        remarks=remarks(results),
        lines=_LINES,
        note=_NOTE,
        line_svg=for_both(lambda width, height: draw_lines(results, width, height), _LINES),
        columns=[(heading, "n" if number > 1 else "") for number, heading in enumerate(headings(results))],
        rows=cells(results),
        maps=_MAPS,
        map_note=_MAP_NOTE,
        map_svg=inline(draw_maps(results, 1040), _MAPS) if results.depths else "",
    )
