"""Choose a variant of every layer by integer programming: the least sum of scores within limits (Puzzle, 2411.19146).

The program, of its appendix B, with x[i, j] = 1 where slot i takes its choice j:

    minimise    sum_ij score[i, j] x[i, j]
    subject to  sum_j x[i, j] = 1                                for every slot i
                fixed[r] + sum_ij cost[r, i, j] x[i, j] <= most[r]   for every limit r
                sum_i x[i, y[i]] <= alpha * slots                for every earlier solution y
                x[i, j] <= u[g, name of j], sum_n u[g, n] <= 1   for every slot i of a group g of equal slots
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from operator import itemgetter

import numpy as np

from nemotron_h.compression.puzzle.choices import Limit, Slots, Solution, check, solution_of
from nemotron_h.compression.puzzle.program import Program
from nemotron_h.core.errors import UserError

logger = logging.getLogger(__name__)


def solve(
    slots: Slots,
    limits: Sequence[Limit],
    *,
    earlier: Sequence[Sequence[int]] = (),
    alpha: float = 0.8,
    equal: Sequence[Sequence[int]] = (),
    exempt: Collection[str] = (),
    seconds: float = 60.0,
) -> Solution:
    """Return the choices with the least sum of scores within all limits.

    Args:
        slots: the choices of each layer.
        limits: all of them are met, exactly.
        earlier: picks of solutions of which no more than `alpha` of all slots may be picked again.
        equal: groups of slots, by number, that take choices of one name.
        exempt: names that a slot of a group may take all the same, such as that of a layer that is removed: kept FFNs
            then share one width (MiniPuzzle).
        seconds: for HiGHS; the best solution until then, or after some thousand nodes, is returned, its gap logged.
    Errors:
        UserError: a score or cost is not finite or missing; nothing meets the limits (names the tightest, and the least
            value that can be met); no solution in time.
    """
    resources = check(slots, limits)
    program = Program(slots, earlier, alpha, equal, exempt)
    scores = [[choice.score for choice in slot] for slot in slots]
    least, spread = sum(map(min, scores)), max(max(row) - min(row) for row in scores) or 1.0
    weights = np.concatenate([(np.array(row) - min(row)) / spread for row in scores])
    optimum = program.minimise(weights, limits, seconds)
    if optimum is None:
        raise _infeasible(program, limits, seconds)
    solution = solution_of(slots, optimum.picks, limits, resources)
    gap = max(0.0, solution.score - (least + spread * optimum.bound))
    if not optimum.proved:
        logger.warning(
            "HiGHS stopped before the optimum was proved: this solution has a score of %.6g, and none is below %.6g",
            *(solution.score, solution.score - gap),
        )
    return Solution(solution.picks, solution.score, solution.costs, gap)


def solutions(
    slots: Slots,
    limits: Sequence[Limit],
    count: int,
    alpha: float = 0.8,
    *,
    equal: Sequence[Sequence[int]] = (),
    exempt: Collection[str] = (),
    seconds: float = 60.0,
) -> list[Solution]:
    """Return the best solution, the best of those that share at most `alpha` of its picks, and so on.

    Args:
        count: how many; each shares at most `alpha` of its picks with every earlier one.
        seconds: for each.
    Errors:
        UserError: as of `solve`, for the first that cannot be.
    """
    best: list[Solution] = []
    for _ in range(count):
        earlier = [each.picks for each in best]
        best.append(solve(slots, limits, earlier=earlier, alpha=alpha, equal=equal, exempt=exempt, seconds=seconds))
    return best


def _infeasible(program: Program, limits: Sequence[Limit], seconds: float) -> UserError:
    """Return the reason why nothing meets the limits, with the least values that can be met."""
    nothing = np.zeros(program.choices)
    if program.minimise(nothing, (), seconds) is None:
        alone = Program(program.slots, (), program.alpha, program.equal, program.exempt)
        if program.earlier and alone.minimise(nothing, (), seconds):
            return UserError(
                f"no solution shares at most {program.alpha:g} of its picks with each of {len(program.earlier)} others",
                hint="ask for fewer solutions, or raise alpha",
            )
        groups = "; ".join(", ".join(map(str, group)) for group in program.equal)
        return UserError(
            f"slots that take choices of one name have none in common: {groups}", hint="give them variants of one name"
        )

    def least(limit: Limit, others: Sequence[Limit]) -> float | None:
        costs = program.costs(limit.resource)
        unit = np.abs(costs).max() or 1.0
        optimum = program.minimise(costs / unit, others, seconds)
        return None if optimum is None else program.total(optimum.picks, limit)

    def ratio(limit: Limit, value: float) -> float:
        return (value - limit.most) / (abs(limit.most) or 1.0)

    apart = f", apart from {len(program.earlier)} earlier solutions" if program.earlier else ""
    leasts = [(limit, least(limit, ())) for limit in limits]
    over = sorted(
        ((ratio(limit, value), limit, value) for limit, value in leasts if value > limit.most), key=itemgetter(0)
    )
    if over:
        said = (f"{_below(limit)}: the least is {rounded_up(value)}" for _, limit, value in reversed(over))
        raised = (f"{limit.resource} to {rounded_up(value)} or more" for _, limit, value in reversed(over))
        return UserError(
            f"no choice of the slots meets {'; '.join(said)}{apart}",
            hint=f"raise {', '.join(raised)}, or add variants that need less",
        )
    nearest = program.minimise(nothing, limits, seconds, stretch=True)
    share = max(ratio(limit, program.total(nearest.picks, limit)) for limit in limits)
    alone = [(limit, least(limit, [other for other in limits if other is not limit])) for limit in limits]
    single = sorted(
        ((ratio(limit, value), limit, value) for limit, value in alone if value is not None), key=itemgetter(0)
    )
    said = [f"the least {limit.resource} is {rounded_up(value)} within the others" for _, limit, value in single]
    said.append(f"all limits at {rounded_up(1 + share)} times are met")
    raised = [f"{limit.resource} to {rounded_up(value)}" for _, limit, value in single]
    return UserError(
        f"no choice of the slots meets {' and '.join(map(_below, limits))} at once{apart}: {'; '.join(said)}",
        hint=f"raise {' or '.join([*raised, f'all limits to {rounded_up(1 + share)} times'])}",
    )


def _below(limit: Limit) -> str:
    return f"{limit.resource} <= {limit.most:,.12g}"


def rounded_up(value: float) -> str:
    """Return a number in text, never less than it is: integers exactly, others with six digits."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    digits = 5 - math.floor(math.log10(abs(value)))
    text = f"{value:.6g}"
    return text if float(text) >= value else f"{value + 10.0**-digits / 2:.6g}"
