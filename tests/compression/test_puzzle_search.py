"""The search of Puzzle against brute force; its limits, diversity and errors; what it is compared with."""

from __future__ import annotations

import itertools
import logging
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from nemotron_h.compression.puzzle import program
from nemotron_h.compression.puzzle.baselines import greedy, random_picks
from nemotron_h.compression.puzzle.choices import Choice, Limit, Slots, solution_of
from nemotron_h.compression.puzzle.search import rounded_up, solutions, solve
from nemotron_h.core.errors import UserError

NAMES = ("whole", "half", "quarter", "linear", "none")
RESOURCES = ("bytes", "decode")


def slot(rng: np.random.Generator, count: int) -> list[Choice]:
    """Narrower variants cost less and score worse; bytes are whole and many, seconds are few."""
    share = np.sort(rng.uniform(0, 1, (2, count)))[:, ::-1]
    scores = np.sort(rng.lognormal(-6, 1.5, count))
    return [
        Choice(NAMES[n], scores[n], {"bytes": int(4e9 * share[0, n]), "decode": 1e-3 * share[1, n]})
        for n in range(count)
    ]


def problem(seed: int, slots: int, choices: int = 5, tight: float = 0.4) -> tuple[Slots, list[Limit]]:
    rng = np.random.default_rng(seed)
    made = [slot(rng, int(rng.integers(2, choices + 1))) for _ in range(slots)]
    limits = []
    for resource in RESOURCES:
        costs = [[choice.costs[resource] for choice in each] for each in made]
        least, most = sum(map(min, costs)), sum(map(max, costs))
        limits.append(Limit(resource, 1e-2 + least + tight * (most - least), fixed=1e-2))
    return made, limits


def feasible(slots: Slots, limits: Sequence[Limit]) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Yield score and picks of all that meet the limits."""
    for picks in itertools.product(*(range(len(each)) for each in slots)):
        each = solution_of(slots, picks, limits, RESOURCES)
        if all(each.costs[limit.resource] <= limit.most for limit in limits):
            yield each.score, picks


@pytest.mark.parametrize("seed", range(6))
def test_the_best_picks_are_those_of_brute_force(seed: int) -> None:
    slots, limits = problem(seed, 5)
    score, picks = min(feasible(slots, limits))
    best = solve(slots, limits)
    assert (best.picks, best.score) == (picks, score)
    assert 0 <= best.gap <= 1e-6 * score
    assert best.costs["bytes"] == 1e-2 + sum(each[n].costs["bytes"] for each, n in zip(slots, picks, strict=True))


@pytest.mark.parametrize("seed", range(16))
def test_whatever_is_asked_the_answer_is_that_of_brute_force(seed: int) -> None:
    """Scores and costs of any size and sign, with ties; up to two limits; earlier solutions and equal slots at once."""
    rng = np.random.default_rng(seed)
    count, whole, sizes = int(rng.integers(1, 6)), rng.random() < 0.5, 10.0 ** rng.integers(-7, 7, 3)

    def choice(number: int) -> Choice:
        score, *costs = sizes * (rng.integers(-3, 4, 3) if whole else rng.normal(size=3))
        return Choice(NAMES[number], float(score), dict(zip(RESOURCES, map(float, costs), strict=True)))

    slots = [[choice(number) for number in range(rng.integers(1, 6))] for _ in range(count)]
    every = [solution_of(slots, picks, (), RESOURCES) for picks in itertools.product(*(range(len(s)) for s in slots))]
    limits = [
        Limit(key, float(np.quantile([each.costs[key] for each in every], rng.uniform())))
        for key in RESOURCES[: rng.integers(3)]
    ]
    earlier = [every[number].picks for number in rng.integers(len(every), size=rng.integers(3))]
    groups = [rng.permutation(count)[: rng.integers(1, 6)].tolist()] if rng.random() < 0.5 else []
    options = {"earlier": earlier, "alpha": float(rng.choice([0.2, 0.5, 0.8])), "equal": groups, "exempt": ["whole"]}
    allowed = [
        each
        for each in every
        if all(each.costs[limit.resource] <= limit.most for limit in limits)
        and all(shared(each.picks, other) <= options["alpha"] * count + 1e-9 for other in earlier)
        and all(len({slots[n][each.picks[n]].name for n in group} - {"whole"}) <= 1 for group in groups)
    ]
    if not allowed:
        infeasible(slots, limits, **options)
        return
    best = solve(slots, limits, **options)
    assert best.picks in {each.picks for each in allowed}
    assert best.score == pytest.approx(min(each.score for each in allowed), rel=1e-9, abs=1e-9 * sizes[0])


def test_no_limit_is_the_best_of_each_slot() -> None:
    slots, _ = problem(0, 5)
    assert solve(slots, ()).picks == (0,) * 5
    assert greedy(slots, ()).picks == (0,) * 5


def test_a_limit_is_met_to_the_byte() -> None:
    """A byte of 50 GB is less than the solver's tolerance."""
    slots = [[Choice("whole", 0.0, {"bytes": 25e9 + n}), Choice("none", 1.0 + n, {"bytes": 5})] for n in range(2)]
    assert solve(slots, [Limit("bytes", 50e9 + 1)]).picks == (0, 0)
    assert solve(slots, [Limit("bytes", 50e9)]).picks == (1, 0)
    with pytest.raises(UserError, match=r"the least is 10\n"):
        solve(slots, [Limit("bytes", 9)])


