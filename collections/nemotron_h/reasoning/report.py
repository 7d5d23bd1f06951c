"""Write what rounds came to: a table and a figure by round, with intervals of a bootstrap over the test problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemotron_h.core import plot
from nemotron_h.core.files import whole_file, write_csv
from nemotron_h.core.page import for_both, render
from nemotron_h.evaluation.coverage.measures import interval, resamples
from nemotron_h.schema.recipe import RecipeConfig

FILES = ("report.html", "rounds.csv", "rounds.svg")
MEASURES = ("pass_1", "pass_k", "majority")
_TITLE = "Test problems solved, by round"
_NOTE = "Bands: 95 % of a bootstrap over the test problems."
_PAGE = """{% extends "page" %}{% from "parts" import table, chart %}
{% block title %}rounds: {{ name }}{% endblock %}
{% block head %}<h1>{{ name }}</h1><p class="note">{{ setting }}</p>{% endblock %}
{% block main %}{{ chart(title, note, svg) }}
{% if ended %}<p>The rounds {{ ended }}.</p>{% endif %}
<h2>By round</h2>{{ table(columns, rows) }}
<p class="note">Gains are over round 0, of the same problems: an interval that contains 0 says that they are too few to
tell. Right samples are those of the training problems, before the round's training.</p>{% endblock %}
{% block foot %}Drawn by <code>nemotron-h reason</code>.{% endblock %}
"""


def write(folder: Path, recipe: RecipeConfig, read: Callable[..., Any]) -> str:
    """Write the report into a folder, and return what it comes to.

    Args:
        read: returns a JSON output of a stage: of its name, and of the file where it is not the results.
    """
    rows, ended = rows_of(recipe, read)
    write_csv(rows, folder / "rounds.csv")
    labels = {"pass_1": "pass@1", "pass_k": f"pass@{recipe.reason.samples}", "majority": "majority"}
    plot.save(draw(rows, labels, 720, 400), folder / "rounds.svg", _TITLE)
    part, loss = recipe.reason, recipe.preference
    setting = (
        f"{part.samples} samples of each problem at temperature {part.temperature:g}, {loss.loss} with beta "
        f"{loss.beta:g}, {recipe.tokens} tokens a round"
    )
    with whole_file(folder / "report.html") as temporary:
        page = render(
            _PAGE,
            name=recipe.name,
            setting=setting,
            title=_TITLE,
            note=_NOTE,
            svg=for_both(lambda width, height: draw(rows, labels, width, height), _TITLE),
            ended=ended,
            columns=_columns(labels),
            rows=[_line(row) for row in rows],
        )
        temporary.write_text(page, encoding="utf-8")
    first, last = rows[0], rows[-1]
    gain = f"{last['gain']:+.3f} ({last['gain_low']:+.3f} to {last['gain_high']:+.3f})"
    return f"pass@1 {first['pass_1']:.3f} -> {last['pass_1']:.3f} in {len(rows) - 1} rounds, {gain}" + (
        f"; {ended}" if ended else ""
    )


def rows_of(recipe: RecipeConfig, read: Callable[..., Any]) -> tuple[list[dict[str, Any]], str]:
    """Return a row for each round that was trained, the start first, and why the rounds ended before the last."""
    rows: list[dict[str, Any]] = []
    start: np.ndarray | None = None
    for number in range(recipe.reason.rounds + 1):
        measured = read(f"measure-{number}")
        if measured["ended"]:
            return rows, measured["ended"]
        values = {name: np.array(measured["values"][name]) for name in MEASURES}
        start = values["pass_1"] if start is None else start
        drawn = resamples(len(start), recipe.data.seed)
        row: dict[str, Any] = {"round": number, "problems": len(start)}
        for name, each in values.items():
            low, high = interval(each, drawn)
            row |= {name: float(each.mean()), f"{name}_low": low, f"{name}_high": high}
        low, high = interval(values["pass_1"] - start, drawn)
        row |= {"gain": float((values["pass_1"] - start).mean()), "gain_low": low, "gain_high": high}
        pairs = read(f"pairs-{number}", "summary.json") if number else {}
        row |= {"tokens": measured["tokens"], "pairs": pairs.get("pairs", ""), "right_samples": pairs.get("right", "")}
        rows.append(row)
    return rows, ""


@plot.styled
def draw(rows: Sequence[dict[str, Any]], labels: dict[str, str], width: int, height: int) -> Figure:
    """Plot each measure over rounds, with its band.

    Args:
        labels: of the measures.
        width, height: in CSS pixels.
    """
    figure, axes = plot.canvas(width, height)
    rounds = [row["round"] for row in rows]
    for name, colour in zip(MEASURES, plot.colours(len(MEASURES)), strict=True):
        axes.plot(rounds, [row[name] for row in rows], color=colour, marker="o", label=labels[name])
        low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(rounds, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round", ylabel="share of test problems solved", ylim=(0, None))
    axes.legend(loc="best")
    return figure


def _columns(labels: dict[str, str]) -> list[tuple[str, str]]:
    measured = [heading for name in MEASURES for heading in (labels[name], "95 %")]
    return [(heading, "n") for heading in ("round", "pairs", "right samples", *measured, "gain", "95 %", "tokens each")]


def _line(row: dict[str, Any]) -> list[str]:
    drawn = [f"{row['pairs']:,}", f"{row['right_samples']:.1%}"] if row["round"] else ["", ""]
    cells = []
    for name in MEASURES:
        cells += [f"{row[name]:.3f}", f"{row[f'{name}_low']:.3f} - {row[f'{name}_high']:.3f}"]
    gain = [f"{row['gain']:+.3f}", f"{row['gain_low']:+.3f} - {row['gain_high']:+.3f}"]
    return [str(row["round"]), *drawn, *cells, *gain, f"{row['tokens']:,.1f}"]
