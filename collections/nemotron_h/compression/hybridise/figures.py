"""Pictures of a hybrid's rounds; sizes are in CSS pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nemotron_h.core import plot
from nemotron_h.core.plot import MUTED, SERIES, styled


@styled
def by_share(
    shares: Sequence[float], series: Mapping[str, Sequence[float]], parent: float, label: str, width: int, height: int
) -> Figure:
    """Plot something of each round over the share of attention layers that stay, the parent's as a line.

    Args:
        shares: of each round.
        series: values of each round by name.
        label: of the values.
    """
    figure, axis = plot.canvas(width, height)
    for (name, values), colour in zip(series.items(), SERIES, strict=False):
        axis.plot(shares, values, marker="o", markersize=5, color=colour, label=name)
    axis.axhline(parent, color=MUTED, linestyle=":", label="parent")
    axis.set(xlabel="attention layers that stay, of the parent's", ylabel=label, xlim=(1.02, -0.02))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend()
    return figure
