"""Fit scaling laws to rows of finished runs: coefficients with bootstrap intervals, R2, error on rows left out.

A row is a mapping with `parameters`, `tokens`, `flops` and `loss`; other columns are not looked at. Laws, with C
training FLOPs, N parameters and D tokens:

    power         L = A C^-b                         least squares of log L (Kaplan et al. 2020, arXiv 2001.08361)
    power_offset  L = E + A C^-b                     Huber loss of log L (Hoffmann et al. 2022, arXiv 2203.15556, D.2)
    chinchilla    L = E + A N^-alpha + B D^-beta     the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from nemotron_h.core.errors import UserError

Row = Mapping[str, Any]
Coefficients: TypeAlias = Mapping[str, float]
#: loss of a row under a law
Formula = Callable[[Coefficients, Row], float]
#: coefficients of rows; those of nearly the same rows are where a search may begin
Solve = Callable[[Sequence[Row], Coefficients | None], Coefficients]

#: ours: resamples of a bootstrap, and the share of them that an interval has
RESAMPLES, CONFIDENCE = 200, 0.95
#: Hoffmann et al. 2022, D.2
HUBER_DELTA = 1e-3


@dataclass(frozen=True)
class Fit:
    """A law with its coefficients.

    Attributes:
        name: of the law.
        coefficients: by name.
        formula: loss of a row.
        points: rows that it was fitted to.
        intervals: name of a coefficient -> both ends of its 95 % interval, by bootstrap over rows.
        r2: share of the losses' variance that it explains.
        held_out_error: mean of |predicted / measured - 1|, each row predicted by the fit to all others.
        resamples: coefficients of each resample of the bootstrap.
    """

    name: str
    coefficients: Coefficients
    formula: Formula = field(repr=False)
    points: int = 0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    r2: float = math.nan
    held_out_error: float = math.nan
    resamples: tuple[Coefficients, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """Return the fit in words, on one line."""
        ends = {name: f" ({low:.4g} to {high:.4g})" for name, (low, high) in self.intervals.items()}
        values = ", ".join(f"{name} = {value:.4g}{ends.get(name, '')}" for name, value in self.coefficients.items())
        error = f"{100 * self.held_out_error:.2g} % on points left out"
        return f"{self.name}: {values}; R2 {self.r2:.4f}, error {error}, {self.points} points"

    def predict(self, row: Row) -> float:
        """Return the loss of a row, which needs the columns of the law alone."""
        return float(self.formula(self.coefficients, row))


def fit_law(
    name: str,
    rows: Sequence[Row],
    columns: Sequence[str],
    solve: Solve,
    formula: Formula,
    coefficients: int,
    resamples: int = RESAMPLES,
) -> Fit:
    """Return a law fitted to rows.

    Args:
        columns: that the law reads, beside `loss`.
        solve: gives the coefficients of rows.
        coefficients: how many there are; one row more is needed, so that each can be left out.
        resamples: of the bootstrap, whose generator has seed 0.
    Errors:
        UserError: too few different rows, or a value that is missing or not positive; names row and column.
    """
    check_rows(name, rows, columns, coefficients + 1)
    solved = solve(rows, None)
    rng, samples = np.random.default_rng(0), []
    while len(samples) < resamples:
        chosen = [rows[number] for number in rng.integers(len(rows), size=len(rows))]
        if len(_different(chosen, columns)) >= coefficients:  # fewer have no unique fit
            samples.append(solve(chosen, solved))
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return Fit(
        name,
        solved,
        formula,
        points=len(rows),
        intervals={key: _interval([sample[key] for sample in samples], ends) for key in solved} if samples else {},
        r2=r_squared([formula(solved, row) for row in rows], [row["loss"] for row in rows]),
        held_out_error=_held_out_error(rows, solve, formula, solved),
        resamples=tuple(samples),
    )


def check_rows(name: str, rows: Sequence[Row], columns: Sequence[str], least: int) -> None:
    """Refuse rows that a law cannot be fitted to; arguments and errors as of `fit_law`."""
    for number, row in enumerate(rows, 1):
        for column in (*columns, "loss"):
            value = row.get(column)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(
                    f"fit {name}: row {number}: {column} = {value!r} is not a positive number",
                    hint=f"the law needs {', '.join(columns)} and loss in every row; leave out runs that have none",
                )
    if len(_different(rows, columns)) < least:
        raise UserError(
            f"fit {name}: {len(_different(rows, columns))} different values of {', '.join(columns)}; "
            f"it has {least - 1} coefficients and needs {least}",
            hint=f"add runs that differ in {' or '.join(columns)}, or choose a law with fewer coefficients: "
            f"{', '.join(FITS)}",
        )


def r_squared(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return 1 - the sum of squared errors over that around the mean; NaN where all are equal."""
    errors, spread = np.subtract(predicted, measured), np.subtract(measured, np.mean(measured))
    return float(1 - (errors @ errors) / (spread @ spread)) if spread.any() else math.nan


def relative_errors(fit: Fit, rows: Iterable[Row]) -> list[float]:
    """Return |predicted / measured - 1| of rows."""
    return [abs(fit.predict(row) / row["loss"] - 1) for row in rows]


def _different(rows: Sequence[Row], columns: Sequence[str]) -> set[tuple[float, ...]]:
    return {tuple(row[column] for column in columns) for row in rows}


def _interval(values: Sequence[float], ends: tuple[float, float]) -> tuple[float, float]:
    low, high = np.percentile(values, ends)
    return float(low), float(high)


def _held_out_error(rows: Sequence[Row], solve: Solve, formula: Formula, near: Coefficients) -> float:
    errors = []
    for number, row in enumerate(rows):
        others = solve([*rows[:number], *rows[number + 1 :]], near)
        errors.append(abs(formula(others, row) / row["loss"] - 1))
    return float(np.mean(errors))


