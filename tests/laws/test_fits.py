"""Fits give back the coefficients that rows were made of, and say how well; too few rows are an error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.laws.fits import FITS, Fit, chinchilla_loss, fit_power, flops_ratio, power_loss

#: stated by Moonlight (arXiv 2502.16982, figure 3), C in PFLOP/s-days
MUON, ADAMW = {"A": 2.506, "b": 0.052}, {"A": 2.608, "b": 0.054}


def power_rows(c: dict[str, float], noise: float = 0.0, count: int = 8) -> list[dict[str, float]]:
    rng = np.random.default_rng(1)
    flops = np.geomspace(1e15, 1e18, count)
    return [{"flops": f, "loss": power_loss(c, {"flops": f}) * math.exp(noise * rng.normal())} for f in flops]


def test_a_power_law_comes_back_exactly() -> None:
    fit = fit_power(power_rows(ADAMW))
    assert fit.coefficients == pytest.approx(ADAMW, rel=1e-9)
    assert fit.r2 == pytest.approx(1)
    assert fit.held_out_error < 1e-9
    assert str(fit).startswith("power: A = 2.608 (2.608 to 2.608), b = 0.054 (0.054 to 0.054); R2 1.0000, error ")
    assert str(fit).endswith(" % on points left out, 8 points")


def test_intervals_have_the_truth_and_grow_with_noise() -> None:
    widths = []
    for noise in (0.002, 0.02):
        fit = fit_power(power_rows(ADAMW, noise, 20))
        low, high = fit.intervals["b"]
        assert low < ADAMW["b"] < high
        assert 0.3 * noise < fit.held_out_error < 3 * noise
        widths.append(high - low)
    assert widths[1] > 5 * widths[0]


def test_an_offset_is_told_from_a_power_law() -> None:
    truth = {"E": 1.7, "A": 400.0, "b": 0.15}
    rows = [{**row, "loss": truth["E"] + power_loss(truth, row)} for row in power_rows(truth, count=9)]
    fit = FITS["power_offset"](rows)
    assert fit.coefficients == pytest.approx(truth, rel=0.02)
    assert fit.held_out_error < 1e-3 < fit_power(rows).held_out_error


def test_chinchilla_s_law_comes_back() -> None:
    """With the paper's coefficients (Hoffmann et al. 2022, D.3)."""
    truth = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    rows = [
        {"parameters": n, "tokens": d, "loss": chinchilla_loss(truth, {"parameters": n, "tokens": d})}
        for n in (5e7, 2e8, 1e9)
        for d in (1e9, 8e9, 6e10)
    ]
    fit = FITS["chinchilla"](rows)
    assert fit.coefficients == pytest.approx(truth, rel=0.05)
    assert fit.r2 > 0.9999


@pytest.mark.parametrize(("compute", "share"), [(1, 0.46), (4, 0.49), (10, 0.51), (100, 0.55)])
def test_muon_s_published_laws_give_its_share_of_flops(compute: float, share: float) -> None:
    ratio, interval = flops_ratio(*(Fit("power", c, power_loss) for c in (MUON, ADAMW)), compute)
    assert ratio == pytest.approx(share, abs=0.006)
    assert all(math.isnan(end) for end in interval)


def test_the_ratio_of_two_fits_has_an_interval() -> None:
    new, old = fit_power(power_rows(MUON, 0.001, 12)), fit_power(power_rows(ADAMW, 0.001, 12))
    ratio, (low, high) = flops_ratio(new, old, 1e16)
    assert low < ratio < high
    truth = (MUON["A"] / power_loss(ADAMW, {"flops": 1e16})) ** (1 / MUON["b"]) / 1e16
    assert low < truth < high


@pytest.mark.parametrize(("name", "least"), [("power", 3), ("power_offset", 4), ("chinchilla", 6)])
def test_too_few_points_are_one_error(name: str, least: int) -> None:
    rows = [{"flops": 1e15 * 2**n, "parameters": 1e6 * 2**n, "tokens": 1e7, "loss": 5 - 0.1 * n} for n in range(least)]
    with pytest.raises(UserError, match=f"{least - 1} different values of .* needs {least}") as error:
        FITS[name]([*rows[:-1], {**rows[0], "loss": 5.1}])  # a seed is no other point
    assert "add runs that differ" in error.value.hint


@pytest.mark.parametrize("value", [None, math.nan, 0, "4.2", True])
def test_a_row_without_a_number_is_named(value: object) -> None:
    rows = power_rows(ADAMW)
    rows[2] = {**rows[2], "loss": value}
    with pytest.raises(UserError, match="row 3: loss = "):
        fit_power(rows)
