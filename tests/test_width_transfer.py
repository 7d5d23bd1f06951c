"""`demos/width_transfer.py` and the sweep that it reads: the twins, and what it makes of their losses."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nemotron_h.core.files import write_csv
from nemotron_h.launch.place import HERE
from nemotron_h.recipe.checks import definition_of
from nemotron_h.sweep.file import locate, read_sweep
from nemotron_h.sweep.points import planned_row, points_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "demos"))
    import width_transfer

    yield width_transfer
    sys.path.remove(str(ROOT / "demos"))


def test_twins_differ_in_multipliers_and_initial_weights_alone(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the sweep are those that the script looks for."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("nemotron_h.sweep.points._check_data", lambda points, origin: None)
    points = points_of(read_sweep(locate("width")), HERE)
    write_csv([{**planned_row(p), "state": "finished", "validation_loss": 1.0} for p in points], tmp_path / "sweep.csv")
    losses = demo.measured(tmp_path / "sweep.csv")
    assert {demo.name_of(v, w, r) for v in demo.VARIANTS for w in demo.WIDTHS for r in demo.RATES} == {*losses}
    models = {p.labels["run"]: definition_of(p.run.recipe, "x") for p in points}
    for width in demo.WIDTHS:
        none, rule, scaled = (models[f"{variant}-{width}"] for variant in demo.VARIANTS)
        assert (none.scales.ssm_in, rule.scales.ssm_in, scaled.scales.ssm_in) == (1, 1280 / width, 1280 / width)
        assert (none.init_std, rule.init_std, scaled.init_std) == (0.02, 0.02, 0.02 * math.sqrt(width / 1280))
        assert none.parameters == rule.parameters == scaled.parameters
        assert none.hidden_size == width


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
