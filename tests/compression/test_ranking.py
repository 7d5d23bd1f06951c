"""Ranks of candidates: how two accuracies make one order, and the front that nothing beats."""

from __future__ import annotations

import numpy as np

from nemotron_h.compression.scoring import Predictions, Score, order, pareto, places


def scores(*pairs: tuple[float, float]) -> list[Score]:
    return [Score(accuracy, agreement, 3.0, 100) for accuracy, agreement in pairs]


def test_places_share_ties() -> None:
    assert places([0.5, 0.9, 0.5, 0.1]).tolist() == [2.5, 1, 2.5, 4]


def test_two_ranks_make_one() -> None:
    # places by accuracy 1 2 3 4, by agreement 4 2 1 3: sums 5 4 4 7
    assert order(scores((0.9, 0.1), (0.8, 0.5), (0.2, 0.7), (0.1, 0.4))) == [1, 2, 0, 3]


def test_ties_go_to_the_lower_loss() -> None:
    given = [Score(0.5, 0.5, 3.0, 10), Score(0.5, 0.5, 2.0, 10)]
    assert order(given) == [1, 0]


def test_the_front() -> None:
    assert pareto([3, 1, 2, 2, 4], [0.5, 0.2, 0.4, 0.3, 0.5]) == [1, 2, 0]


def test_a_score_counts_positions() -> None:
    text = np.array([[5, 1, 2, 3]])
    found = Predictions(np.array([[1, 2, 9]]), 1.5).score(text, parent=np.array([[1, 0, 9]]))
    assert found == Score(accuracy=2 / 3, agreement=2 / 3, loss=1.5, tokens=3)
