"""The pictures of a comparison: the loss gap over tokens (as the paper's figure 5), and a map of the casts by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from nemotron_h.architecture.gemms import OPERANDS
from nemotron_h.comparison.results import Results
from nemotron_h.core import plot
from nemotron_h.core.plot import INK, MUTED, SERIES

#: the paper's verdict on FP8: a relative gap below 0.1 % (paper 2.3)
PAPER_GAP = 1e-3


@plot.styled
def plot_gap(found: Results, path: Path) -> None:
    """Plot percent over tokens, training above validation; the suffix decides the format."""
    made = found.comparison
    figure, axes = plot.canvas(720, 560, rows=2, sharex=True)
    parts = (
        (
            "training loss" + (f", mean of {found.window} steps" if found.window > 1 else ""),
            found.train,
            found.noise_train,
        ),
        ("validation loss", found.validation, found.noise_validation),
    )
    for axis, (title, pairs, noise) in zip(axes, parts, strict=True):
        marker = "o" if pairs and len(pairs[0].tokens) < 60 else None
        for number, other in enumerate(noise):
            label = f"{made.against} from other initial weights" if number == 0 else None
            axis.plot(other.tokens, 100 * other.gap, color=MUTED, linewidth=1, marker=marker, markersize=3, label=label)
        for other in pairs[1:]:
            axis.plot(other.tokens, 100 * other.gap, color=SERIES[0], alpha=0.4, linewidth=1)
        for own in pairs[:1]:
            axis.plot(own.tokens, 100 * own.gap, color=SERIES[0], marker=marker, markersize=4, label=made.precision)
        for bound in (-PAPER_GAP, PAPER_GAP):
            label = "0.1 % (paper 2.3)" if bound > 0 else None
            axis.axhline(100 * bound, color=INK, linestyle=":", linewidth=1, label=label)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set(title=title, ylabel=f"({made.against} - x) / {made.against}, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(handles))
    axes[-1].set_xlabel("tokens")
    plot.count_axis(axes[-1].xaxis)
    title = f"{made.recipe}: {made.precision} against {made.against}"
    figure.suptitle(title, x=0.02, ha="left")
    plot.save(figure, path, title)


@plot.styled
def plot_casts(title: str, casts: list[dict[str, Any]], path: Path) -> None:
    """Plot a row for each FP8 matmul of a run and a column for each operand and measured step."""
    rows = {(row["layer"], row["product"]): row["type"] for row in casts}
    order = {key: number for number, key in enumerate(sorted(rows, key=lambda key: key[0]))}
    steps = sorted({row["step"] for row in casts})
    columns = [(operand, step) for operand in OPERANDS for step in steps]
    panels = {
        name: np.full((len(order), len(columns)), np.nan) for name in ("amax", "underflow", "saturation", "overflow")
    }
    for row in casts:
        place = order[row["layer"], row["product"]], columns.index((row["operand"], row["step"]))
        for name, values in panels.items():
            values[place] = row[name]
    with np.errstate(divide="ignore"):
        panels["amax"] = np.log2(panels["amax"])
    titles = {
        "amax": "amax, log2",
        "underflow": "underflow, % of nonzero values",
        "saturation": "saturation, % of nonzero values",
        "overflow": "overflow, % of nonzero values",
    }
    height = min(2880, 180 + 14 * len(order))
    width = 230 + 4 * max(158, 16 * len(columns))
    figure, axes = plot.canvas(width, height, columns=4, sharey=True)
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        percent = {} if name == "amax" else {"vmin": 0, "vmax": 100 * np.nanmax(values) or 1}
        shown = 100 * values if percent else values
        image = axis.imshow(shown, aspect="auto", interpolation="nearest", cmap="cividis", **percent)
        axis.grid(visible=False)
        bar = figure.colorbar(image, ax=axis, location="bottom", aspect=40, pad=0.02, ticks=MaxNLocator(4))
        bar.ax.tick_params(labelsize="x-small")
        axis.set_xticks(range(len(columns)), [str(step) for _, step in columns], rotation=90, fontsize="x-small")
        for number, operand in enumerate(OPERANDS):
            middle = (number + 0.5) * len(steps) - 0.5
            axis.text(middle, -0.7, operand, ha="center", va="bottom", fontsize="x-small")
            if number:
                axis.axvline(number * len(steps) - 0.5, color="white", linewidth=1.5)
        axis.set_title(titles[name], fontsize="small", pad=16)
        axis.set_xlabel("step", fontsize="x-small")
    names = [f"{layer} {rows[layer, product]} {product}" for layer, product in order]
    axes[0].set_yticks(range(len(order)), names, fontsize="x-small")
    figure.suptitle(f"{title}: casts to float8", x=0.02, ha="left")
    plot.save(figure, path, f"{title}: casts to float8")
