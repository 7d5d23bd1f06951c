"""The pictures of a comparison: the loss gap over tokens (as the paper's figure 5), and a map of the casts by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from nemotron_h.architecture.gemms import OPERANDS
from nemotron_h.comparison.results import Results

#: the paper's verdict on FP8: a relative gap below 0.1 % (paper 2.3)
PAPER_GAP = 1e-3


def plot_gap(found: Results, path: Path) -> None:
    """Plot percent over tokens, training above validation; the suffix decides the format."""
    made = found.comparison
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(8, 6.5), layout="constrained")
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
            axis.plot(other.tokens, 100 * other.gap, color="0.6", linewidth=1, marker=marker, markersize=3, label=label)
        for other in pairs[1:]:
            axis.plot(other.tokens, 100 * other.gap, color="tab:green", alpha=0.4, linewidth=1)
        for own in pairs[:1]:
            axis.plot(own.tokens, 100 * own.gap, color="tab:green", marker=marker, markersize=4, label=made.precision)
        for bound in (-PAPER_GAP, PAPER_GAP):
            label = "0.1 % (paper 2.3)" if bound > 0 else None
            axis.axhline(100 * bound, color="black", linestyle=":", linewidth=1, label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title, ylabel=f"({made.against} - x) / {made.against}, %")
        axis.legend(fontsize="small")
    axes[-1].set_xlabel("tokens")
    figure.suptitle(f"{made.recipe}: {made.precision} against {made.against}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    height = min(40.0, 2.5 + 0.2 * len(order))
    width = 3.2 + 4 * max(2.2, 0.22 * len(columns))
    figure, axes = plt.subplots(1, 4, sharey=True, figsize=(width, height), layout="constrained")
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        percent = {} if name == "amax" else {"vmin": 0, "vmax": 100 * np.nanmax(values) or 1}
        shown = 100 * values if percent else values
        image = axis.imshow(shown, aspect="auto", interpolation="nearest", **percent)
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
    figure.suptitle(f"{title}: casts to float8", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)
