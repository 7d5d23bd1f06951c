"""From scores to an order of candidates: how the two accuracies combine, and which candidates nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemotron_h.compression.scoring import Score


def places(values: Sequence[float]) -> np.ndarray:
    """The place of each value, the largest first, from 1; equal values share the mean of their places."""
    given = np.asarray(values, dtype=float)
    larger = (given[None, :] > given[:, None]).sum(1)
    equal = (given[None, :] == given[:, None]).sum(1)
    return larger + (equal + 1) / 2


def order(scores: Sequence[Score], combine: str = "sum") -> list[int]:
    """Numbers of the candidates, the best first.

    Args:
        combine: one of `schema.RANKS`: `sum` of the two places, the `worst` of them, or the place by `accuracy` or
            `agreement` alone. The paper says that both are used (3.3), not how. Ties: lower loss, then number.
    """
    accuracy = places([score.accuracy for score in scores])
    agreement = places([score.agreement for score in scores])
    combined = {
        "sum": accuracy + agreement,
        "worst": np.maximum(accuracy, agreement),
        "accuracy": accuracy,
        "agreement": agreement,
    }[combine]
    return sorted(range(len(scores)), key=lambda number: (combined[number], scores[number].loss, number))


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Numbers of the entries that no other beats with a lower or equal cost and a higher value, cheapest first."""
    front: list[int] = []
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], -values[n], n)):
        if not front or values[number] > values[front[-1]]:
            front.append(number)
    return front
