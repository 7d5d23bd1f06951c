"""Packing conversations into windows, and sharing windows out to data-parallel ranks. No torch.

Everything is a function of the lengths, the shares and the seed, so a resumed run and every rank find the same windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_h.core.errors import UserError


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack bins by best-fit-decreasing: the longest first, each into the fullest bin that still takes it.

    Args:
        lengths: of the items, each in [1, capacity].
        capacity: of a bin.
    Returns:
        the items of every bin, by their index; equal lengths keep their order.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit into bins of {capacity}")
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct sizes of room that is left, ascending
    with_room: dict[int, list[int]] = {}  # room -> bins
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


def balanced(costs: np.ndarray, ranks: int, micro_batch_size: int) -> np.ndarray:
    """Share the windows of a global batch out so that ranks have about as much to do, in each micro-batch and in all.

    Windows are dealt from the costliest to the cheapest, back and forth over the ranks, so two ranks never differ by
    more than the costliest window. What a step learns does not depend on it: the loss is a mean over all tokens.

    Args:
        costs: of each window, [windows].
        ranks: data-parallel ranks.
        micro_batch_size: windows per micro-batch and rank.
    Returns:
        the windows of every micro-batch, [micro-batches, ranks, micro_batch_size].
    """
    laps = np.argsort(-costs, kind="stable").reshape(-1, ranks)
    laps[1::2] = laps[1::2, ::-1]
    return laps.reshape(-1, micro_batch_size, ranks).transpose(0, 2, 1)


@dataclass(frozen=True)
class Item:
    """A conversation: the number that it has in its source."""

    source: str
    number: int


class PackedOrder:
    """The windows of a run, by number, without end.

    A round takes conversations of every source in the given shares of positions, as many as its smallest source (for
    its share) has; with one source a round is an epoch. Each source is read in an order of its own for every epoch,
    rounds go on where the one before ended, and the windows of a round are shuffled.

    Args:
        lengths: source -> positions that each of its conversations takes, int [conversations], in [1, seq_length].
        shares: source -> share of all positions; sum to 1.
        seq_length: positions of a window.
        seed: of all orders.
        costs: source -> what the attention of each has to do, int64 [conversations]; the squares of `lengths` if None.
    Errors:
        UserError: a source with a share has no conversation.
    """

    def __init__(
        self,
        lengths: Mapping[str, np.ndarray],
        shares: Mapping[str, float],
        seq_length: int,
        seed: int,
        costs: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.names = sorted(name for name, share in shares.items() if share > 0)
        for name in self.names:
            if not len(lengths[name]):
                raise UserError(f"source {name} has no conversation that fits", "Raise data.seq_length.")
        self.lengths, self.shares = lengths, shares
        self.costs = costs or {name: np.asarray(lengths[name], dtype=np.int64) ** 2 for name in self.names}
        self.seq_length, self.seed = seq_length, seed
        self._totals = {name: int(lengths[name].sum(dtype=np.int64)) for name in self.names}
        self._round_positions = min(self._totals[name] / shares[name] for name in self.names)
        self._ends: list[int] = []  # number of the first window behind each round
        self._rounds: dict[int, list[list[Item]]] = {}

    def window(self, number: int) -> list[Item]:
        """Return the conversations of a window, in their order."""
        while not self._ends or self._ends[-1] <= number:
            begin = self._ends[-1] if self._ends else 0
            self._ends.append(begin + len(self.round(len(self._ends))))
        index = int(np.searchsorted(self._ends, number, side="right"))
        return self.round(index)[number - (self._ends[index - 1] if index else 0)]

    def sources(self, number: int) -> list[str]:
        """Return the names of the sources that a window has conversations of."""
        return sorted({item.source for item in self.window(number)})

    def cost(self, number: int) -> int:
        """Return a window's attention work: the sum of its conversations' squared lengths."""
        return sum(int(self.costs[item.source][item.number]) for item in self.window(number))

    def round(self, index: int) -> list[list[Item]]:
        """Return the windows of a round. Two are kept: a step may read the end of one and the beginning of the next."""
        if index not in self._rounds:
            self._rounds[index] = self._pack(index)
            if len(self._rounds) > 2:
                del self._rounds[max(self._rounds, key=lambda kept: abs(kept - index))]
        return self._rounds[index]

    def _pack(self, index: int) -> list[list[Item]]:
        items = [Item(name, number) for name in self.names for number in self._taken(name, index).tolist()]
        rng = np.random.default_rng([self.seed, index])
        items = [items[place] for place in rng.permutation(len(items)).tolist()]
        lengths = np.array([self.lengths[item.source][item.number] for item in items])
        bins = best_fit(lengths, self.seq_length)
        return [[items[place] for place in sorted(bins[number])] for number in rng.permutation(len(bins)).tolist()]

    def _taken(self, name: str, index: int) -> np.ndarray:
        """Return the numbers of a source's conversations in a round: those that begin inside its positions."""
        begin, end = (round(self.shares[name] * self._round_positions * n) for n in (index, index + 1))
        total = self._totals[name]
        parts = []
        for epoch in range(begin // total, -(-end // total)):
            rng = np.random.default_rng([self.seed, 1 + self.names.index(name), epoch])
            order = rng.permutation(len(self.lengths[name]))
            starts = epoch * total + np.cumsum(self.lengths[name][order], dtype=np.int64) - self.lengths[name][order]
            parts.append(order[(starts >= begin) & (starts < end)])
        return np.concatenate(parts)
