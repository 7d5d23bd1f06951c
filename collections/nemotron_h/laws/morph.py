"""Law of depth and width of Transformers (Morph: Bian et al. 2025, arXiv 2501.18107), fitted to its published runs.

    L = (E + A N^-alpha + B D^-alpha) (1 + gamma (d / n)^alpha)

with N parameters, D tokens, width d and n layers of attention and feed-forward; `configs/laws/morph.yaml` has the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.laws.fits import Coefficients, Fit, Row, fit_law
from nemotron_h.recipe.compose import configs_dir

COLUMNS = ("parameters", "tokens", "hidden_size", "layers")
#: tokens of a run over those of its shortest
LONGER = {"loss": 1, "loss_40n": 2, "loss_160n": 8}
#: groups of runs that the authors fit: at 20 tokens per parameter, and the smallest at 160
FITTED, OVER_TRAINED = ("80M", "116M", "164M", "237M", "313M"), ("80M",)


def published_runs(file: Path | None = None) -> list[dict[str, Any]]:
    """Return the published runs as rows of `COLUMNS`, `loss`, `size` and `per_parameter` (20, 40 or 160 tokens)."""
    content = read_yaml(file or configs_dir() / "laws" / "morph.yaml")
    rows = []
    for values in content["runs"]:
        run = dict(zip(content["columns"], values, strict=True))
        for column, longer in LONGER.items():
            if run[column] is not None:
                of_run = {"tokens": run["tokens"] * longer, "loss": run[column], "per_parameter": 20 * longer}
                rows.append({**{key: run[key] for key in ("size", *COLUMNS)}, **of_run})
    return rows


def fitted_runs(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that the authors' coefficients are of: 24 at 20 tokens per parameter and 3 at 160."""
    chosen = {20: FITTED, 40: (), 160: OVER_TRAINED}
    return [row for row in rows if row["size"] in chosen[row["per_parameter"]]]


def shape_loss(c: Coefficients, row: Row) -> float:
    """Return the law's loss."""
    return float(_loss(_columns([row]), c["E"], c["A"], c["B"], c["alpha"], c["gamma"])[0])


def fit_shapes(rows: Sequence[Row], with_shape: bool = True) -> Fit:
    """Return the law fitted by least squares of the loss, as the authors do.

    Args:
        rows: `COLUMNS` and `loss`.
        with_shape: False leaves the second factor out.
    Errors:
        UserError: as of `fit_law`.
    """
    names = ("E", "A", "B", "alpha", "gamma")[: 5 if with_shape else 4]

    def solve(some: Sequence[Row], _: Coefficients | None) -> Coefficients:
        from scipy.optimize import curve_fit  # takes longer to import than everything else here

        # A and B are of the size of N^alpha: their logarithms have the size of the others
        def loss(x: np.ndarray, e: float, a: float, b: float, alpha: float, gamma: float = 0.0) -> np.ndarray:
            return _loss(x, e, np.exp(a), np.exp(b), alpha, gamma)

        start = (2.0, 10.0, 12.0, 0.5, 1e-3)[: len(names)]
        values, _ = curve_fit(loss, _columns(some), [row["loss"] for row in some], p0=start, maxfev=100_000)
        solved = dict(zip(names, map(float, values), strict=True))
        return {"gamma": 0.0, **solved, "A": float(np.exp(solved["A"])), "B": float(np.exp(solved["B"]))}

    return fit_law("morph", rows, COLUMNS, solve, shape_loss, len(names), resamples=0)


def _columns(rows: Sequence[Row]) -> np.ndarray:
    return np.array([[row[column] for column in COLUMNS] for row in rows], dtype=float).T


def _loss(x: np.ndarray, e: float, a: float, b: float, alpha: float, gamma: float) -> np.ndarray:
    n, d, hidden, layers = x
    return (e + a * n**-alpha + b * d**-alpha) * (1 + gamma * (hidden / layers) ** alpha)
