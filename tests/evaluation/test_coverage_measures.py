"""Estimators of `nemotron-h coverage` against all choices of samples, in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import hypergeom

from nemotron_h.evaluation.coverage import measures


def _choices(n: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(n), k))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_coverage_is_the_share_of_choices_with_a_right_sample(n: int) -> None:
    for right in range(n + 1):
        curve = measures.pass_curve(n, right)
        for k in range(n + 1):
            share = np.mean([any(place < right for place in choice) for choice in _choices(n, k)])
            assert curve[k] == pytest.approx(share, abs=1e-15)


def test_coverage_of_many_samples_does_not_overflow() -> None:
    """Binomials of these have thousands of digits, which Python's integers hold."""
    for n, right in ((5000, 3), (5000, 2500), (4096, 4095), (3000, 0)):
        curve = measures.pass_curve(n, right)
        for k in (1, 2, 100, n // 2, n - 1, n):
            exact = 1 - math.comb(n - right, k) / math.comb(n, k)
            assert curve[k] == pytest.approx(exact, rel=1e-12, abs=1e-15)


def test_best_of_is_the_mean_over_choices() -> None:
    """Of equal scores any may be taken."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, 8):
        for _ in range(6):
            scores, right = rng.integers(0, 4, n).astype(float), rng.integers(0, 2, n).astype(float)
            for k in range(n + 1):
                taken = [0.0] if k == 0 else []
                for choice in _choices(n, k) if k else []:
                    top = max(scores[place] for place in choice)
                    taken.append(np.mean([right[place] for place in choice if scores[place] == top]))
                assert measures.best_of(scores, right, k) == pytest.approx(np.mean(taken), abs=1e-14)


def test_majority_is_the_mean_over_choices() -> None:
    """Of equally many votes any may be taken; samples without an answer do not vote; several answers may be right."""
    rng = np.random.default_rng(1)
    for n in (1, 3, 6, 9):
        for _ in range(6):
            votes = [("a", "b", "c", None)[place] for place in rng.integers(0, 4, n)]
            right = [vote in ("a", "c") for vote in votes]
            for k in range(n + 1):
                won = []
                for choice in _choices(n, k):
                    counts = Counter(votes[place] for place in choice if votes[place] is not None)
                    lead = [vote for vote, count in counts.items() if count == max(counts.values())]
                    won.append(np.mean([vote in ("a", "c") for vote in lead]) if lead else 0.0)
                assert measures.majority(votes, right, k, rng) == pytest.approx(np.mean(won), abs=1e-14)


def test_majority_of_more_choices_than_are_tried() -> None:
    """Two answers: the right one wins where it has more than half of k, which is hypergeometric."""
    n, right, k = 60, 33, 15
    assert math.comb(n, k) > measures.CHOICES
    votes = ["yes"] * right + ["no"] * (n - right)
    exact = hypergeom(n, right, k).sf(k // 2)
    tried = [measures.majority(votes, [v == "yes" for v in votes], k, np.random.default_rng(s)) for s in range(8)]
    error = math.sqrt(exact * (1 - exact) / (measures.CHOICES * len(tried)))
    assert abs(np.mean(tried) - exact) < 4 * error
    assert len({*tried}) > 1
    again = measures.majority(votes, [v == "yes" for v in votes], k, np.random.default_rng(0))
    assert again == tried[0]


def test_intervals_are_those_of_a_mean() -> None:
    """Of many values the bootstrap comes to the normal interval; the same seed draws the same."""
    values = np.random.default_rng(2).normal(size=400)
    drawn = measures.resamples(400, 3)
    low, high = measures.interval(values, drawn)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (drawn == measures.resamples(400, 3)).all()
    assert (drawn != measures.resamples(400, 4)).any()


def test_crossings() -> None:
    budgets, drawn = np.array([1.0, 2.0, 4.0, 8.0]), measures.resamples(3, 0)

    def of(*means: float) -> np.ndarray:
        return np.repeat(np.array(means)[:, None], 3, axis=1)

    fast, slow = of(0.5, 0.6, 0.65, 0.7), of(0.1, 0.6, 0.7, 0.9)
    found = measures.crossing(budgets, fast, slow, drawn)
    assert (found.seconds, found.changes) == (4.0, 1)
    assert (found.first.difference, found.first.low, found.first.high) == pytest.approx((0.4, 0.4, 0.4))
    assert found.last.difference == pytest.approx(-0.2)
    assert measures.crossing(budgets, fast, of(0.1, 0.6, 0.6, 0.6), drawn).seconds is None
    assert measures.crossing(budgets, fast, fast, drawn).seconds is None
    twice = measures.crossing(budgets, fast, of(0.6, 0.5, 0.7, 0.8), drawn)
    assert (twice.seconds, twice.changes) == (4.0, 2)
