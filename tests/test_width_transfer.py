"""`demos/width_transfer.py`: its runs are recipes, and what it makes of their losses."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "demos"))
    import width_transfer

    yield width_transfer
    sys.path.remove(str(ROOT / "demos"))


def test_twins_differ_in_multipliers_and_initial_weights_alone(demo: ModuleType) -> None:
    models = {}
    for variant in demo.VARIANTS:
        recipe = compose("falcon_h1_tiny/pretrain", demo.settings(variant, 256, 2**-8))
        models[variant] = definition_of(recipe, "x")
    none, rule, scaled = models.values()
    assert (none.scales.ssm_in, rule.scales.ssm_in, scaled.scales.ssm_in) == (1, 5, 5)
    assert (none.init_std, rule.init_std, scaled.init_std) == (0.02, 0.02, pytest.approx(0.02 / math.sqrt(5)))
    assert none.parameters == rule.parameters == scaled.parameters


def test_the_optimum_of_a_parabola_over_the_logarithm(demo: ModuleType) -> None:
    at = math.log2(3e-3)
    assert demo.optimum([(math.log2(rate) - at) ** 2 for rate in demo.RATES]) == pytest.approx(3e-3)
    assert math.isnan(demo.optimum(list(range(len(demo.RATES)))))


def test_the_table_has_the_lowest_loss_in_bold(demo: ModuleType) -> None:
    losses = {
        demo.name_of(variant, width, rate): width + abs(math.log2(rate) + 8)
        for variant in demo.VARIANTS
        for width in demo.WIDTHS
        for rate in demo.RATES
    }
    first, *_ = [row for row in demo.table(losses).splitlines() if row.startswith("| no")]
    assert first == "| no multipliers | 64 | 66.000 | 65.000 | **64.000** | 65.000 | 66.000 | 3.9e-03 |"
