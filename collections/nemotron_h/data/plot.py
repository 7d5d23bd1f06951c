"""The picture of a blend over a run: stacked shares over tokens, with the switches."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import short_count
from nemotron_h.data.show import Overview

_NARROW = 0.09  # of the run's length: a phase name wider than its phase is written on a line of its own
_LABELLED = 0.035  # smallest share whose percent fits into its bar


def plot(view: Overview, path: Path) -> None:
    """Write a PNG.

    Args:
        view: of a run whose length is given.
        path: of the file.

    Errors:
        UserError: without a length, or when the file cannot be written.
    """
    if view.tokens is None:
        raise UserError("--png plots shares over the tokens of a run", "Say how long it is, for instance: --tokens 15T")
    if path.suffix != ".png":
        raise UserError(f"--png {path}: the name of the picture ends in .png")

    from nemotron_h.core import plot as style

    style.styled(_write)(view, path, style)


def _write(view: Overview, path: Path, style: ModuleType) -> None:
    """Plot and write; `style` is `core.plot`, which takes a second to import."""
    from matplotlib.colors import to_rgb

    colours = style.colours(len(view.categories))
    figure, axes = style.canvas(900, 480)
    for phase in view.phases:
        left, width, bottom = float(phase.begin), float(phase.tokens), 0.0
        for number, category in enumerate(view.categories):
            share = phase.categories.get(category, 0.0)
            axes.bar(
                left, 100 * share, width, bottom, align="edge", color=colours[number], edgecolor=style.SURFACE, lw=0.4
            )
            if share >= _LABELLED and width / view.tokens >= 0.06:
                dark = sum(c * w for c, w in zip(to_rgb(colours[number]), (0.3, 0.6, 0.1), strict=True)) < 0.5
                place = (left + width / 2, bottom + 50 * share)
                axes.annotate(
                    f"{100 * share:.1f} %",
                    place,
                    ha="center",
                    va="center",
                    size=9,
                    color="white" if dark else style.INK,
                )
            bottom += 100 * share
    _switches(view, axes)
    axes.set(xlim=(0, view.tokens), ylim=(0, 100), ylabel="share of the tokens, %", xlabel="tokens of the run")
    style.count_axis(axes.xaxis)
    axes.grid(visible=False)
    handles = [axes.bar(0, 0, color=colour) for colour in colours]
    axes.legend(handles[::-1], view.categories[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5))
    label = f"Blend {view.blend.name} over {short_count(view.tokens)} tokens"
    figure.suptitle(label, x=0.02, ha="left")
    style.save(figure, path, label, "--png")


def _switches(view: Overview, axes) -> None:
    """Name the phases above the bars, and mark where each begins."""
    above = axes.get_xaxis_transform()
    for number, phase in enumerate(view.phases):
        begin, width = float(phase.begin), float(phase.tokens)
        step = f", step {phase.span.first_step:,}" if phase.span else ""
        text = phase.name if number == 0 else f"{phase.name}\nfrom {short_count(phase.begin)}{step}"
        if number:
            axes.axvline(begin, color="#222", lw=1.2, ls=(0, (4, 2)))
        if width / view.tokens < _NARROW * (2 if step else 1):
            high = 1.11 if number % 2 else 1.2
            axes.annotate(
                text, (begin, 1.0), (begin, high), xycoords=above, textcoords=above, ha="left", va="bottom", size=9,
                arrowprops={"arrowstyle": "-", "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)},
            )  # fmt: skip
        else:
            axes.text(begin + width / 2, 1.015, text, transform=above, ha="center", va="bottom", size=9)
