"""Choose a variant of every layer without a solver, to compare a search with: greedily (Puzzle's baseline), at random.

Costs are [choices, limits] of each slot, in units of what the limits leave for the slots.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from nemotron_h.compression.puzzle.choices import Limit, Slots, Solution, check, solution_of
from nemotron_h.compression.puzzle.search import solve
from nemotron_h.core.errors import UserError

logger = logging.getLogger(__name__)

#: ours: draws of a batch and batches, after which feasible picks are rare and walked to; steps of a walk for each slot
_BATCH, _BATCHES, _SWEEPS = 4096, 64, 10


def greedy(slots: Slots, limits: Sequence[Limit]) -> Solution:
    """Return Puzzle's greedy choice: a budget shared equally, and what a slot leaves of its share goes to the next.

    Slots come by ascending mean score of their choices, and take the best choice that fits their share. With several
    limits each has its shares, and a choice fits if it fits all. Ours, where the paper says nothing: a choice that
    leaves too little for the least of the later slots does not fit, and where none fits, the one that exceeds its
    share least is taken. With one limit that always ends within it.

    Errors:
        UserError: as of `solve`; or the greedy choice exceeds one of several limits.
    """
    resources = check(slots, limits)
    costs, room = _in_units(slots, limits)
    scores = [np.array([choice.score for choice in slot]) for slot in slots]
    order = sorted(range(len(slots)), key=lambda slot: scores[slot].mean())
    later = list(accumulate((costs[slot].min(0) for slot in reversed(order)), initial=np.zeros(len(limits))))[-2::-1]
    picks, spare, left = [0] * len(slots), np.zeros(len(limits)), room
    for slot, needed in zip(order, later, strict=True):
        share = spare + room / len(slots)
        fit = (costs[slot] <= np.minimum(share, left - needed)).all(1)
        excess = np.where(fit, -np.inf, (costs[slot] - share).max(1, initial=-np.inf))
        picks[slot] = int(np.lexsort((scores[slot], excess))[0])
        spare, left = share - costs[slot][picks[slot]], left - costs[slot][picks[slot]]
    chosen = solution_of(slots, picks, limits, resources)
    if over := [limit for limit in limits if chosen.costs[limit.resource] > limit.most]:
        solve(slots, limits)  # raises why, where nothing meets the limits
        said = ", ".join(f"{each.resource} {chosen.costs[each.resource]:,.6g} of {each.most:,.6g}" for each in over)
        raise UserError(f"the greedy choice exceeds a limit: {said}", hint="search with solve, which meets all limits")
    return chosen


def random_picks(slots: Slots, limits: Sequence[Limit], count: int, seed: int) -> list[Solution]:
    """Return independent choices, uniform over all that meet the limits.

    Choices are drawn with a probability that falls exponentially with their costs, so that the mean meets the limits,
    and are accepted with the inverse of that: cheap ones, of which too many are drawn, seldom. Where too few are
    accepted, a random walk within the limits, one slot at a time, goes on from these or from the best choice; its
    last place depends on where it began.

    Errors:
        UserError: as of `solve`, where nothing meets the limits.
    """
    resources = check(slots, limits)
    rng = np.random.default_rng(seed)
    feasible: list[Solution] = []

    def add(rows: np.ndarray) -> None:
        for row in rows[: count - len(feasible)]:
            picked = solution_of(slots, row, limits, resources)
            if all(picked.costs[limit.resource] <= limit.most for limit in limits):
                feasible.append(picked)

    for rows in _accepted(*_in_units(slots, limits), rng):
        add(rows)
        if len(feasible) == count:
            return feasible
    starts = [each.picks for each in feasible] or [solve(slots, limits).picks]
    missing = count - len(feasible)
    logger.info("%d of %d random choices are walked to: few meet the limits", missing, count)
    walked = np.array(starts)[rng.integers(len(starts), size=missing)]
    add(_walk(*_in_units(slots, limits), walked, rng))
    # a sum that rounding took over its limit
    feasible += [solution_of(slots, starts[0], limits, resources)] * (count - len(feasible))
    return feasible


def _in_units(slots: Slots, limits: Sequence[Limit]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the costs of each slot's choices, and the room that the limits leave to all: 1, 0 or -1."""
    room = np.array([limit.most - limit.fixed for limit in limits])
    units = np.where(room == 0, 1.0, np.abs(room))
    costs = [
        np.array([[choice.costs[limit.resource] for limit in limits] for choice in slot]).reshape(len(slot), -1) / units
        for slot in slots
    ]
    return costs, room / units


def _accepted(costs: list[np.ndarray], room: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of uniform feasible picks, [accepted, slots], by rejection from a tilted distribution."""

    def dual(slopes: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the logarithm of the tilted distribution's normalizer at the limits, and its gradient."""
        means = sum(softmax(-each @ slopes) @ each for each in costs)
        return sum(logsumexp(-each @ slopes) for each in costs) + slopes @ room, room - means

    slopes = np.zeros(len(room))
    if len(room):
        slopes = minimize(dual, slopes + 1.0, jac=True, bounds=[(0, 1e6)] * len(room), method="L-BFGS-B").x
    tilted = [np.cumsum(softmax(-each @ slopes)) for each in costs]
    for _ in range(_BATCHES):
        picks = np.stack([np.searchsorted(each / each[-1], rng.random(_BATCH), side="right") for each in tilted], 1)
        left = room - sum(each[picks[:, slot]] for slot, each in enumerate(costs))
        # sums of rounded numbers: whoever takes the picks adds them up exactly
        yield picks[(left >= -1e-9).all(1) & (np.log(rng.random(_BATCH)) <= -np.maximum(left, 0) @ slopes)]


def _walk(costs: list[np.ndarray], room: np.ndarray, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return where walks end that draw a slot and one of its choices within the limits, again and again.

    Args:
        picks: where they begin, [walks, slots].
    """
    most = max(map(len, costs))
    padded = np.stack([np.pad(each, ((0, most - len(each)), (0, 0)), constant_values=math.inf) for each in costs])
    picks, each = picks.copy(), np.arange(len(picks))
    left = room - padded[np.arange(len(costs)), picks].sum(1)
    for _ in range(_SWEEPS * len(costs)):
        slot = rng.integers(len(costs), size=len(picks))
        left = left + padded[slot, picks[each, slot]]
        fit = (padded[slot] <= left[:, None]).all(2)
        fit[each, picks[each, slot]] = True  # where rounding says otherwise
        picks[each, slot] = np.where(fit, rng.random(fit.shape), -1.0).argmax(1)
        left = left - padded[slot, picks[each, slot]]
    return picks
