"""Pictures of a compression, as the paper's figures 9 to 11, for a page that holds them itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from nemotron_h.architecture.blocks.registry import KINDS

#: colours of the kinds of layers, in the registry's order: Mamba-2, attention and feed-forward as the paper plots them
_STYLES = ("red", "#d62728"), ("green", "#2ca02c"), ("blue", "#1f77b4"), ("orange", "#ff7f0e"), ("purple", "#9467bd")


def _style(letter: str) -> tuple[str, str]:
    """Return name and value of a kind's colour."""
    return _STYLES[list(KINDS).index(letter) % len(_STYLES)]


def colours(pattern: str) -> str:
    """Return the meaning of the colours in a figure: red Mamba-2, blue feed-forward, green attention."""
    return ", ".join(f"{_style(letter)[0]} {KINDS[letter].title}" for letter in sorted(set(pattern), reverse=True))


def as_image(figure: Figure) -> str:
    """Return a figure as the `src` of an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def importance(pattern: str, values: Sequence[float], metric: str) -> Figure:
    """Plot what removing each layer changes (figure 9)."""
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axis.plot(range(len(values)), values, color="0.6", linewidth=1, zorder=1)
    for symbol in sorted(set(pattern)):
        layers, label = [n for n, letter in enumerate(pattern) if letter == symbol], KINDS[symbol].title
        axis.scatter(layers, [values[n] for n in layers], s=28, color=_style(symbol)[1], label=label, zorder=2)
    axis.set(xlabel="layer", ylabel=f"{metric} when it is removed", yscale="log" if min(values) > 0 else "linear")
    axis.legend(frameon=False, ncols=3)
    return figure


def candidates(
    rows: Sequence[Mapping[str, Any]],
    cost: str,
    label: str,
    limit: float | None,
    chosen: Sequence[str],
    front: Sequence[int],
) -> Figure:
    """Plot candidates by what they cost and how they score (figure 10)."""
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    axis.scatter([r[cost] for r in rows], [r["accuracy"] for r in rows], s=18, color="#1f77b4", label="candidates")
    best = [rows[n] for n in front]
    axis.plot([r[cost] for r in best], [r["accuracy"] for r in best], color="0.5", linewidth=1, label="Pareto front")
    picked = [r for r in rows if r["name"] in chosen]
    axis.scatter(
        [r[cost] for r in picked],
        [r["accuracy"] for r in picked],
        s=90,
        facecolors="none",
        edgecolors="#d62728",
        linewidths=1.5,
        label="distilled",
    )
    if limit is not None:
        axis.axvline(limit, color="#2ca02c", linestyle=":", label="budget")
    axis.set(xlabel=label, ylabel="next-token accuracy, untrained")
    axis.legend(frameon=False, fontsize="small")
    return figure


def patterns(pattern: str, dropped: Mapping[str, Sequence[int]]) -> Figure:
    """Plot which layers each chosen candidate drops (figure 11)."""
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.45 * len(dropped)), layout="constrained")
    for number, symbol in enumerate(pattern):
        axis.axvline(number, color=_style(symbol)[1], linestyle=":", linewidth=0.9)
    for row, layers in enumerate(dropped.values()):
        axis.scatter(layers, [row] * len(layers), s=45, color="black", zorder=3)
    axis.set_yticks(range(len(dropped)), list(dropped), fontsize="small")
    axis.set_ylim(len(dropped) - 0.5, -0.5)
    axis.set_xlim(-0.5, len(pattern) - 0.5)
    axis.set_xlabel("layer of the parent; dots are dropped")
    return figure


def orders(curves: Mapping[str, Sequence[float]], parent: float) -> Figure:
    """Plot loss over the number of dropped layers, in the order of importance and in two others."""
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    styles = {"importance": "#1f77b4", "random": "#ff7f0e", "reversed": "#d62728"}
    for name, losses in curves.items():
        axis.plot(range(len(losses)), losses, marker="o", markersize=4, color=styles.get(name), label=name)
    axis.axhline(parent, color="0.5", linestyle=":", label="parent")
    axis.set(xlabel="layers dropped", ylabel="validation loss, untrained")
    axis.legend(frameon=False)
    return figure


def recovery(tokens: Sequence[float], divergences: Sequence[float]) -> Figure:
    """Plot the child's divergence from the parent over the distillation."""
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    axis.plot(tokens, divergences, marker="o", markersize=4, color="#1f77b4")
    axis.set(xlabel="tokens of distillation", ylabel="validation divergence, nats", ylim=(0, None))
    return figure