@pytest.mark.parametrize("seed", range(6))
def test_solutions_differ_and_each_is_the_best_that_does(seed: int) -> None:
    slots, limits = problem(seed, 5)
    several = solutions(slots, limits, 4, alpha=0.6)
    every = list(feasible(slots, limits))
    for number, solution in enumerate(several):
        others = [each.picks for each in several[:number]]
        assert all(shared(solution.picks, other) <= 3 for other in others)
        assert solution.score == min(s for s, picks in every if all(shared(picks, other) <= 3 for other in others))
    assert [each.score for each in several] == sorted(each.score for each in several)


def shared(picks: Sequence[int], others: Sequence[int]) -> int:
    return sum(one == other for one, other in zip(picks, others, strict=True))


def test_the_share_of_picks_is_that_of_the_numbers_written() -> None:
    """0.29 * 100 is below 29."""
    slots = [[Choice("whole", 0.0, {"bytes": 1}), Choice("none", 1.0, {"bytes": 0})] for _ in range(100)]
    assert solutions(slots, (), 2, alpha=0.29)[1].score == 71


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exempt", [(), ("none",)])
def test_equal_slots_share_one_name(seed: int, exempt: tuple[str, ...]) -> None:
    slots, limits = problem(seed, 6, tight=0.6)
    groups = [[0, 2, 4], [1, 3]]
    choices = [slot(np.random.default_rng(seed + n), 5) for n in range(6)]
    slots = [choices[n] if n < 5 else each for n, each in enumerate(slots)]

    def equal(picks: Sequence[int]) -> bool:
        names = [{slots[n][picks[n]].name for n in group}.difference(exempt) for group in groups]
        return all(len(each) <= 1 for each in names)

    limits = [Limit("bytes", 14e9)]
    score, picks = min(each for each in feasible(slots, limits) if equal(each[1]))
    best = solve(slots, limits, equal=groups, exempt=exempt)
    assert (best.picks, best.score) == (picks, score)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_and_random_choices_are_no_better(seed: int) -> None:
    slots, limits = problem(seed, 40)
    picked = random_picks(slots, limits, 1000, seed)
    best = solve(slots, limits)
    for limit in limits:
        assert all(each.costs[limit.resource] <= limit.most for each in picked)
        assert best.costs[limit.resource] <= limit.most
    assert best.score <= greedy(slots, limits).score
    assert best.score <= min(each.score for each in picked)


def test_greedy_shares_the_budget_and_carries_what_is_left() -> None:
    def choices(*rows: tuple[float, float]) -> list[Choice]:
        return [Choice(NAMES[n], score, {"bytes": cost}) for n, (score, cost) in enumerate(rows)]

    slots = [
        choices((0, 9), (6, 6), (9, 1)),  # last, with a mean score of 5: has 4 + 3 + 0 and takes 6
        choices((0, 9), (1, 4), (2, 1)),  # first, 1: has 4 and takes 4
        choices((0, 9), (2, 5), (4, 1)),  # second, 2: has 4 + 0 and takes 1
    ]
    assert greedy(slots, [Limit("bytes", 14, fixed=2)]).picks == (1, 1, 2)
    assert solve(slots, [Limit("bytes", 14, fixed=2)]).score < 11


@pytest.mark.parametrize("seed", range(8))
def test_greedy_meets_one_limit_however_tight(seed: int) -> None:
    slots, limits = problem(seed, 7, tight=0.001)
    for limit in limits:
        assert greedy(slots, [limit]).costs[limit.resource] <= limit.most


