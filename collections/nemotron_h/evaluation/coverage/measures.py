"""Estimators over samples of a problem, intervals over problems, and where one model overtakes another.

n samples are drawn of a problem, c of them right; a measure at k is its mean over all choices of k of the n.

Axes: g budgets, p problems, r resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: ours: resamples of a bootstrap, and the percentiles of an interval of 95 %
RESAMPLES, ENDS = 2000, (2.5, 97.5)
#: ours: choices of k samples that a majority is the mean of; all of them where they are no more
CHOICES = 500


def pass_curve(samples: int, right: int) -> np.ndarray:
    """Return 1 - C(n - c, k) / C(n, k) for k = 0 ... n, float64 [n + 1]: the share of choices with a right one.

    As a product, which no binomial overflows (Chen et al. 2021, arXiv 2107.03374, section 2.1).
    """
    drawn = np.arange(samples)  # before the next
    return 1 - np.concatenate(([1.0], np.cumprod(np.maximum(samples - right - drawn, 0) / (samples - drawn))))


def best_of(scores: np.ndarray, right: np.ndarray, k: int) -> float:
    """Return the probability that the sample of the highest score among k is right; of equal scores, any.

    The sample of rank i, from 0, is the best of C(n - 1 - i, k - 1) of the C(n, k) choices.

    Args:
        scores, right: [n].
    """
    n = len(scores)
    if not k:
        return 0.0
    _, group = np.unique(-scores, return_inverse=True)
    shares = np.bincount(group, weights=right) / np.bincount(group)
    rank = np.arange(n - 1)
    weights = np.concatenate(([1.0], np.cumprod(np.maximum(n - k - rank, 0) / (n - 1 - rank)))) * k / n
    return float(weights @ shares[np.sort(group)])  # the best first


def majority(votes: Sequence[str | None], right: Sequence[bool], k: int, rng: np.random.Generator) -> float:
    """Return the probability that the answer which most of k samples give is right; of equally many, any of them.

    Args:
        votes: [n], what equal answers share; None does not vote. Where nobody votes, nothing is right.
        right: [n].
        rng: of the choices, where there are more than `CHOICES`.
    """
    n = len(votes)
    answers = {vote: number for number, vote in enumerate(dict.fromkeys(vote for vote in votes if vote is not None))}
    if not k or not answers:
        return 0.0
    places = np.array([answers.get(vote, len(answers)) for vote in votes])  # [n], the last does not vote
    is_right = np.zeros(len(answers))
    for vote, correct in zip(votes, right, strict=True):
        if vote is not None:
            is_right[answers[vote]] = correct
    if math.comb(n, k) <= CHOICES:
        chosen = np.array(list(itertools.combinations(range(n), k)))
    else:
        chosen = rng.permuted(np.tile(np.arange(n), (CHOICES, 1)), axis=1)[:, :k]
    width = len(answers) + 1
    flat = places[chosen] + width * np.arange(len(chosen))[:, None]
    counts = np.bincount(flat.ravel(), minlength=width * len(chosen)).reshape(-1, width)[:, :-1]  # [choices, answers]
    most = counts.max(axis=1, keepdims=True)
    leads = (counts == most) & (most > 0)
    return float((leads @ is_right / np.maximum(leads.sum(axis=1), 1)).mean())


def resamples(problems: int, seed: int) -> np.ndarray:
    """Return the problems of each resample of a bootstrap, int64 [r, p]: the same for all models and measures."""
    return np.random.default_rng(seed).integers(problems, size=(RESAMPLES, problems))


def interval(values: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Return both ends of the 95 % interval of the mean of values [p], by bootstrap over problems."""
    low, high = np.percentile(values[drawn].mean(axis=1), ENDS)
    return float(low), float(high)


@dataclass(frozen=True)
class Lead:
    """Difference of two models' coverage at a budget, with its interval."""

    seconds: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Crossing:
    """Comparison of two models over budgets that both were measured at.

    Attributes:
        seconds: budget from which on the one that is behind before leads, the last such; None where there is none.
        changes: how often the lead changes.
        first, last: coverage of the first model less that of the second, at the smallest and the largest budget.
    """

    seconds: float | None
    changes: int
    first: Lead
    last: Lead


def crossing(budgets: np.ndarray, first: np.ndarray, second: np.ndarray, drawn: np.ndarray) -> Crossing:
    """Compare two models.

    Args:
        budgets: [g], seconds, ascending.
        first, second: [g, p], values of each problem.
        drawn: of `resamples`; problems are drawn for both models together.
    """
    apart = first - second
    mean = apart.mean(axis=1)
    clear = np.flatnonzero(np.abs(mean) > 1e-12)
    signs = np.sign(mean[clear])
    changes = clear[1:][signs[1:] != signs[:-1]]
    ends = [Lead(float(budgets[at]), float(mean[at]), *interval(apart[at], drawn)) for at in (0, -1)]
    return Crossing(float(budgets[changes[-1]]) if len(changes) else None, len(changes), *ends)
