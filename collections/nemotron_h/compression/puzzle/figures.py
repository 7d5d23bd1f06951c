"""Pictures of a compression whose layers differ; sizes are in CSS pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemotron_h.core import plot
from nemotron_h.core.plot import INK, MUTED, SERIES, styled


@styled
def variants(
    names: Sequence[str], scores: Sequence[Mapping[str, float]], picks: Sequence[str], width: int, height: int
) -> Figure:
    """Plot the score of each variant in each layer's place, and the chosen ones.

    Args:
        names: all variants, from the top.
        scores: of each layer by variant; of the parent's layer 0.
        picks: of each layer.
    """
    figure, axis = plot.canvas(width, 70 + 26 * len(names))
    axis.grid(visible=False)
    points = [
        (layer, names.index(name), score)
        for layer, row in enumerate(scores)
        for name, score in row.items()
        if score > 0
    ]
    columns, rows, values = zip(*points, strict=True)
    norm = LogNorm(min(values), max(values)) if min(values) < max(values) else None
    side = max(20, min(140, (0.6 * width / len(scores)) ** 2 / 2))
    shown = axis.scatter(columns, rows, c=values, s=side, marker="s", cmap="viridis_r", norm=norm)
    chosen = [names.index(pick) for pick in picks]
    axis.scatter(range(len(picks)), chosen, s=side * 2, marker="s", facecolors="none", edgecolors=INK, linewidths=1.4)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(ylim=(len(names) - 0.5, -0.5), xlim=(-0.7, len(scores) - 0.3), xlabel="layer of the parent")
    figure.colorbar(shown, ax=axis, label="score")
    return figure


@styled
def foretold(groups: Mapping[str, Sequence[tuple[float, float]]], measure: str, width: int, height: int) -> Figure:
    """Plot each child's true score over the sum of its variants' scores.

    Args:
        groups: (sum, true score) of children by how they were chosen.
    """
    figure, axis = plot.canvas(width, height)
    for (name, points), colour in zip(groups.items(), (SERIES[0], SERIES[1], SERIES[4]), strict=False):
        axis.scatter(*zip(*points, strict=True), s=36, color=colour, label=name, zorder=2)
    least, most = (end(value for points in groups.values() for value in map(end, points)) for end in (min, max))
    axis.plot([least, most], [least, most], color=MUTED, linestyle=":", label="equal")
    axis.set(xlabel=f"sum of the variants' {measure}", ylabel=f"the child's {measure}, untrained")
    axis.legend()
    return figure


@styled
def front(points: Sequence[Mapping[str, Any]], resource: str, limit: float, width: int, height: int) -> Figure:
    """Plot the smallest sum of scores over a limit (Pareto front)."""
    figure, axis = plot.canvas(width, height)
    axis.plot(
        [each["limit"] for each in points],
        [each["score"] for each in points],
        marker="o",
        color=SERIES[0],
        markersize=4,
    )
    axis.axvline(limit, color=SERIES[2], linestyle=":", label="limit of the recipe")
    axis.set(xlabel=f"limit of {resource}", ylabel="smallest sum of scores")
    axis.legend()
    return figure


@styled
def trained(entries: Sequence[Mapping[str, Any]], width: int, height: int) -> Figure:
    """Plot each variant's error after its training over that before."""
    figure, axis = plot.canvas(width, height)
    kinds = sorted({entry["variant"] for entry in entries})
    for name, colour in zip(kinds, plot.colours(len(kinds)), strict=True):
        own = [entry for entry in entries if entry["variant"] == name]
        axis.scatter([e["made"] for e in own], [e["trained"] for e in own], s=24, color=colour, label=name)
    most = max(entry["made"] for entry in entries)
    axis.plot([0, most], [0, most], color=MUTED, linestyle=":", label="no training")
    axis.set(xlabel="error of the variant as it was made", ylabel="after its training", xlim=(0, None), ylim=(0, None))
    axis.legend(fontsize="small")
    return figure
