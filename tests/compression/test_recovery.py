"""What is said of a distillation's recovery."""

from __future__ import annotations

import pytest

from nemotron_h.compression.recovery import recovered, sentence


def test_the_share_of_the_cost_that_came_back() -> None:
    assert recovered(parent=4.0, pruned=5.0, child=4.1) == pytest.approx(0.9)
    assert recovered(parent=4.0, pruned=5.0, child=5.5) == pytest.approx(-0.5)
    assert sentence(4.0, 5.0, 4.1) == "90.0% of the gap recovered"


def test_a_share_of_next_to_nothing_is_said_to_be_one() -> None:
    said = sentence(4.0, 4.004, 4.002)
    assert said.startswith("50.0% of the gap recovered, of a gap of 0.10% of the loss, which is too small to tell")


def test_pruning_that_cost_nothing_has_no_share() -> None:
    assert recovered(4.0, 3.9, 3.8) is None
    assert sentence(4.0, 4.0, 3.8) == "pruning cost nothing on this text, so there was nothing to recover"
