"""Packing: every conversation once, no window too full, the same for the same seed, and ranks with equal work."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.packing import PackedOrder, balanced, best_fit


def lengths(count: int, seed: int = 0, longest: int = 512) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4.5, 0.8, count).astype(int), 1, longest)


def naive_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """The definition, bin by bin."""
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [capacity - sum(sizes[i] for i in b) for b in bins]
        fitting = [number for number, left in enumerate(room) if left >= sizes[item]]
        if fitting:
            bins[min(fitting, key=lambda number: room[number])].append(item)
        else:
            bins.append([item])
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_its_definition(seed: int) -> None:
    sizes = lengths(150, seed)
    found, expected = best_fit(sizes, 512), naive_best_fit(sizes.tolist(), 512)
    assert sorted(i for b in found for i in b) == list(range(150))
    # which of several bins with equal room is taken is free; what is left of them all is not
    assert sorted(sizes[b].sum() for b in found) == sorted(sizes[b].sum() for b in expected)


def test_best_fit_fills_windows() -> None:
    sizes = lengths(5000)
    bins = best_fit(sizes, 512)
    assert max(sizes[b].sum() for b in bins) <= 512
    assert sizes.sum() / (len(bins) * 512) > 0.99
    assert best_fit([], 512) == []
    with pytest.raises(ValueError, match="513"):
        best_fit([1, 513], 512)


def test_one_source_is_read_once_per_round_in_another_order() -> None:
    order = PackedOrder({"a": lengths(300)}, {"a": 1.0}, 512, seed=3)
    rounds = [order.round(n) for n in range(3)]
    for windows in rounds:
        assert sorted(item.number for window in windows for item in window) == list(range(300))
        assert max(sum(order.lengths["a"][i.number] for i in w) for w in windows) <= 512
    assert rounds[0] != rounds[1]
    joined = [window for windows in rounds for window in windows]
    again = PackedOrder({"a": lengths(300)}, {"a": 1.0}, 512, seed=3)
    for number in (len(joined) - 1, 0, len(rounds[0]), 5):  # in any order, as a resumed run asks
        assert again.window(number) == joined[number]
    assert PackedOrder({"a": lengths(300)}, {"a": 1.0}, 512, seed=4).round(0) != rounds[0]


def test_shares_are_of_positions_and_every_source_is_read_evenly() -> None:
    sizes = {"small": lengths(100, 1), "large": lengths(1000, 2), "unused": lengths(10, 3)}
    shares = {"small": 0.4, "large": 0.6, "unused": 0.0}
    order = PackedOrder(sizes, shares, 512, seed=0)
    items = [item for n in range(40) for window in order.round(n) for item in window]
    positions = Counter()
    for item in items:
        positions[item.source] += int(sizes[item.source][item.number])
    total = sum(positions.values())
    assert {name: pytest.approx(count / total, abs=0.002) for name, count in positions.items()} == {
        "small": 0.4,
        "large": 0.6,
    }
    for name in ("small", "large"):
        uses = Counter(item.number for item in items if item.source == name)
        assert len(uses) == len(sizes[name])
        assert max(uses.values()) - min(uses.values()) <= 1
    with pytest.raises(UserError, match="source none has no conversation"):
        PackedOrder({"none": lengths(0)}, {"none": 1.0}, 512, seed=0)


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 2), (2, 1), (4, 2), (8, 1)])
def test_balancing_deals_every_window_once_and_evenly(ranks: int, micro_batch_size: int) -> None:
    order = PackedOrder({"a": lengths(3000)}, {"a": 1.0}, 512, seed=0)
    dealt, in_order = [], []
    for batch in range(4):
        costs = np.array([order.cost(n) for n in range(32 * batch, 32 * batch + 32)])
        shared = balanced(costs, ranks, micro_batch_size)
        assert shared.shape == (32 // (ranks * micro_batch_size), ranks, micro_batch_size)
        assert sorted(shared.flatten().tolist()) == list(range(32))
        loads = costs[shared].sum(axis=(0, 2))
        assert loads.max() - loads.min() <= costs.max()
        dealt.append(loads.max() / loads.mean())
        in_order.append(costs.reshape(ranks, -1).sum(axis=1).max() / costs.mean() / (32 // ranks))
    if ranks > 1:
        assert np.mean(dealt) < 1.12
        assert np.mean(dealt) - 1 < 0.5 * (np.mean(in_order) - 1)
