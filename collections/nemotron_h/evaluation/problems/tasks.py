"""Generators of problems: each makes one of a difficulty from a random generator, with a key that equal ones share."""

from __future__ import annotations

import random
from collections.abc import Callable

from nemotron_h.evaluation.problems import expressions
from nemotron_h.evaluation.problems.expressions import text
from nemotron_h.evaluation.problems.problem import EXPRESSION, LIST, NUMBER, Problem

#: ours: largest values that come up, of sums and of products; the largest difficulty, whose lines still are short
LARGEST, LARGEST_TARGET, HARDEST = 999, 999, 6

#: a problem and its key
Drawn = tuple[Problem, str]


def arithmetic(rng: random.Random, difficulty: int) -> Drawn:
    """Return a nested expression of + - * with as many operations as its difficulty."""
    while True:
        leaves = [rng.randint(1, 20) for _ in range(difficulty + 1)]
        tree = expressions.tree_of(leaves, "+-*", rng)
        if run := expressions.evaluated(tree, lambda value: abs(value) <= LARGEST):
            break
    value, steps = run
    question = text(tree)
    lines = [f"= {text(left)}" for *_, left in steps]
    lines[0] = f"{question} {lines[0]}"
    return Problem("arithmetic", NUMBER, f"What is {question}?", lines, str(value), [], difficulty), expressions.key(
        tree
    )


def modular(rng: random.Random, difficulty: int) -> Drawn:
    """Return an expression modulo a number, reduced after each of its `difficulty` operations."""
    modulus = rng.randint(3, 20)
    leaves = [rng.randint(1, 20) for _ in range(difficulty + 1)]
    tree = expressions.tree_of(leaves, "+-*", rng)
    value, steps = expressions.evaluated(tree, lambda value: True, lambda value: value % modulus)
    lines = []
    for sign, left, right, whole, _ in steps:
        remainder = "" if whole == whole % modulus else f" = {whole % modulus} (mod {modulus})"
        lines.append(f"{left} {sign} {right} = {whole}{remainder}")
    question = f"What is ({text(tree)}) mod {modulus}?"
    key = f"{modulus} {expressions.key(tree)}"
    return Problem("modular", NUMBER, question, lines, str(value), [], difficulty), key


def _listed(values: list[int]) -> str:
    return f"[{', '.join(map(str, values))}]"


def _running(values: list[int], better: Callable[[int, int], int]) -> list[int]:
    so_far = values[:1]
    for value in values[1:]:
        so_far.append(better(so_far[-1], value))
    return so_far


def _reverse(values: list[int], _: random.Random) -> tuple[str, list[str], list[int]]:
    return "reverse it", [f"from the end: {_listed(values[::-1])}"], values[::-1]


def _sort(values: list[int], _: random.Random) -> tuple[str, list[str], list[int]]:
    lines, left = [], list(values)
    while left:
        lines.append(f"smallest of {_listed(left)}: {min(left)}")
        left.remove(min(left))
    return "sort it", lines, sorted(values)


def _distinct(values: list[int], _: random.Random) -> tuple[str, list[str], list[int]]:
    distinct = list(dict.fromkeys(values))
    return "remove repeated numbers", [f"each once: {_listed(distinct)}"], distinct


def _maximum(values: list[int], _: random.Random) -> tuple[str, list[str], int]:
    return "give the largest number", [f"largest so far: {_listed(_running(values, max))}"], max(values)


def _minimum(values: list[int], _: random.Random) -> tuple[str, list[str], int]:
    return "give the smallest number", [f"smallest so far: {_listed(_running(values, min))}"], min(values)


def _sum(values: list[int], _: random.Random) -> tuple[str, list[str], int]:
    sums = _running(values, int.__add__)
    lines = [f"{so_far} + {value} = {so_far + value}" for so_far, value in zip(sums, values[1:], strict=False)]
    return "add its numbers", lines, sums[-1]


def _count(values: list[int], rng: random.Random) -> tuple[str, list[str], int]:
    wanted = rng.choice(values)
    places = [place for place, value in enumerate(values, 1) if value == wanted]
    return f"count how often it has {wanted}", [f"at places {_listed(places)}"], len(places)


_OF_LISTS = (_reverse, _sort, _distinct)
_OF_NUMBERS = (_maximum, _minimum, _sum, _count)


def lists(rng: random.Random, difficulty: int) -> Drawn:
    """Return an operation on a list of 3 numbers more than its difficulty; from 3 on, two operations."""
    values = [rng.randint(0, 20) for _ in range(difficulty + 3)]
    first = rng.choice(_OF_LISTS if difficulty >= 3 else (*_OF_LISTS, *_OF_NUMBERS))
    chosen = [first]
    if difficulty >= 3:
        chosen.append(rng.choice([each for each in (*_OF_LISTS, *_OF_NUMBERS) if each is not first]))
    words, lines, value = [], [], values
    for operation in chosen:
        asked, steps, value = operation(value, rng)
        words.append(asked)
        lines += steps
    question = f"Take the list {_listed(values)}: {', then '.join(words)}."
    is_list = isinstance(value, list)
    answer, kind = (_listed(value), LIST) if is_list else (str(value), NUMBER)
    return Problem("lists", kind, question, lines, answer, [], difficulty), question


def countdown(rng: random.Random, difficulty: int) -> Drawn:
    """Return numbers, 2 more than the difficulty, and a target that all of them reach; values are positive and whole
    on the way.
    """
    while True:
        given = [rng.randint(1, 25) for _ in range(difficulty + 2)]
        tree = expressions.tree_of(given, "+-*/", rng)
        run = expressions.evaluated(tree, lambda value: 0 < value <= LARGEST_TARGET)
        if run and run[0] not in given:
            break
    target, steps = run
    rng.shuffle(given)
    lines = [f"{left} {sign} {right} = {value}" for sign, left, right, value, _ in steps]
    question = f"Reach {target} with {_listed(given)}, each once at most, by + - * /."
    key = f"{target} {sorted(given)}"
    return Problem("countdown", EXPRESSION, question, lines, text(tree), given, difficulty), key


TASKS: dict[str, Callable[[random.Random, int], Drawn]] = {
    "arithmetic": arithmetic,
    "modular": modular,
    "lists": lists,
    "countdown": countdown,
}
