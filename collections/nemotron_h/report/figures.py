"""Pictures of a run: its loss by phase, and what else was measured of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from nemotron_h.core import plot
from nemotron_h.core.plot import INK, MUTED, SERIES, styled
from nemotron_h.core.units import short_count
from nemotron_h.report.run import Run

#: of a small picture, in CSS pixels
SMALL = (340, 220)
#: unit of a stage's loss, of those that are no mean over tokens
_LOSSES = {"preference": "loss per pair, nats"}
#: ours: share of a run's first steps that may leave the picture, where they would fill most of it
_OPENING = 0.02


def loss_label(run: Run) -> str:
    """Return the name of a run's loss with its unit."""
    return _LOSSES.get(run.recipe["stage"], "loss per token, nats")


def shown_losses(run: Run) -> tuple[float, float] | None:
    """Return the range that leaves out the first losses of a long run, which would take most of the height; None where
    the picture has them all.
    """
    values = run.values(lambda step: step.loss)
    opening = int(len(values) * _OPENING)
    if opening < 4:
        return None
    validated = [loss for step, loss in run.validation.items() if step > run.steps[opening].step]
    rest = [*values[opening:][np.isfinite(values[opening:])], *validated]
    if not rest or np.nanmax(values) - min(rest) <= 2 * (max(rest) - min(rest)):
        return None
    height = max(rest) - min(rest)
    return min(rest) - 0.05 * height, max(rest) + 0.25 * height


@styled
def loss(run: Run, width: int, height: int, title: str = "") -> Figure:
    """Plot training and validation loss over tokens; phases have colours and names, resumes are marked.

    Args:
        width, height: in CSS pixels.
        title: of a picture that stands alone.
    """
    figure, axes = plot.canvas(width, height, margins=(58, 14, 62 if title else 26, 44))
    values = run.values(lambda step: step.loss)
    per_step, many = run.tokens_per_step, len(run.phases) > 1
    pieces = [(p.end * per_step, SERIES[n % len(SERIES)]) for n, p in enumerate(run.phases)] if many else SERIES[0]
    plot.curve(axes, run.tokens, values, pieces, window=max(1, len(values) // 50))
    steps, size = np.array(list(run.validation)), 5 if len(run.validation) <= 40 else 2
    axes.plot(steps * per_step, list(run.validation.values()), color=INK, linewidth=1, alpha=0.35)
    handles = [Line2D([], [], color=MUTED if many else SERIES[0], label="training")]
    if len(steps):
        handles.append(Line2D([], [], color=INK, marker="o", markersize=5, linestyle="", label="validation"))
    axes.set_xlim(0, max(run.max_steps, run.last) * per_step)
    if (limits := shown_losses(run)) is not None:
        axes.set_ylim(*limits)
    style = {"color": INK, "marker": "o", "markersize": size, "linestyle": ""}
    axes.plot(steps * per_step, list(run.validation.values()), **style, zorder=3, clip_on=limits is not None)
    resumed = [start for start in run.starts if start]
    if resumed:
        style = {"color": MUTED, "marker": "^", "markersize": 7, "linestyle": ""}
        at = [start * per_step for start in resumed]
        axes.plot(at, [0.02] * len(at), **style, transform=axes.get_xaxis_transform())
        handles.append(Line2D([], [], **style, label="resumed"))
    if many:
        handles += _bands(axes, run, width)
    axes.set(xlabel="tokens", ylabel=loss_label(run))
    plot.count_axis(axes.xaxis, 6 if width > 500 else 4)
    axes.legend(handles=handles, loc="upper right", ncols=1 if width > 500 else 2)
    if title:
        figure.suptitle(title, x=18 / width, y=1 - 16 / height, ha="left", va="top")
    return figure


def _bands(axes: Axes, run: Run, width: int) -> list[Patch]:
    """Colour the phases and write their names above; return the legend of those names that do not fit."""
    whole = max(run.max_steps, run.last)
    room = [(p.end - p.first) / whole * (width - 70) for p in run.phases]
    fits = all(len(p.name) * 7.5 + 6 < pixels for p, pixels in zip(run.phases, room, strict=True))
    patches = []
    for number, phase in enumerate(run.phases):
        colour, per_step = SERIES[number % len(SERIES)], run.tokens_per_step
        axes.axvspan(phase.first * per_step, phase.end * per_step, color=colour, alpha=0.08, linewidth=0)
        middle = (phase.first + phase.end) / 2 * per_step
        if fits:
            axes.text(middle, 1.02, phase.name, color=colour, transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", weight="bold")  # fmt: skip
        else:
            patches.append(Patch(color=colour, label=phase.name))
    return patches


@styled
def over_tokens(run: Run, series: Sequence[tuple[str, np.ndarray]], ylabel: str, log: bool = False, zero: bool = False,
                validated: Sequence[tuple[str, tuple[np.ndarray, np.ndarray]]] = (), percent: bool = False,
                counts: bool = False) -> Figure:  # fmt: skip
    """Plot some series of the steps over tokens, small.

    Args:
        series: (name, value of each step).
        ylabel: what they are, with the unit.
        log: have the values on a logarithmic scale, where all are above 0.
        zero: begin at 0.
        validated: (name, (tokens, values)) of validations.
        percent: of shares, from 0 to 1.
        counts: have the values as 1.2k.
    """
    figure, axes = plot.canvas(*SMALL, margins=(64, 10, 8, 42))
    positive = True
    for number, (_, values) in enumerate(series):
        plot.curve(axes, run.tokens, values, SERIES[number % len(SERIES)], window=max(1, len(values) // 50))
        positive = positive and bool(np.nanmin(values) > 0)
    handles = [Line2D([], [], color=SERIES[n % len(SERIES)], label=name) for n, (name, _) in enumerate(series) if name]
    for number, (name, (tokens, values)) in enumerate(validated):
        colour = INK if len(validated) == 1 else SERIES[number % len(SERIES)]
        style = {"marker": "o", "markersize": 4, "linewidth": 1, "color": colour}
        axes.plot(tokens, values, **style, linestyle="-" if len(validated) == 1 else ":")
        handles.append(Line2D([], [], **style, label=name))
    axes.set(xlabel="tokens", ylabel=ylabel, xlim=(0, max(run.max_steps, run.last) * run.tokens_per_step))
    plot.count_axis(axes.xaxis, 4)
    if log and positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif percent:
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if counts:
        axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
    if len(handles) > 1:
        axes.legend(handles=handles, loc="best")
    return figure