def test_greedy_says_where_several_limits_take_it_too_far() -> None:
    """The later slot leaves one of each in the first, of which no choice takes as little of both."""
    slots = [
        [Choice("a", 0, {"bytes": 2, "decode": 2}), Choice("b", 5, {"bytes": 1, "decode": 1})],
        [Choice("a", 3, {"bytes": 1, "decode": 3}), Choice("b", 4, {"bytes": 3, "decode": 1})],
    ]
    with pytest.raises(UserError, match=r"exceeds a limit: decode 5 of 4") as error:
        greedy(slots, [Limit("bytes", 4), Limit("decode", 4)])
    assert "solve" in error.value.hint
    assert solve(slots, [Limit("bytes", 4), Limit("decode", 4)]).picks == (1, 0)
    with pytest.raises(UserError, match=r"at once: the least bytes is"):
        greedy(slots, [Limit("bytes", 2), Limit("decode", 2)])


def test_random_choices_are_uniform_over_the_feasible() -> None:
    slots, limits = problem(3, 4, tight=0.3)
    every = {picks for _, picks in feasible(slots, limits)}
    counts = Counter(each.picks for each in random_picks(slots, limits, 200 * len(every), 1))
    assert set(counts) == every
    chi_square = sum((counts[picks] - 200) ** 2 / 200 for picks in every)
    freedom = len(every) - 1
    assert freedom > 5
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_random_choices_are_there_where_few_are_feasible(caplog: pytest.LogCaptureFixture) -> None:
    """Of 2^50 choices one meets both limits, though the mean of half of them does."""
    slots = [
        [Choice("a", 1, {"bytes": 2**n, "decode": 0}), Choice("b", 0, {"bytes": 0, "decode": 2**n})] for n in range(50)
    ]
    wanted = tuple(np.random.default_rng(0).integers(2, size=50).tolist())
    limits = [Limit(key, solution_of(slots, wanted, (), RESOURCES).costs[key]) for key in RESOURCES]
    with caplog.at_level(logging.INFO, "nemotron_h"):
        picked = random_picks(slots, limits, 50, 0)
    assert [each.picks for each in picked] == [wanted] * 50
    assert "50 of 50 random choices are walked to" in caplog.text


def number_after(text: str, message: str) -> float:
    return float(re.search(rf"{text}([\d,.e+-]*\d)", message)[1].replace(",", ""))


def infeasible(slots: Slots, limits: Sequence[Limit], **options) -> UserError:
    with pytest.raises(UserError) as error:
        solve(slots, limits, **options)
    return error.value


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_below_the_least_is_named_with_the_least(seed: int) -> None:
    slots, limits = problem(seed, 6)
    for limit in limits:
        least = sum(min(choice.costs[limit.resource] for choice in each) for each in slots) + limit.fixed
        below = Limit(limit.resource, least / 2, limit.fixed)
        error = infeasible(slots, [below, *(other for other in limits if other is not limit)])
        assert error.message.startswith(f"no choice of the slots meets {limit.resource} <= ")
        said = number_after("the least is ", error.message)
        assert said == pytest.approx(least, rel=1e-5)
        assert solve(slots, [Limit(limit.resource, said, limit.fixed)])
        infeasible(slots, [Limit(limit.resource, said * (1 - 2e-5), limit.fixed)])
        assert f"{limit.resource} to {rounded_up(least)}" in error.hint


