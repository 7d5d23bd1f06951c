"""Expressions of whole numbers as trees: a random one, its text, its value step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Union


class Node(NamedTuple):
    """An operation, one of `+ - * /`, on two trees."""

    sign: str
    left: Tree
    right: Tree


Tree = Union[int, Node]  # noqa: UP007 - Python 3.10 cannot join the name of a class to come
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}
_MINUS, _TIMES = "-", "*"


def tree_of(leaves: Sequence[int], signs: str, rng: random.Random) -> Tree:
    """Return a random tree with these leaves from left to right."""
    if len(leaves) == 1:
        return leaves[0]
    cut = rng.randint(1, len(leaves) - 1)
    sign = rng.choice(signs)
    return Node(sign, tree_of(leaves[:cut], signs, rng), tree_of(leaves[cut:], signs, rng))


def text(tree: Tree) -> str:
    """Return a tree with no more parentheses than it needs."""
    if isinstance(tree, int):
        return str(tree)
    left, right = text(tree.left), text(tree.right)
    binds = _BINDS[tree.sign]
    if isinstance(tree.left, Node) and _BINDS[tree.left.sign] < binds:
        left = f"({left})"
    same = (tree.sign, getattr(tree.right, "sign", None)) in (("+", "+"), ("+", "-"), ("*", "*"))
    bare = _BINDS[tree.right.sign] > binds or same if isinstance(tree.right, Node) else tree.right >= 0
    return f"{left} {tree.sign} {right if bare else f'({right})'}"


def key(tree: Tree) -> str:
    """Return a text that trees share which differ in the order of terms and factors alone, as those of one text do."""
    if isinstance(tree, int):
        return str(tree)
    if tree.sign == "/":
        return f"({key(tree.left)}/{key(tree.right)})"
    return f"({''.join(sorted(_terms(tree) if _BINDS[tree.sign] == 1 else _factors(tree)))})"


def _terms(tree: Tree, minus: bool = False) -> Iterator[str]:
    if isinstance(tree, Node) and _BINDS[tree.sign] == 1:
        yield from _terms(tree.left, minus)
        yield from _terms(tree.right, minus != (tree.sign == _MINUS))
    else:
        yield f"{'-' if minus else '+'}{key(tree)}"


def _factors(tree: Tree) -> Iterator[str]:
    if isinstance(tree, Node) and tree.sign == _TIMES:
        yield from _factors(tree.left)
        yield from _factors(tree.right)
    else:
        yield f"*{key(tree)}"


def combined(sign: str, left: int, right: int) -> int | None:
    """Return the value of an operation; None of a quotient that is not whole."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def first(tree: Node) -> tuple[str, int, int]:
    """Return sign and numbers of the leftmost operation that has numbers alone."""
    for part in (tree.left, tree.right):
        if isinstance(part, Node):
            return first(part)
    return tree.sign, tree.left, tree.right


def reduced(tree: Node, value: int) -> Tree:
    """Return the tree with a number in place of its `first` operation."""
    if isinstance(tree.left, Node):
        return Node(tree.sign, reduced(tree.left, value), tree.right)
    if isinstance(tree.right, Node):
        return Node(tree.sign, tree.left, reduced(tree.right, value))
    return value


def evaluated(
    tree: Tree, fits: Callable[[int], bool], result: Callable[[int], int] = int
) -> tuple[int, list[tuple[str, int, int, int, Tree]]] | None:
    """Return the value of a tree, and sign, numbers, value and remaining tree of each operation in order.

    Args:
        fits: whether a value may come up.
        result: of the value of an operation.
    Returns:
        None where a value does not fit or a quotient is not whole.
    """
    steps = []
    while isinstance(tree, Node):
        sign, left, right = first(tree)
        value = combined(sign, left, right)
        if value is None or not fits(value):
            return None
        tree = reduced(tree, result(value))
        steps.append((sign, left, right, value, tree))
    return tree, steps
