"""Results of a comparison: measures at numbers of samples and at budgets, and where models cross.

Axes: g budgets, p problems.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_h.evaluation.coverage import measures
from nemotron_h.evaluation.coverage.measures import Crossing
from nemotron_h.evaluation.coverage.samples import Samples
from nemotron_h.evaluation.problems import answers
from nemotron_h.evaluation.problems.problem import Problem, tasks_of

#: ours: points of a curve over budgets
_POINTS = 65
SECONDS, SAMPLES, ALL = "seconds", "samples", "all"
MEASURES = ("coverage", "majority", "best_of")


@dataclass(frozen=True)
class Tally:
    """Samples of a model, judged.

    Attributes:
        name: the model's.
        batch: rows that they were drawn in.
        cost: [p], mean seconds of a sample of each problem.
        drawn: [p], samples of each problem.
        tokens: of all samples.
        seconds: of all samples.
        ended_by: how many samples each end has.
        votes, right, scores: of each problem, by sample: what equal answers share, whether it is right, mean
            log-probability.
        curves: of each problem, coverage by number of samples.
    """

    name: str
    batch: int
    cost: np.ndarray
    drawn: np.ndarray
    tokens: int
    seconds: float
    ended_by: dict[str, int]
    votes: list[list[str | None]]
    right: list[np.ndarray]
    scores: list[np.ndarray]
    curves: list[np.ndarray]

    @classmethod
    def of(cls, name: str, samples: Samples, problems: Sequence[Problem], token_seconds: float | None = None) -> Tally:
        """Judge the samples of a model.

        Args:
            token_seconds: cost of a token, in place of what the samples cost.
        """
        votes, right, scores, ended_by = [], [], [], {}
        solutions = [[each[number] for number in sorted(each)] for each in samples.by_problem]
        for problem, ours in zip(problems, solutions, strict=True):
            stated = [answers.answer_of(solution.text) for solution in ours]
            votes.append([None if answer is None else problem.voted(answer) for answer in stated])
            right.append(np.array([answer is not None and problem.right(answer) for answer in stated], dtype=float))
            scores.append(np.array([solution.log_probability for solution in ours]))
            for solution in ours:
                ended_by[solution.ended_by] = ended_by.get(solution.ended_by, 0) + 1
        if token_seconds is None:
            seconds = np.array([sum(solution.seconds for solution in ours) for ours in solutions])
        else:
            seconds = np.array([token_seconds * sum(solution.tokens for solution in ours) for ours in solutions])
        drawn = np.array([len(ours) for ours in solutions])
        return cls(
            name,
            samples.settings["batch"],
            seconds / drawn,
            drawn,
            sum(solution.tokens for ours in solutions for solution in ours),
            float(seconds.sum()),
            ended_by,
            votes,
            right,
            scores,
            [measures.pass_curve(len(each), int(each.sum())) for each in right],
        )

    def affordable(self, budget: float) -> np.ndarray:
        """Return the samples of each problem that a budget pays, int64 [p]."""
        return np.floor(budget / self.cost * (1 + 1e-9)).astype(np.int64)

    def coverage(self, counts: np.ndarray) -> np.ndarray:
        """Return each problem's coverage at so many samples of it [p], of no more than are drawn."""
        return np.array([curve[min(k, len(curve) - 1)] for curve, k in zip(self.curves, counts, strict=True)])

    def values(self, counts: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """Return each measure of each problem at so many samples of it [p], of no more than are drawn."""
        counts = np.minimum(counts, self.drawn)
        majority = [
            measures.majority(votes, right, k, np.random.default_rng(seed))
            for votes, right, k in zip(self.votes, self.right, counts, strict=True)
        ]
        best = [measures.best_of(s, right, k) for s, right, k in zip(self.scores, self.right, counts, strict=True)]
        return dict(zip(MEASURES, (self.coverage(counts), np.array(majority), np.array(best)), strict=True))


@dataclass(frozen=True)
class Curve:
    """Coverage of a model over budgets that its samples are enough for.

    Attributes:
        budgets: [g], seconds.
        values: [g, p].
        mean, low, high: [g], over problems, with the interval.
    """

    budgets: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Results:
    """Measures of a comparison.

    Attributes:
        tallies: of the models.
        rows: a mapping for each model, task, and number of samples or budget.
        curves: model -> its curve.
        crossings: of each pair of models, in the order of the models; None where budgets of both are fewer than two.
    """

    tallies: list[Tally]
    rows: list[dict[str, Any]]
    curves: dict[str, Curve]
    crossings: dict[tuple[str, str], Crossing | None]


def results_of(tallies: list[Tally], problems: Sequence[Problem], budgets: Sequence[float], seed: int) -> Results:
    """Return the measures of judged samples.

    Args:
        budgets: seconds of each problem, ascending.
        seed: of the bootstrap and of majorities.
    """
    drawn = measures.resamples(len(problems), seed)
    rows = [row for tally in tallies for row in _rows(tally, problems, budgets, seed)]
    grid = np.geomspace(budgets[0], budgets[-1], _POINTS) if len(budgets) > 1 else np.array(budgets)
    grid = np.unique([*grid[1:-1], *budgets])
    curves = {tally.name: _curve(tally, grid, drawn) for tally in tallies}
    crossings: dict[tuple[str, str], Crossing | None] = {}
    for one, other in itertools.combinations(curves, 2):
        first, second = curves[one], curves[other]
        both = min(len(first.budgets), len(second.budgets))
        pair = (first.values[:both], second.values[:both])
        crossings[one, other] = measures.crossing(grid[:both], *pair, drawn) if both > 1 else None
    return Results(tallies, rows, curves, crossings)


def _curve(tally: Tally, grid: np.ndarray, drawn: np.ndarray) -> Curve:
    budgets = np.array([budget for budget in grid if (tally.affordable(budget) <= tally.drawn).all()])
    values = np.array([tally.coverage(tally.affordable(budget)) for budget in budgets]).reshape(-1, len(tally.cost))
    ends = np.array([measures.interval(each, drawn) for each in values]).reshape(-1, 2)
    return Curve(budgets, values, values.mean(axis=1), ends[:, 0], ends[:, 1])


def _rows(tally: Tally, problems: Sequence[Problem], budgets: Sequence[float], seed: int) -> list[dict[str, Any]]:
    least = int(tally.drawn.min())
    points = [(SAMPLES, k, np.full(len(problems), k)) for k in (2**power for power in range(least.bit_length()))]
    points += [(SECONDS, budget, tally.affordable(budget)) for budget in budgets]
    names = np.array([problem.task for problem in problems])
    tasks = tasks_of(problems)
    groups = {ALL: np.arange(len(problems)), **{task: np.flatnonzero(names == task) for task in tasks}}
    if len(tasks) == 1:
        del groups[tasks[0]]
    resamples = {task: measures.resamples(len(members), seed) for task, members in groups.items()}
    rows = []
    for by, at, counts in points:
        values = tally.values(counts, seed)
        for task, members in groups.items():
            row = {"model": tally.name, "task": task, "problems": len(members), "by": by, "at": at}
            row["samples"] = float(np.minimum(counts, tally.drawn)[members].mean())
            for measure in MEASURES:
                of_task = values[measure][members]
                low, high = measures.interval(of_task, resamples[task])
                row |= {measure: float(of_task.mean()), f"{measure}_low": low, f"{measure}_high": high}
            row["lower_bound"] = bool((counts > tally.drawn)[members].any())
            rows.append(row)
    return rows