@pytest.mark.parametrize("seed", range(4))
def test_limits_that_cannot_be_met_at_once_say_how_far_each_has_to_be_raised(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = [
        [
            Choice(name, rng.uniform(), {"bytes": int(1e6 * x), "decode": 1e-3 * (1.1 - x)})
            for name, x in zip("abc", rng.uniform(0, 1, 3), strict=True)
        ]
        for _ in range(6)
    ]
    every = [solution_of(slots, picks, (), RESOURCES).costs for picks in itertools.product(range(3), repeat=6)]
    limits = [Limit(key, float(np.quantile([costs[key] for costs in every], 0.05))) for key in RESOURCES]
    message = infeasible(slots, limits).message
    for limit, other in (limits, limits[::-1]):
        least = min(costs[limit.resource] for costs in every if costs[other.resource] <= other.most)
        said = number_after(f"the least {limit.resource} is ", message)
        assert said == pytest.approx(least, rel=1e-5)
        assert solve(slots, [Limit(limit.resource, said), other])
        infeasible(slots, [Limit(limit.resource, said * (1 - 2e-5)), other])
    share = number_after("all limits at ", message)
    assert share == pytest.approx(min(max(c[each.resource] / each.most for each in limits) for c in every), rel=1e-5)
    assert solve(slots, [Limit(each.resource, each.most * share) for each in limits])


def test_three_limits_of_which_no_single_one_can_be_raised() -> None:
    costs = ({"x": 2, "y": 2, "z": 0}, {"x": 2, "y": 0, "z": 2}, {"x": 0, "y": 2, "z": 2})
    slots = [[Choice(name, 0, each) for name, each in zip("abc", costs, strict=True)]]
    error = infeasible(slots, [Limit(key, 1) for key in "xyz"])
    assert error.message.endswith("at once: all limits at 2 times are met")


def test_solutions_that_cannot_differ_enough_are_an_error() -> None:
    slots = [
        [Choice("whole", 0.0, {"bytes": 1})],
        [Choice("whole", 0.0, {"bytes": 1}), Choice("none", 1, {"bytes": 0})],
    ]
    with pytest.raises(UserError, match=r"shares at most 0\.4 of its picks with each of 1 others"):
        solutions(slots, (), 2, alpha=0.4)
    with pytest.raises(UserError, match="the least is 2, apart from 1 earlier solutions"):
        solve(slots, [Limit("bytes", 1)], earlier=[(0, 1)], alpha=0.5)


def test_groups_without_a_name_in_common_are_an_error() -> None:
    slots = [[Choice("a", 0.0, {})], [Choice("b", 0.0, {})]]
    assert "none in common: 0, 1" in infeasible(slots, (), equal=[[0, 1]]).message
    assert solve(slots, (), equal=[[0, 1]], exempt=["b"]).picks == (0, 0)


def test_what_is_no_number_is_an_error_that_names_all() -> None:
    def choice(name: str, score: float, **costs: float) -> Choice:
        return Choice(name, score, costs)

    slots = [[choice("a", math.nan, bytes=1), choice("b", 0, bytes=math.inf)], [choice("c", -math.inf, bytes=1)]]
    for search in (lambda s, l: solve(s, l), greedy, lambda s, l: random_picks(s, l, 1, 0)):
        with pytest.raises(UserError) as error:
            search(slots, [Limit("bytes", 5)])
        for said in ("slot 0: score of a is nan", "slot 0: bytes of b is inf", "slot 1: score of c is -inf"):
            assert said in error.value.message
    good = [choice("a", 0, bytes=1)]
    assert "no choice has a cost of decode" in infeasible([good], [Limit("decode", 1)]).message
    assert "at most nan" in infeasible([good], [Limit("bytes", math.nan)]).message
    assert "limited twice" in infeasible([good], [Limit("bytes", 1)] * 2).message
    assert "b has costs of nothing, not of bytes" in infeasible([good, [choice("b", 0)]], ()).message
    assert "slot 1 has no choices" in infeasible([good, []], ()).message
    assert "two choices of one name" in infeasible([good * 2], ()).message
    assert "no slots" in infeasible([], ()).message


def test_a_search_that_runs_out_of_time_says_its_gap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slots, limits = problem(1, 12)
    best = solve(slots, limits)
    original: Callable = program.milp

    def stopped(*arguments, options: dict, **others):
        result = original(*arguments, options={**options, "mip_rel_gap": 0.9, "presolve": False}, **others)
        result.status = 1
        return result

    monkeypatch.setattr(program, "milp", stopped)
    with caplog.at_level(logging.WARNING, "nemotron_h"):
        known = solve(slots, limits, seconds=7)
    assert known.score - known.gap <= best.score <= known.score
    assert known.gap > 1e-3 * best.score
    assert "HiGHS stopped before the optimum was proved" in caplog.text

    def without(*arguments, **others):
        result = stopped(*arguments, **others)
        result.x = None
        return result

    monkeypatch.setattr(program, "milp", without)
    with pytest.raises(UserError, match="no solution within 7 s"):
        solve(slots, limits, seconds=7)


def test_a_search_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    solve(*problem(2, 40))
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


@pytest.mark.parametrize("value", [1.2345612, 0.00012345649, 7e-12, 123_456_789_012, 123456.7, 1e20, 0, -3, -1.2345678])
def test_a_number_in_a_message_is_never_too_small(value: float) -> None:
    said = float(rounded_up(value).replace(",", ""))
    assert value <= said <= value + 1e-5 * abs(value)


def test_it_needs_no_torch() -> None:
    code = "import sys, nemotron_h.compression.puzzle.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_118_layers_of_54_choices_take_seconds(seed: int) -> None:
    """Of Puzzle's 6 variants of attention by 9 of an FFN; layers of one kind cost the same."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, 1, (54, 2))
    slots = [
        [
            Choice(str(n), float(factor * (2 - x - y) ** 2 * rng.uniform(0.8, 1.2)), {"bytes": x, "decode": y})
            for n, (x, y) in enumerate(share.tolist())
        ]
        for factor in rng.lognormal(-4, 1, 118)
    ]
    began = time.process_time()
    best = solve(slots, [Limit("bytes", 50.0), Limit("decode", 50.0)])
    assert time.process_time() - began < 30
    assert best.gap <= 1e-3 * best.score
