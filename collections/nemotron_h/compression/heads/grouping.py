"""Split heads into groups of one size with the largest summed similarity inside of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np

Groups = tuple[tuple[int, ...], ...]
#: ours: all ways are tried where there are no more than so many, 16 heads in two groups among them
_TRY_ALL = 10_000
#: starts of the search otherwise (fpcsong/mha2gqa: 200, each with 3,000 random exchanges that are kept if better)
_STARTS = 200


def best_groups(similarity: np.ndarray, size: int, seed: int = 0) -> Groups:
    """Return the groups, each ascending, in the order of their first heads.

    All ways of splitting are tried where they are few; else the best of random starts that exchange two heads, those
    that gain most, until none gain.

    Args:
        similarity: of each two heads, symmetric, [heads, heads].
        size: heads of a group; divides their number.
        seed: of the starts.
    """
    heads = len(similarity)
    if count_ways(heads, size) <= _TRY_ALL:
        return max(_ways(tuple(range(heads)), size), key=lambda groups: inside(similarity, groups))
    rng = np.random.default_rng(seed)
    tops = (_climb(similarity, rng.permutation(heads) // size) for _ in range(_STARTS))
    return max(tops, key=lambda groups: inside(similarity, groups))


def count_ways(heads: int, size: int) -> int:
    """Return in how many ways heads split into groups of `size`."""
    groups = heads // size
    return math.factorial(heads) // (math.factorial(size) ** groups * math.factorial(groups))


def inside(similarity: np.ndarray, groups: Groups) -> float:
    """Return the sum of the similarity of each two heads of a group."""
    return math.fsum(similarity[a, b] for group in groups for a, b in combinations(group, 2))


def _ways(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    if not heads:
        yield ()
        return
    for others in combinations(heads[1:], size - 1):
        rest = tuple(head for head in heads[1:] if head not in others)
        for groups in _ways(rest, size):
            yield ((heads[0], *others), *groups)


def _climb(similarity: np.ndarray, group: np.ndarray) -> Groups:
    """Exchange heads until no exchange gains; `group` [heads] is the group of each."""
    between = similarity - np.diag(similarity.diagonal())
    group = group.copy()
    every = np.arange(len(group))
    while True:
        members = group[:, None] == np.arange(group.max() + 1)
        to = between @ members  # [heads, groups]
        own = to[every, group]
        theirs = to[:, group]  # similarity of each head to the group of each other
        gain = theirs + theirs.T - own[:, None] - own - 2 * between
        gain[group[:, None] == group] = 0
        a, b = np.unravel_index(gain.argmax(), gain.shape)
        if gain[a, b] <= 1e-12 * np.abs(between).max():
            return tuple(sorted(tuple(np.flatnonzero(each).tolist()) for each in members.T))
        group[a], group[b] = group[b], group[a]
