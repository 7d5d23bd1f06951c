"""Figures of a sweep: means over seeds with their spread, and losses over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nemotron_h.core import plot
from nemotron_h.core.strict import nearest
from nemotron_h.report.run import read_run
from nemotron_h.schema.sweep import AXES, MEASURED, TOKENS_SEEN, FigureSchema
from nemotron_h.sweep.points import Point, planned_row
from nemotron_h.sweep.rows import Row, Spread, spread

_NAMES = {
    "loss": "loss per token, nats",
    "train_loss": "training loss per token, nats",
    "validation_loss": "validation loss per token, nats",
    TOKENS_SEEN: "tokens",
    "flops": "FLOPs",
}
_LOSSES = ("loss", "train_loss", "validation_loss")


def problems(figures: Sequence[FigureSchema], points: Sequence[Point]) -> list[str]:
    """Return what is wrong with the figures of a sweep."""
    columns = {key: None for point in points for key in planned_row(point)} | dict.fromkeys(MEASURED)
    said = []
    for number, figure in enumerate(figures):
        where = f"figures[{number}]"
        for name, key in (("x", figure.x), ("y", figure.y), ("line", figure.line)):
            if key is not None and key not in columns and (name, key) != ("x", TOKENS_SEEN):
                said.append(
                    f"{where}.{name} = {key!r} is no column. {nearest(key, columns)}Columns: {', '.join(columns)}"
                )
        if figure.x == TOKENS_SEEN and figure.y not in _LOSSES:
            said.append(f"{where}.y = {figure.y!r} over {TOKENS_SEEN}: one of {', '.join(_LOSSES)}")
        if figure.y not in MEASURED:
            said.append(f"{where}.y = {figure.y!r} is no number that is measured: {', '.join(MEASURED)}")
        said += [f"{where}.log has {axis!r}: x, y" for axis in figure.log if axis not in AXES]
    return said


def title_of(figure: FigureSchema) -> str:
    """Return the title of a figure."""
    return figure.title or f"{figure.y} over {figure.x}" + (f", by {figure.line}" if figure.line else "")


@plot.styled
def draw(figure: FigureSchema, rows: Sequence[Row], width: int, height: int, points: Sequence[Point]) -> Figure:
    """Plot a figure of finished rows.

    Args:
        width, height: in CSS pixels.
        points: of the rows.
    """
    canvas, axes = plot.canvas(width, height)
    values = list(dict.fromkeys(row.get(figure.line) for row in rows)) if figure.line else [None]
    for value, colour in zip(values, plot.colours(len(values)), strict=True):
        chosen = [number for number, row in enumerate(rows) if figure.line is None or row.get(figure.line) == value]
        label = None if figure.line is None else _label(figure.line, value)
        if figure.x == TOKENS_SEEN:
            _over_run(axes, figure.y, [points[number] for number in chosen], colour, label)
        else:
            _over_column(axes, figure, [rows[number] for number in chosen], rows, colour, label)
    for axis in figure.log:
        getattr(axes, f"set_{axis}scale")("log")
    if figure.x in (TOKENS_SEEN, "tokens", "parameters") and "x" not in figure.log:
        plot.count_axis(axes.xaxis, 6 if width > 500 else 4)
    axes.set(xlabel=_NAMES.get(figure.x, figure.x), ylabel=_NAMES.get(figure.y, figure.y))
    if figure.line:
        axes.legend(loc="best")
    return canvas


def _label(line: str, value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{line.split('.')[-1]} {value}"


def _over_column(
    axes: Axes, figure: FigureSchema, rows: list[Row], every: Sequence[Row], colour: str, label: str | None
):
    """Plot the mean of each x with bars of one standard deviation, and the single values."""
    known = [row for row in rows if row.get(figure.x) is not None and row.get(figure.y) is not None]
    if not known:
        return
    names = list(dict.fromkeys(row[figure.x] for row in every if row.get(figure.x) is not None))
    numeric = all(isinstance(name, int | float) for name in names)
    place = {name: name for name in sorted(names)} if numeric else {name: n for n, name in enumerate(names)}
    by_x: dict[Any, Spread] = {}
    for x in place:
        of_x = spread(row[figure.y] for row in known if row[figure.x] == x)
        if of_x is not None:
            by_x[x] = of_x
    x = [place[name] for name in by_x]
    bars = [0 if np.isnan(of_x.deviation) else of_x.deviation for of_x in by_x.values()]
    style = "o-" if numeric else "o"
    axes.errorbar(
        x, [f.mean for f in by_x.values()], bars, fmt=style, color=colour, capsize=4, markersize=5, label=label
    )
    if any(of_x.count > 1 for of_x in by_x.values()):
        at = [place[row[figure.x]] for row in known]
        axes.plot(at, [row[figure.y] for row in known], ".", color=colour, alpha=0.45, markersize=5)
    if not numeric:
        axes.set_xticks(range(len(names)), [str(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)


def _over_run(axes: Axes, y: str, points: list[Point], colour: str, label: str | None) -> None:
    """Plot the mean loss over the run and a band of one standard deviation, at the steps that all have trained."""
    curves = []
    for point in points:
        run = read_run(point.run.folder)
        train = {step.step: step.loss for step in run.steps}
        losses = train if y == "train_loss" or (y == "loss" and not run.validation) else run.validation
        curves.append({step * run.tokens_per_step: loss for step, loss in losses.items()})
    at = sorted(set.intersection(*(set(curve) for curve in curves)) - {0})
    if not at:
        return
    values = np.array([[curve[x] for x in at] for curve in curves])
    mean = values.mean(axis=0)
    axes.plot(at, mean, color=colour, label=label, marker="o" if len(at) < 40 else None, markersize=3)
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        axes.fill_between(at, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
