"""Draw AdamW and Muon over budgets of compute, and print fits and the share of FLOPs: `python docs/draw_muon.py [CSV]`.

Reads a table that `nemotron-h sweep muon_budgets` wrote (`docs/results/muon_budgets.csv` without an argument), takes
the best learning rate of each model, budget and optimizer, and writes `docs/img/muon_budgets.svg`, of
`docs/results/muon.md`.
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
#: beginnings of the runs' names
MODELS = {"hybrid": "hybrid", "transformer": "its Transformer twin"}
#: optimizer -> budget -> its run with the least training loss
Best = dict[str, dict[str, dict[str, Any]]]


def best_runs(path: Path, model: str) -> Best:
    """Return the best runs of a model."""
    best: Best = {name: {} for name in NAMES}
    for row in csv.DictReader(path.open(newline="")):
        if not row["run"].startswith(model):
            continue
        run = {**row, "loss": float(row["train_loss"]), "flops": float(row["flops"])}
        there = best[row["optim.name"]].get(row["run"])
        if there is None or run["loss"] < there["loss"]:
            best[row["optim.name"]][row["run"]] = run
    return best


@plot.styled
def draw(best: dict[str, Best], fits: dict[str, dict[str, Fit]]) -> None:
    """Plot runs and fits of each model, both axes logarithmic."""
    figure, panels = plot.canvas(760, 340, columns=2, sharey=True)
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        for (name, fit), colour in zip(fits[model].items(), plot.SERIES, strict=False):
            flops = np.array([run["flops"] for run in best[model][name].values()])
            axes.plot(flops, [run["loss"] for run in best[model][name].values()], "o", color=colour, label=NAMES[name])
            line = np.geomspace(flops.min(), flops.max(), 50)
            axes.plot(line, [power_loss(fit.coefficients, {"flops": c}) for c in line], color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs", title=title)
        axes.minorticks_off()
        axes.set_yticks((2, 2.5, 3, 3.5, 4), ("2", "2.5", "3", "3.5", "4"))
    panels[0].set(ylabel="training loss per token, nats")
    panels[0].legend(frameon=False)
    title = "Training loss of small hybrids and Transformers over FLOPs with AdamW and Muon"
    plot.save(figure, DOCS / "img/muon_budgets.svg", title)


def main() -> None:
    """Fit to the budgets that both optimizers have, print, draw."""
    path = Path(sys.argv[1]) if sys.argv[1:] else DOCS / "results/muon_budgets.csv"
    best, fits = {model: best_runs(path, model) for model in MODELS}, {}
    for model, runs in best.items():
        for name, of_optimizer in runs.items():
            for budget, run in of_optimizer.items():
                rate = float(run["optim.peak_lr"])
                print(f"{budget} {name}: loss {run['loss']:.3f} at {rate:g}, {run['flops']:.3g} FLOPs")
        common = [budget for budget in runs["adamw"] if budget in runs["muon"]]
        fits[model] = {name: fit_power([each[budget] for budget in common]) for name, each in runs.items()}
        for name, fit in fits[model].items():
            print(f"{model}, {name}: {fit}")
        for budget in common:
            flops = runs["adamw"][budget]["flops"]
            share, (low, high) = flops_ratio(fits[model]["muon"], fits[model]["adamw"], flops)
            print(f"{flops:.3g} FLOPs: Muon needs {100 * share:.0f} % (95 %: {100 * low:.0f} to {100 * high:.0f})")
    draw(best, fits)


if __name__ == "__main__":
    main()
