"""Samples of a model's solutions: which are drawn, and the file that keeps them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.records import Records
from nemotron_h.inference.pool import Job


@dataclass(frozen=True)
class Solution:
    """A sample, as it is stored.

    Attributes:
        problem, sample: numbers, from 0.
        text: that the model wrote.
        tokens: of it, with the one that ended it.
        log_probability: mean over the tokens, in nats.
        seconds: its share of the engine's time.
        ended_by: see `inference.pool`.
    """

    problem: int
    sample: int
    text: str
    tokens: int
    log_probability: float
    seconds: float
    ended_by: str


class Samples(Records[Solution]):
    """The samples of a model; see `Records`.

    Args:
        folder: of both files.
        name: the model's.
        problems: how many there are.
    Errors:
        UserError: the files are damaged.
    """

    def __init__(self, folder: Path, name: str, problems: int) -> None:
        super().__init__(folder, name, Solution)
        self.by_problem: list[dict[int, Solution]] = [{} for _ in range(problems)]
        for number, solution in enumerate(self.records, 1):
            if not (0 <= solution.problem < problems and solution.sample >= 0):
                raise UserError(f"{self.file}, line {number}: there is no problem {solution.problem}")
            self.by_problem[solution.problem][solution.sample] = solution

    def add(self, solution: Solution) -> None:
        """Add a sample, as `Records.add` does."""
        self.by_problem[solution.problem][solution.sample] = solution
        super().add(solution)


class Demand:
    """The samples that are still to be drawn: of every problem until they have cost the longest budget.

    Problems take turns; where there is no budget (infinity), the samples of one begin together and share the reading of
    its prompt. Which seed a sample has depends on its problem and number alone.

    Args:
        samples: that are there; those that end are added by `ended`.
        budget: seconds of each problem.
        most: samples of each problem.
        seed: of the run.
    """

    def __init__(self, samples: Samples, budget: float, most: int, seed: int) -> None:
        self.budget, self.most, self.seed = budget, most, seed
        self._there = [set(each) for each in samples.by_problem]
        self._spent = [sum(solution.seconds for solution in each.values()) for each in samples.by_problem]
        self._ended = [len(each) for each in samples.by_problem]
        self._next = [0] * len(self._there)
        self._turn = 0
        self._shares = list(map(self._share, range(len(self._there))))
        self._total, self._untouched = sum(self._shares), self._ended.count(0)

    def jobs(self, free: int) -> list[Job]:
        """Return so many samples to draw, or fewer where no more are wanted."""
        jobs: list[Job] = []
        idle = 0  # problems one after the other that want none
        while len(jobs) < free and idle < len(self._there):
            problem = self._turn
            wanted = self._wants(problem)
            if not wanted or math.isfinite(self.budget):
                self._turn = (problem + 1) % len(self._there)
            if not wanted:
                idle += 1
                continue
            idle = 0
            while (number := self._next[problem]) in self._there[problem]:
                self._next[problem] += 1
            self._there[problem].add(number)
            jobs.append(Job(problem, number, _seed(self.seed, problem, number)))
        return jobs

    def _wants(self, problem: int) -> bool:
        drawn, ended = len(self._there[problem]), self._ended[problem]
        mean = self._spent[problem] / ended if ended else self.mean_cost()
        return drawn < self.most and self._spent[problem] + (drawn - ended) * mean < self.budget

    def ended(self, problem: int, seconds: float) -> None:
        """Count a sample that was drawn."""
        self._untouched -= not self._ended[problem]
        self._spent[problem] += seconds
        self._ended[problem] += 1
        share = self._share(problem)
        self._total += share - self._shares[problem]
        self._shares[problem] = share

    def mean_cost(self) -> float:
        """Return the mean seconds of a sample; 0 where there is none."""
        return sum(self._spent) / max(1, sum(self._ended))

    def check_budget(self, name: str, smallest: float) -> None:
        """Refuse a smallest budget that pays no sample of any problem, once each problem has one.

        Errors:
            UserError: names what a sample costs.
        """
        if self.is_under_way():
            least = min(spent / ended for spent, ended in zip(self._spent, self._ended, strict=True))
            if smallest < least:
                raise UserError(
                    f"--seconds {smallest:g} is less than a sample of {name} takes: {least:.2g} s of the cheapest "
                    f"problem, {self.mean_cost():.2g} s on average",
                    hint=f"begin with --seconds {2 * self.mean_cost():.2g}; samples that are drawn are kept",
                )

    def is_under_way(self) -> bool:
        """Return True if each problem has a sample."""
        return not self._untouched

    def is_met(self) -> bool:
        """Return True if nothing is to be drawn."""
        return not any(map(self._wants, range(len(self._there))))

    def progress(self) -> float:
        """Return the share of all that is wanted which is there."""
        return self._total / len(self._shares)

    def _share(self, problem: int) -> float:
        return min(1.0, max(self._spent[problem] / self.budget, self._ended[problem] / self.most))


def _seed(seed: int, problem: int, number: int) -> int:
    """Return the seed of a sample, of 63 bits: those of two runs, problems or samples are apart."""
    return int.from_bytes(hashlib.sha256(f"{seed} {problem} {number}".encode()).digest()[:8], "big") >> 1
