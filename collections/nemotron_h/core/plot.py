"""Pictures in one style: sizes, colours, axes, files. An SVG takes the light or dark scheme of whoever looks at it.

Figures are plotted in the light colours, each of which names a role; in an SVG they become CSS variables. A unit of an
SVG is a CSS pixel.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import short_count

#: role -> colour in the light scheme and in the dark one
SCHEMES = {
    "ink": ("#1b2430", "#e8ebf0"),
    "muted": ("#5b6675", "#9ba6b6"),
    "line": ("#dfe4ea", "#2d3643"),
    "surface": ("#fffffe", "#161b23"),
    "ground": ("#f5f7f9", "#0e1218"),
    # told apart with any colour vision: Okabe and Ito's palette, each at a contrast of 3 or more to its ground
    "series-1": ("#0072b2", "#56b4e9"),
    "series-2": ("#d55e00", "#ff9a5c"),
    "series-3": ("#008a65", "#34c79b"),
    "series-4": ("#b0538a", "#e590c2"),
    "series-5": ("#a67800", "#f0c419"),
    "series-6": ("#3b8fc4", "#a5d8f7"),
    "series-7": ("#6b6b6b", "#a8a8a8"),
    "series-8": ("#7a4a21", "#c9a27e"),
}
INK, MUTED, LINE, SURFACE, _, *SERIES = (light for light, _ in SCHEMES.values())

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # of matplotlib itself; an SVG names the reader's own
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.formatter.limits": (-4, 5),
    "grid.color": LINE,
    "grid.linewidth": 1,
    "figure.facecolor": "none",
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}
#: decorates what makes a figure: artists take their style when they are made
styled = rc_context(_STYLE)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
#: points of a curve that a picture shows
_POINTS = 600


def css() -> str:
    """Return the colours as CSS variables, for a page or an SVG of its own; paper is light."""
    light, dark = (";".join(f"--{role}:{colours[scheme]}" for role, colours in SCHEMES.items()) for scheme in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def colours(count: int) -> list[str]:
    """Return so many colours: those of `SERIES`, then their tints."""
    tints = [to_hex([0.5 + part / 2 for part in to_rgb(colour)]) for colour in SERIES]
    return [(*SERIES, *tints)[number % (2 * len(SERIES))] for number in range(count)]


@styled
def canvas(
    width: int,
    height: int,
    rows: int = 1,
    columns: int = 1,
    margins: tuple[int, int, int, int] | None = None,
    **options: Any,
) -> tuple[Figure, Any]:
    """Return a figure and its axes, which share what `Figure.subplots` is told.

    Args:
        width, height: in CSS pixels.
        margins: left, right, top and bottom, in CSS pixels; measured by default, which takes as long as plotting.
    """
    figure = Figure(figsize=(width / 72, height / 72), layout=None if margins else "constrained")
    if margins:
        left, right, top, bottom = margins
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure, figure.subplots(rows, columns, **options)


def count_axis(axis: Axis, ticks: int = 6) -> None:
    """Write counts as 655.4k and 1.2M, at so many round numbers or fewer."""
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def curve(
    axes: Axes, x: np.ndarray, y: np.ndarray, pieces: Sequence[tuple[float, str]] | str = SERIES[0], window: int = 1
) -> None:
    """Plot values over x: themselves, with their mean where one is asked for; where they are many, the range and the
    mean of neighbours.

    Args:
        x: ascending.
        y: NaN where there is none.
        pieces: colours, each with the x where it ends; or one for all.
        window: values before each that its mean is of.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    low = high = None
    at, mean = x, y
    if len(y) > _POINTS:
        groups = np.array_split(y, _POINTS)
        low, high, mean = (np.array([take(group) for group in groups]) for take in (np.min, np.max, np.mean))
        at = np.array([part.mean() for part in np.array_split(x, _POINTS)])
    elif 1 < window <= len(y) // 3:
        total, ends = np.concatenate(([0.0], np.cumsum(y))), np.arange(1, len(y) + 1)
        begins = np.maximum(ends - window, 0)
        mean = (total[ends] - total[begins]) / (ends - begins)
    first = 0
    for end, colour in [(np.inf, pieces)] if isinstance(pieces, str) else pieces:
        last = int(np.searchsorted(at, end, side="right"))
        part = slice(max(first - 1, 0), last)  # from the last point of the piece before
        if low is not None:
            axes.fill_between(at[part], low[part], high[part], color=colour, alpha=0.22, linewidth=0)
        elif mean is not y:
            axes.plot(at[part], y[part], color=colour, linewidth=0.8, alpha=0.4)
        if last > first:
            axes.plot(at[part], mean[part], color=colour, marker="o" if len(at) < 3 else None, markersize=5)
        first = last


def svg(figure: Figure, label: str, alone: bool = False) -> str:
    """Return a figure as an SVG element.

    Args:
        label: says what it shows, to those who do not see it; ids in the SVG are of it.
        alone: a file of its own, with its colours, its ground and a fixed size; a page has colours for all.
    """
    buffer = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)[\")]", text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"(?:'DejaVu Sans'|DejaVu Sans)(?:, sans-serif)?", "var(--font)" if not alone else FONT, text)
    for role, (light, _) in SCHEMES.items():
        text = text.replace(light, f"var(--{role})")
    width, height = (round(size * 72) for size in figure.get_size_inches())
    size = f' width="{width}" height="{height}"' if alone else ""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} '
        f'{height}"{size} role="img" aria-label="{html.escape(label)}">'
    )
    if alone:
        opening += f'<style>{css()}</style><rect width="100%" height="100%" rx="8" style="fill: var(--surface)"/>'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1))


def save(figure: Figure, path: Path, label: str, option: str = "") -> None:
    """Write a figure; the suffix decides the format, and all but SVG are light.

    Args:
        label: says what it shows.
        option: of the command, that names the file in an error.
    Errors:
        UserError: the file cannot be written, or there is no such format.
    """
    if (layout := figure.get_layout_engine()) is not None:
        layout.set(w_pad=0.14, h_pad=0.14)  # nothing touches the edge of a file
    try:
        if path.suffix == ".svg":
            path.write_text(svg(figure, label, alone=True), encoding="utf-8")
        else:
            with rc_context(_STYLE):
                figure.savefig(path, dpi=144, facecolor=SURFACE)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}".strip()) from error
