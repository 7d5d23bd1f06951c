"""The integer program of a search: what HiGHS is given (`scipy.optimize.milp`), and what it answers.

Costs are exact: what HiGHS takes for feasible within its tolerance and is not, is excluded, and it solves again.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from nemotron_h.compression.puzzle.choices import Limit, Slots, solution_of
from nemotron_h.core.errors import UserError

#: ours: where HiGHS stops: at the optimum but for this share of it, or after so many nodes, which take seconds with 118
#: slots of 54 choices; a limit of seconds alone would make the answer depend on the machine's load
_RELATIVE_GAP, _NODES = 1e-6, 2000
#: ours: size of limits and objective for HiGHS, whose tolerances are absolute (1e-6)
_SCALE = 1e4
_OPTIMAL, _INFEASIBLE = 0, 2  # `status` of milp


@dataclass(frozen=True)
class Optimum:
    """Picks of a program, its lower bound on the weights' sum, and if it is known that none are better."""

    picks: tuple[int, ...]
    bound: float
    proved: bool


@dataclass
class _Rows:
    """Sparse linear constraints, row by row."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, columns: Mapping[int, float], lower: float, upper: float) -> None:
        self.entries += [(len(self.lower), column, value) for column, value in columns.items()]
        self.lower.append(lower)
        self.upper.append(upper)

    def constraint(self, columns: int) -> LinearConstraint:
        row, column, value = zip(*self.entries, strict=True)
        matrix = coo_array((value, (row, column)), shape=(len(self.lower), columns)).tocsc()
        return LinearConstraint(matrix, self.lower, self.upper)


class Program:
    """Everything but the limits: choices in columns, slot after slot, then a column for each name of each group."""

    def __init__(
        self,
        slots: Slots,
        earlier: Sequence[Sequence[int]],
        alpha: float,
        equal: Sequence[Sequence[int]],
        exempt: Collection[str],
    ) -> None:
        self.slots, self.earlier, self.alpha, self.equal, self.exempt = slots, list(earlier), alpha, equal, exempt
        self.begins = np.cumsum([0, *map(len, slots)])
        self.columns = self.choices = int(self.begins[-1])
        self.rows = _Rows()
        for begin, end in zip(self.begins[:-1], self.begins[1:], strict=True):
            self.rows.add(dict.fromkeys(range(begin, end), 1.0), 1, 1)
        for picks in earlier:
            # a product such as 0.29 * 100 is a little below its integer
            self.rows.add(self._row(picks), 0, math.floor(alpha * len(slots) + 1e-9))
        for group in equal:
            self._add_group(group)

    def _row(self, picks: Sequence[int]) -> dict[int, float]:
        return {int(begin) + pick: 1.0 for begin, pick in zip(self.begins[:-1], picks, strict=True)}

    def _add_group(self, group: Sequence[int]) -> None:
        names = {choice.name for slot in group for choice in self.slots[slot]}.difference(self.exempt)
        shared = {name: self.columns + number for number, name in enumerate(sorted(names))}
        self.columns += len(shared)
        self.rows.add(dict.fromkeys(shared.values(), 1.0), 0, 1)
        for slot in group:
            for number, choice in enumerate(self.slots[slot]):
                if choice.name in shared:
                    self.rows.add({int(self.begins[slot]) + number: 1.0, shared[choice.name]: -1.0}, -1, 0)

    def costs(self, resource: str) -> np.ndarray:
        """Return the costs of all choices, [choices]."""
        return np.array([choice.costs[resource] for slot in self.slots for choice in slot], dtype=float)

    def total(self, picks: Sequence[int], limit: Limit) -> float:
        """Return what a limit compares, rounded once."""
        return solution_of(self.slots, picks, [limit], [limit.resource]).costs[limit.resource]

    def minimise(
        self, weights: np.ndarray, limits: Sequence[Limit], seconds: float, *, stretch: bool = False
    ) -> Optimum | None:
        """Return the picks with the least sum of weights; None where nothing is feasible.

        Args:
            weights: of all choices, [choices].
            stretch: minimise the share that all limits are exceeded by, instead.
        Errors:
            UserError: no solution in time.
        """
        columns = self.columns + stretch
        objective = np.zeros(columns)
        objective[: self.choices] = weights * _SCALE
        if stretch:
            objective = np.eye(1, columns, columns - 1)[0] * _SCALE
        upper = np.ones(columns)
        upper[self.columns :] = np.inf
        rows = _Rows(*map(list, (self.rows.entries, self.rows.lower, self.rows.upper)))
        for limit in limits:
            costs, room = self.costs(limit.resource), limit.most - limit.fixed
            unit = (abs(room) or np.abs(costs).max() or 1.0) / _SCALE
            entries = dict(enumerate(costs / unit))
            if stretch:
                entries[self.columns] = -(abs(limit.most) or 1.0) / unit
            rows.add(entries, -np.inf, room / unit)
        ends = time.monotonic() + seconds
        while True:
            with _silent():
                result = milp(
                    objective,
                    integrality=np.arange(columns) < self.columns,
                    bounds=Bounds(0, upper),
                    constraints=rows.constraint(columns),
                    options={
                        "time_limit": max(ends - time.monotonic(), 0.1),
                        "node_limit": _NODES,
                        "mip_rel_gap": _RELATIVE_GAP,
                    },
                )
            if result.status == _INFEASIBLE:
                return None
            picks = None if result.x is None else self._picks(result.x)
            if picks and (stretch or all(self.total(picks, limit) <= limit.most for limit in limits)):
                return Optimum(picks, result.mip_dual_bound / _SCALE, result.status == _OPTIMAL)
            if picks is None or time.monotonic() > ends:
                raise UserError(
                    f"no solution within {seconds:g} s and {_NODES:,} nodes: {result.message}",
                    hint="give the search more seconds, or raise a limit",
                )
            rows.add(self._row(picks), 0, len(self.slots) - 1)  # over a limit by less than HiGHS tells

    def _picks(self, x: np.ndarray) -> tuple[int, ...]:
        ends = zip(self.begins[:-1], self.begins[1:], strict=True)
        return tuple(int(np.argmax(x[begin:end])) for begin, end in ends)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Send what HiGHS prints from C nowhere: it leaves a line for each rounded solution, whatever `disp` is."""
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
