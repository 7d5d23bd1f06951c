"""The law with a term for each kind of layer against its runs, and the file that ships it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.laws.hybrid import NAMES, fit_hybrids, hybrid_loss, hybrid_runs, shape_row
from nemotron_h.laws.law import law_named
from nemotron_h.laws.shapes import enumerate_shapes, model_named

ROWS = hybrid_runs()


def test_coefficients_come_back_from_made_up_losses() -> None:
    truth = dict(zip(NAMES, (1.5, -0.1, 0.02, 0.1, -0.05), strict=True))
    shapes = list(enumerate_shapes(model_named("nemotron_h_tiny"), 12_000_000))[::9]
    rows = [shape_row(shape, 1e6) for shape in shapes]
    rng = np.random.default_rng(0)
    noisy = [{**row, "loss": hybrid_loss(truth, row) * math.exp(0.002 * rng.normal())} for row in rows]
    fit = fit_hybrids(noisy)
    assert fit.coefficients == pytest.approx(truth, abs=0.02)
    assert 0.001 < fit.held_out_error < 0.003
    assert all(low < fit.coefficients[name] < high for name, (low, high) in fit.intervals.items())


def test_the_law_that_ships_is_the_fit_of_its_runs() -> None:
    law, _ = law_named("hybrid_tiny")
    fit = fit_hybrids(ROWS)
    assert law.coefficients == pytest.approx(fit.coefficients, abs=1e-5)
    assert law.error == f"{100 * fit.held_out_error:.1f} % on the mean of runs left out one by one"
    assert f"{len(ROWS)} runs" in law.fitted_to
    aspects = [row["hidden_size"] / row["layers"] for row in ROWS]
    assert law.aspect == pytest.approx([min(aspects), max(aspects)], abs=0.01)


def test_the_runs_have_the_parameters_that_they_say() -> None:
    tiny = model_named("nemotron_h_tiny")
    like = replace(tiny, vocab_size=1024, num_attention_heads=8, head_dim=32, mamba_state_dim=32)
    for row in ROWS:
        assert abs(row["parameters"] / 1.2e6 - 1) < 0.02
        layers = row["parameters"] - (2 * like.vocab_size + 1) * row["hidden_size"]
        assert row["mamba"] + row["attention"] + row["ffn"] == layers
        ffn = row["pattern"].count("-") * row["hidden_size"] * (2 * row["ffn_hidden_size"] + 1)
        assert row["ffn"] == ffn


def test_too_few_shapes_are_an_error() -> None:
    with pytest.raises(UserError, match="fit hybrid: 5 different values of hidden_size, layers, ffn"):
        fit_hybrids(ROWS[:5])
