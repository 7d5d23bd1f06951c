"""Our fit of Morph's published runs against what its authors' script gives for them, and the file that ships it."""

from __future__ import annotations

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.laws.fits import Fit, r_squared, relative_errors
from nemotron_h.laws.law import law_named
from nemotron_h.laws.morph import fit_shapes, fitted_runs, published_runs
from nemotron_h.laws.shapes import model_named

ROWS = published_runs()
LOSSES = [row["loss"] for row in ROWS]


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fit_shapes(fitted_runs(ROWS))


def predicted(fit: Fit) -> list[float]:
    return [fit.predict(row) for row in ROWS]


def test_the_runs_are_those_of_the_authors() -> None:
    """24 runs at 20 tokens per parameter and 3 at 160 are fitted; 35, 23 and 18 are there."""
    counts = [sum(row["per_parameter"] == each for row in ROWS) for each in (20, 40, 160)]
    assert counts == [35, 23, 18]
    fitted = fitted_runs(ROWS)
    assert [sum(row["per_parameter"] == each for row in fitted) for each in (20, 40, 160)] == [24, 0, 3]


def test_coefficients_and_r2_are_those_of_the_authors_script(fit: Fit) -> None:
    stated = {"A": 5.475e4, "B": 7.784e5, "E": 2.4475, "alpha": 0.6146, "gamma": 1.146e-3}
    assert fit.coefficients == pytest.approx(stated, rel=3e-4)
    assert r_squared(predicted(fit), LOSSES) == pytest.approx(0.9982, abs=5e-5)
    assert np.mean(np.subtract(predicted(fit), LOSSES) ** 2) == pytest.approx(5.5e-4, rel=0.02)


def test_errors_at_1b_are_as_stated_with_the_shape_and_without(fit: Fit) -> None:
    largest = [row for row in ROWS if row["size"] == "1B"]
    errors = relative_errors(fit, largest)
    assert [min(errors), max(errors)] == pytest.approx([0.0069, 0.0115], abs=1e-4)
    plain = fit_shapes(fitted_runs(ROWS), with_shape=False)
    errors = relative_errors(plain, largest)
    assert [min(errors), max(errors)] == pytest.approx([0.028, 0.041], abs=6e-4)
    assert r_squared(predicted(plain), LOSSES) == pytest.approx(0.9895, abs=5e-5)
    order = np.argsort([row["loss"] for row in largest])
    assert list(np.argsort([fit.predict(row) for row in largest])) == list(order)


def test_the_law_that_ships_is_the_fit(fit: Fit) -> None:
    law, _ = law_named("morph")
    assert law.coefficients == pytest.approx(fit.coefficients, rel=3e-4)
    aspects = [row["hidden_size"] / row["layers"] for row in ROWS]
    assert law.aspect == pytest.approx([min(aspects), max(aspects)], abs=0.5)
    held = [row for row in ROWS if row not in fitted_runs(ROWS)]
    assert len(held) == 49
    errors = relative_errors(fit, held)
    mean, most = (f"{100 * part:.1f} %" for part in (np.mean(errors), max(errors)))
    assert law.error == f"{mean} on the mean of 49 runs that it was not fitted to, {most} at most"


def test_a_law_of_transformers_is_of_transformers() -> None:
    law, name = law_named("morph")
    with pytest.raises(UserError, match="morph is a law of family transformer; nemotron_h_tiny is of nemotron_h"):
        law.check_family(model_named("nemotron_h_tiny"), name)


def test_a_law_counts_layers_as_its_runs_do(fit: Fit) -> None:
    """`nemotron_t_8b` has 32 layers of attention and FFN, 64 of ours."""
    law, _ = law_named("morph")
    model = model_named("nemotron_t_8b")
    row = {"parameters": model.parameters, "tokens": 1e12, "hidden_size": 4096, "layers": 32}
    assert law.loss(model, 1e12) == pytest.approx(fit.predict(row), rel=1e-4)


def test_too_few_runs_are_an_error() -> None:
    with pytest.raises(UserError, match="fit morph: 4 different values"):
        fit_shapes(ROWS[:1] * 3 + ROWS[3:6])
