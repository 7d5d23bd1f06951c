"""Pictures of a compression, as the paper's figures 9 to 11; sizes are in CSS pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.core import plot
from nemotron_h.core.plot import INK, MUTED, SERIES, SURFACE, styled

#: colours of the kinds of layers, in the registry's order: Mamba-2, attention and feed-forward much as the paper's
_COLOURS = (SERIES[1], SERIES[2], SERIES[0], *SERIES[3:])


def _colour(letter: str) -> str:
    """Return the colour of a kind."""
    return _COLOURS[list(KINDS).index(letter) % len(_COLOURS)]


@styled
def importance(pattern: str, values: Sequence[float], metric: str, width: int, height: int) -> Figure:
    """Plot what removing each layer changes (figure 9)."""
    figure, axis = plot.canvas(width, height)
    axis.plot(range(len(values)), values, color=MUTED, linewidth=1, alpha=0.5, zorder=1)
    for symbol in sorted(set(pattern)):
        layers, label = [n for n, letter in enumerate(pattern) if letter == symbol], KINDS[symbol].title
        axis.scatter(layers, [values[n] for n in layers], s=28, color=_colour(symbol), label=label, zorder=2)
    axis.set(xlabel="layer", ylabel=f"{metric} when it is removed", yscale="log" if min(values) > 0 else "linear")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


@styled
def candidates(
    rows: Sequence[Mapping[str, Any]],
    cost: str,
    label: str,
    limit: float | None,
    chosen: Sequence[str],
    front: Sequence[int],
    width: int,
    height: int,
) -> Figure:
    """Plot candidates by what they cost and how they score (figure 10)."""
    figure, axis = plot.canvas(width, height)
    axis.scatter([r[cost] for r in rows], [r["accuracy"] for r in rows], s=20, color=SERIES[0], label="candidates")
    best = [rows[n] for n in front]
    axis.plot([r[cost] for r in best], [r["accuracy"] for r in best], color=MUTED, linewidth=1, label="Pareto front")
    picked = [r for r in rows if r["name"] in chosen]
    axis.scatter(
        [r[cost] for r in picked],
        [r["accuracy"] for r in picked],
        s=90,
        facecolors="none",
        edgecolors=SERIES[1],
        linewidths=1.5,
        label="distilled",
    )
    if limit is not None:
        axis.axvline(limit, color=SERIES[2], linestyle=":", label="budget")
    axis.set(xlabel=label, ylabel="next-token accuracy, untrained")
    if cost == "parameters":
        plot.count_axis(axis.xaxis, 6 if width > 500 else 4)
    figure.legend(loc="outside upper right", ncols=4 if width > 500 else 2)
    return figure


@styled
def patterns(pattern: str, dropped: Mapping[str, Sequence[int]], width: int) -> Figure:
    """Plot which layers each chosen candidate drops (figure 11)."""
    figure, axis = plot.canvas(width, 84 + 30 * len(dropped))
    axis.grid(visible=False)
    for number, symbol in enumerate(pattern):
        axis.axvline(number, color=_colour(symbol), linestyle=":", linewidth=1)
    for row, layers in enumerate(dropped.values()):
        axis.scatter(layers, [row] * len(layers), s=45, color=INK, edgecolors=SURFACE, zorder=3)
    axis.set_yticks(range(len(dropped)), list(dropped))
    axis.set_ylim(len(dropped) - 0.5, -0.5)
    axis.set_xlim(-0.5, len(pattern) - 0.5)
    axis.set_xlabel("layer of the parent")
    kinds = [
        Line2D([], [], color=_colour(s), linestyle=":", label=KINDS[s].title)
        for s in sorted(set(pattern), reverse=True)
    ]
    dot = Line2D([], [], color=INK, marker="o", linestyle="", label="dropped")
    figure.legend(handles=[*kinds, dot], loc="outside upper right", ncols=4 if width > 500 else 2)
    return figure


@styled
def orders(curves: Mapping[str, Sequence[float]], parent: float, width: int, height: int) -> Figure:
    """Plot loss over the number of dropped layers, in the order of importance and in two others."""
    figure, axis = plot.canvas(width, height)
    styles = {"importance": SERIES[0], "random": SERIES[4], "reversed": SERIES[1]}
    for name, losses in curves.items():
        axis.plot(range(len(losses)), losses, marker="o", markersize=4, color=styles.get(name), label=name)
    axis.axhline(parent, color=MUTED, linestyle=":", label="parent")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="layers dropped", ylabel="validation loss, untrained, nats")
    axis.legend()
    return figure


@styled
def recovery(tokens: Sequence[float], divergences: Sequence[float], width: int, height: int) -> Figure:
    """Plot the child's divergence from the parent over the distillation."""
    figure, axis = plot.canvas(width, height)
    axis.plot(tokens, divergences, marker="o", markersize=4, color=SERIES[0])
    axis.set(xlabel="tokens of the distillation", ylabel="validation divergence, nats", ylim=(0, None))
    plot.count_axis(axis.xaxis, 6 if width > 500 else 4)
    return figure
