"""Samples of a model's solutions: which are drawn, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError, writing
from nemotron_h.core.files import parsed_lines, read_json_object, whole_file, write_json
from nemotron_h.core.strict import from_json
from nemotron_h.inference.pool import Job

#: seconds between writes of samples
_WRITE_EVERY = 2.0


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


class Samples:
    """The samples of a model, in `NAME.jsonl`, and the settings that they were drawn with, in `NAME.json`.

    Args:
        folder: of both files.
        name: the model's.
        problems: how many there are.
    Errors:
        UserError: the files are damaged.
    """

    def __init__(self, folder: Path, name: str, problems: int) -> None:
        self.file, self.settings_file = folder / f"{name}.jsonl", folder / f"{name}.json"
        self.settings = read_json_object(self.settings_file) if self.settings_file.exists() else {}
        self.by_problem: list[dict[int, Solution]] = [{} for _ in range(problems)]
        self._waiting: list[Solution] = []
        self._written = time.monotonic()
        solutions, torn = parsed_lines(self.file, _solution)
        lines = len(solutions) + len(torn)
        if torn not in ([], [lines]):
            raise UserError(f"{self.file}, line {torn[0]} is no sample", hint="remove the file to draw all again")
        for number, solution in enumerate(solutions, 1):
            if not (0 <= solution.problem < problems and solution.sample >= 0):
                raise UserError(f"{self.file}, line {number}: there is no problem {solution.problem}")
            self.by_problem[solution.problem][solution.sample] = solution
        if torn:  # of a process that was killed
            self._write(solutions)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse settings other than those of the samples that are there, and write them where there are none.

        Errors:
            UserError: names what differs.
        """
        if not any(self.by_problem):
            self.settings = settings
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings_file, settings)
            self._write([])
        elif different := [key for key in settings if self.settings.get(key) != settings[key]]:
            key = different[0]
            raise UserError(
                f"{self.file} has samples with {key} = {_short(self.settings.get(key))}, now it is "
                f"{_short(settings[key])}",
                hint=f"name another folder (--out), or remove {self.file} to draw all again",
            )

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._append()

    def add(self, solution: Solution) -> None:
        """Add a sample, in a `with` block, at whose end all are in the file; most are before."""
        self.by_problem[solution.problem][solution.sample] = solution
        self._waiting.append(solution)
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._append()

    def _append(self) -> None:
        with writing(self.file), self.file.open("a", encoding="utf-8") as opened:
            opened.write("".join(map(_line, self._waiting)))
        self._waiting, self._written = [], time.monotonic()

    def _write(self, solutions: Sequence[Solution]) -> None:
        with whole_file(self.file) as temporary:
            temporary.write_text("".join(map(_line, solutions)), encoding="utf-8")


def _line(solution: Solution) -> str:
    return json.dumps(dataclasses.asdict(solution), ensure_ascii=False) + "\n"


def _solution(line: bytes) -> Solution:
    try:
        return from_json(Solution, json.loads(line))
    except UserError as error:
        raise ValueError(str(error)) from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
