"""Draw AdamW and Muon over budgets of compute, and print fits and the share of FLOPs: `python docs/draw_muon.py [CSV]`.

Reads a table that `nemotron-h sweep muon_budgets` wrote (`docs/results/muon_budgets.csv` without an argument), takes
the best learning rate of each budget and optimizer, and writes `docs/img/muon_budgets.svg`, of `docs/results/muon.md`.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.core import plot
from nemotron_h.laws.fits import Fit, fit_power, flops_ratio, power_loss

DOCS = Path(__file__).resolve().parent
NAMES = {"adamw": "AdamW", "muon": "Muon"}


def best_runs(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return optimizer -> budget -> its run with the least training loss."""
    best: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in NAMES}
    for row in csv.DictReader(path.open(newline="")):
        run = {**row, "loss": float(row["train_loss"]), "flops": float(row["flops"])}
        there = best[row["optim.name"]].get(row["run"])
        if there is None or run["loss"] < there["loss"]:
            best[row["optim.name"]][row["run"]] = run
    return best


@plot.styled
def draw(best: dict[str, dict[str, dict[str, Any]]], fits: dict[str, Fit]) -> None:
    """Plot runs and fits, both axes logarithmic."""
    figure, axes = plot.canvas(560, 340)
    for (name, fit), colour in zip(fits.items(), plot.SERIES, strict=False):
        flops = np.array([run["flops"] for run in best[name].values()])
        axes.plot(flops, [run["loss"] for run in best[name].values()], "o", color=colour, label=NAMES[name])
        line = np.geomspace(flops.min(), flops.max(), 50)
        axes.plot(line, [power_loss(fit.coefficients, {"flops": c}) for c in line], color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="training loss per token, nats")
    axes.legend(frameon=False)
    axes.minorticks_off()
    axes.set_yticks((2, 2.5, 3, 3.5, 4), ("2", "2.5", "3", "3.5", "4"))
    plot.save(figure, DOCS / "img/muon_budgets.svg", "Training loss of small hybrids over FLOPs with AdamW and Muon")


def main() -> None:
    """Fit to the budgets that both optimizers have, print, draw."""
    best = best_runs(Path(sys.argv[1]) if sys.argv[1:] else DOCS / "results/muon_budgets.csv")
    for name, runs in best.items():
        for budget, run in runs.items():
            print(
                f"{budget} {name}: loss {run['loss']:.3f} at {float(run['optim.peak_lr']):g}, {run['flops']:.3g} FLOPs"
            )
    common = [budget for budget in best["adamw"] if budget in best["muon"]]
    fits = {name: fit_power([runs[budget] for budget in common]) for name, runs in best.items()}
    for name, fit in fits.items():
        print(f"{name}: {fit}")
    for budget in common:
        flops = best["adamw"][budget]["flops"]
        share, (low, high) = flops_ratio(fits["muon"], fits["adamw"], flops)
        print(f"{flops:.3g} FLOPs: Muon needs {100 * share:.0f} % (95 %: {100 * low:.0f} to {100 * high:.0f})")
    draw(best, fits)


if __name__ == "__main__":
    main()
