"""The picture of a blend over a run: stacked shares over tokens, with the switches."""

from __future__ import annotations

from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.data.show import Overview, short_count

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

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    colours = _colours(len(view.categories))
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for phase in view.phases:
        left, width, bottom = float(phase.begin), float(phase.tokens), 0.0
        for number, category in enumerate(view.categories):
            share = phase.categories.get(category, 0.0)
            axes.bar(left, 100 * share, width, bottom, align="edge", color=colours[number], edgecolor="white", lw=0.4)
            if share >= _LABELLED and width / view.tokens >= 0.06:
                dark = sum(c * w for c, w in zip(to_rgb(colours[number]), (0.3, 0.6, 0.1), strict=True)) < 0.5
                place = (left + width / 2, bottom + 50 * share)
                axes.annotate(
                    f"{100 * share:.1f} %", place, ha="center", va="center", size=9, color="white" if dark else "#222"
                )
            bottom += 100 * share
    _switches(view, axes)
    axes.set(xlim=(0, view.tokens), ylim=(0, 100), ylabel="percent of tokens", xlabel="tokens of the run")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(x) if x else "0"))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.bar(0, 0, color=colour) for colour in colours]
    axes.legend(
        handles[::-1], view.categories[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10
    )
    figure.suptitle(f"Blend {view.blend.name} over {short_count(view.tokens)} tokens", fontsize=13, x=0.02, ha="left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--png {path}: {error.strerror}") from error


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


def _colours(count: int) -> list:
    import matplotlib

    # Okabe and Ito's palette, told apart with any colour vision; more categories take more of a wheel.
    palette = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#6B6B6B"]
    extra = matplotlib.colormaps["tab20"]
    return [palette[n] if n < len(palette) else extra((n - len(palette)) % 20) for n in range(count)]