def power_loss(c: Coefficients, row: Row) -> float:
    """Return A C^-b."""
    return c["A"] * row["flops"] ** -c["b"]


def power_flops(fit: Fit | Coefficients, loss: float) -> float:
    """Return the FLOPs at which a power law reaches a loss."""
    c = fit.coefficients if isinstance(fit, Fit) else fit
    return (c["A"] / loss) ** (1 / c["b"])


def _solve_power(rows: Sequence[Row], _: Coefficients | None) -> Coefficients:
    flops, loss = (np.log([row[column] for row in rows]) for column in ("flops", "loss"))
    slope, intercept = np.polyfit(flops, loss, 1)
    return {"A": float(np.exp(intercept)), "b": float(-slope)}


def fit_power(rows: list[Row]) -> Fit:
    """Return the power law of training FLOPs; errors as of `fit_law`."""
    return fit_law("power", rows, ("flops",), _solve_power, power_loss, 2)


def flops_ratio(new: Fit, old: Fit, flops: float) -> tuple[float, tuple[float, float]]:
    """Return the share of `flops` that the runs of a power law need for the loss that those of another have there.

    Args:
        new, old: fitted by `fit_power`, or stated.
        flops: of `old`.
    Returns:
        the share, and its 95 % interval over the resamples of both; NaN where they have none.
    """
    pairs = [(new.coefficients, old.coefficients), *zip(new.resamples, old.resamples, strict=False)]
    shares = [power_flops(a, power_loss(b, {"flops": flops})) / flops for a, b in pairs]
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)
    return shares[0], _interval(shares[1:], ends) if len(shares) > 1 else (math.nan, math.nan)


def huber_fit(starts: Iterable[Sequence[float]], residuals: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the parameters with the least Huber loss of residuals of log L, over fits from several starts."""
    from scipy.optimize import least_squares  # takes longer to import than a fit without it

    fits = (
        least_squares(residuals, start, loss="huber", f_scale=HUBER_DELTA, x_scale="jac", max_nfev=100)
        for start in starts
    )
    return min(fits, key=lambda each: each.cost).x


def _solve_offset(rows: Sequence[Row], near: Coefficients | None) -> Coefficients:
    """Return E, A and b, of which log E and log A are fitted; C is measured in units of its middle."""
    flops, loss = (np.array([row[column] for row in rows], dtype=float) for column in ("flops", "loss"))
    middle = np.exp(np.log(flops).mean())

    def residuals(p: np.ndarray) -> np.ndarray:
        e, a, b = p
        return np.logaddexp(e, a - b * np.log(flops / middle)) - np.log(loss)

    least, mean = loss.min(), loss.mean()
    starts = [
        (np.log(share * least), np.log(mean - share * least), b) for share in (0.3, 0.7, 0.95) for b in (0.1, 0.4)
    ]
    if near:
        starts = [(np.log(near["E"]), np.log(near["A"]) - near["b"] * np.log(middle), near["b"])]
    e, a, b = huber_fit(starts, residuals)
    return {"E": float(np.exp(e)), "A": float(np.exp(a) * middle**b), "b": float(b)}


def fit_power_offset(rows: list[Row]) -> Fit:
    """Return the power law of training FLOPs above a loss that no compute removes; errors as of `fit_law`."""
    return fit_law(
        "power_offset", rows, ("flops",), _solve_offset, lambda c, row: c["E"] + power_loss(c, row), 3, RESAMPLES // 4
    )


def chinchilla_loss(c: Coefficients, row: Row) -> float:
    """Return E + A N^-alpha + B D^-beta."""
    return c["E"] + c["A"] * row["parameters"] ** -c["alpha"] + c["B"] * row["tokens"] ** -c["beta"]


def _solve_chinchilla(rows: Sequence[Row], near: Coefficients | None) -> Coefficients:
    columns = ("parameters", "tokens", "loss")
    n, d, loss = (np.log([float(row[column]) for row in rows]) for column in columns)
    n0, d0 = n.mean(), d.mean()

    def residuals(p: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = p
        return np.logaddexp(np.logaddexp(e, a - alpha * (n - n0)), b - beta * (d - d0)) - loss

    least, mean = np.exp(loss.min()), np.exp(loss.mean())
    starts = []
    for share in (0.4, 0.8):
        rest = np.log((mean - share * least) / 2)
        starts += [(np.log(share * least), rest, alpha, rest, beta) for alpha in (0.2, 0.5) for beta in (0.2, 0.5)]
    if near:
        alpha, beta = near["alpha"], near["beta"]
        ends = np.log(near["A"]) - alpha * n0, alpha, np.log(near["B"]) - beta * d0, beta
        starts = [(np.log(near["E"]), *ends)]
    e, a, alpha, b, beta = huber_fit(starts, residuals)
    return {
        "E": float(np.exp(e)),
        "A": float(np.exp(a + alpha * n0)),
        "B": float(np.exp(b + beta * d0)),
        "alpha": float(alpha),
        "beta": float(beta),
    }


def fit_chinchilla(rows: list[Row]) -> Fit:
    """Return the law of parameters and tokens; errors as of `fit_law`."""
    columns = ("parameters", "tokens")
    return fit_law("chinchilla", rows, columns, _solve_chinchilla, chinchilla_loss, 5, RESAMPLES // 4)


#: name, as sweeps have it -> fit of rows
FITS: dict[str, Callable[[list[Row]], Fit]] = {
    "power": fit_power,
    "power_offset": fit_power_offset,
    "chinchilla": fit_chinchilla,
}
