"""Does Falcon-H1's rule of multipliers carry a learning rate over to another width? `python demos/width_transfer.py`.

Reads what `nemotron-h sweep width` has come to and writes `docs/img/width_transfer.svg` and the table of
`docs/results/width.md`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from nemotron_h.core import plot
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_between
from nemotron_h.platform.ranks import report_mistakes

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/results/width.md", ROOT / "docs/img/width_transfer.svg"
BEGIN, END = "<!-- table: written by demos/width_transfer.py -->\n", "<!-- end of table -->\n"
SWEEP = Path("runs/width/sweep.csv")

#: of the sweep's runs, by name
WIDTHS = (64, 128, 256)
RATES = tuple(2.0**-power for power in range(10, 5, -1))  # 9.8e-4 to 1.6e-2
VARIANTS = {"none": "no multipliers", "falcon_h1": "the rule", "scaled": "the rule, scaled weights"}


def measured(path: Path) -> dict[str, float]:
    """Return the validation loss of each run of the sweep by name.

    Errors:
        UserError: the sweep is not there, or not finished.
    """
    command = "nemotron-h sweep width"
    if not path.is_file():
        raise UserError(f"there is no {path}", hint=command)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    left = sum(row["state"] != "finished" for row in rows)
    if left:
        raise UserError(f"{path}: {left} of {len(rows)} runs are not finished", hint=command)
    return {f"{row['run']}-{float(row['optim.peak_lr']):.3g}": float(row["validation_loss"]) for row in rows}


def name_of(variant: str, width: int, rate: float) -> str:
    """Return a run's name."""
    return f"{variant}-{width}-{rate:.3g}"


def optimum(losses: list[float]) -> float:
    """Return the learning rate where a parabola through the lowest loss and its neighbours, over the logarithm, is
    lowest; NaN where the lowest is at an end.
    """
    best = int(np.argmin(losses))
    if not 0 < best < len(losses) - 1:
        return float("nan")
    a, b, _ = np.polyfit(np.log2(RATES[best - 1 : best + 2]), losses[best - 1 : best + 2], 2)
    return float(2 ** (-b / (2 * a)))


def table(losses: dict[str, float]) -> str:
    """Return the losses as a table, and where they are lowest."""
    lines = [f"| | width | {' | '.join(f'{rate:.2g}' for rate in RATES)} | optimum |", "|" + "---|" * (len(RATES) + 3)]
    for variant, words in VARIANTS.items():
        for width in WIDTHS:
            row = [losses[name_of(variant, width, rate)] for rate in RATES]
            cells = [f"**{loss:.3f}**" if loss == min(row) else f"{loss:.3f}" for loss in row]
            lines.append(f"| {words} | {width} | {' | '.join(cells)} | {optimum(row):.1e} |")
    return "\n".join(lines) + "\n"


@plot.styled
def draw(losses: dict[str, float]) -> None:
    """Plot the losses over the learning rate, a panel for each variant and a curve for each width."""
    figure, panels = plot.canvas(720, 340, columns=len(VARIANTS), sharey=True, sharex=True)
    for axes, (variant, words) in zip(panels, VARIANTS.items(), strict=True):
        for width, colour in zip(WIDTHS, plot.SERIES, strict=False):
            row = [losses[name_of(variant, width, rate)] for rate in RATES]
            axes.plot(RATES, row, color=colour, marker="o", markersize=4, label=f"width {width}")
            axes.plot(RATES[int(np.argmin(row))], min(row), color=colour, marker="o", markersize=10, fillstyle="none")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RATES[::2], [f"{rate:.1e}" for rate in RATES[::2]])
        axes.set(title=words, xlabel="learning rate")
    panels[0].set_ylabel("validation loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(WIDTHS))
    plot.save(
        figure, PICTURE, "Validation loss over the learning rate, with Falcon-H1's rule of multipliers and without"
    )


def main() -> None:
    """Write figure and table."""
    losses = measured(SWEEP)
    draw(losses)
    write_between(PAGE, BEGIN, END, table(losses))
    print(f"{PICTURE}\n{PAGE}")


if __name__ == "__main__":
    report_mistakes()
    main()
