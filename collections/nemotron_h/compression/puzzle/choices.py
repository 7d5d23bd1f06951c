"""Variants of layers with their scores and costs, limits of what a model may need, and a choice of all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron_h.core.errors import UserError


@dataclass(frozen=True)
class Choice:
    """Variant of a layer.

    Attributes:
        name: of its slot's choices its own.
        score: how much worse the model is with it, such as the KL divergence to the parent; less is better.
        costs: by resource, such as parameters, bytes or seconds; every choice states the same ones.
    """

    name: str
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Limit:
    """Most that a model may need of a resource.

    Attributes:
        most: of the whole model.
        fixed: that it needs outside of the slots, for embedding and output.
    """

    resource: str
    most: float
    fixed: float = 0.0


@dataclass(frozen=True)
class Solution:
    """Choice of every slot.

    Attributes:
        picks: number of the choice, by slot.
        score: sum of their scores.
        costs: by resource, with what its limit states as fixed.
        gap: no solution has a score below `score - gap`; NaN where no bound is known.
    """

    picks: tuple[int, ...]
    score: float
    costs: Mapping[str, float]
    gap: float = math.nan


Slots = Sequence[Sequence[Choice]]


def check(slots: Slots, limits: Sequence[Limit]) -> tuple[str, ...]:
    """Return the resources that all choices state.

    Errors:
        UserError: no choice, two of one name, numbers that are missing or not finite; names all of them.
    """
    resources = tuple(slots[0][0].costs) if slots and slots[0] else ()
    wrong = [] if slots else ["there are no slots"]
    for number, slot in enumerate(slots):
        if not slot:
            wrong.append(f"slot {number} has no choices")
        if len({choice.name for choice in slot}) < len(slot):
            wrong.append(f"slot {number} has two choices of one name")
        for choice in slot:
            if set(choice.costs) != set(resources):
                listed = ", ".join(choice.costs) or "nothing"
                wrong.append(f"slot {number}: {choice.name} has costs of {listed}, not of {', '.join(resources)}")
            numbers = {"score": choice.score, **choice.costs}
            wrong += [
                f"slot {number}: {key} of {choice.name} is {value}"
                for key, value in numbers.items()
                if not math.isfinite(value)
            ]
    if len({limit.resource for limit in limits}) < len(limits):
        wrong.append("a resource is limited twice")
    for limit in limits:
        if limit.resource not in resources:
            wrong.append(f"no choice has a cost of {limit.resource}, which is limited")
        if not (math.isfinite(limit.most) and math.isfinite(limit.fixed)):
            wrong.append(f"limit of {limit.resource}: at most {limit.most}, {limit.fixed} of it fixed")
    if wrong:
        raise UserError("; ".join(wrong), hint="score or measure these again, or leave the variants out")
    return resources


def solution_of(
    slots: Slots, picks: Sequence[int], limits: Sequence[Limit], resources: Sequence[str], gap: float = math.nan
) -> Solution:
    """Return the score and costs of picks; each sum is rounded once."""
    chosen = [slot[pick] for slot, pick in zip(slots, picks, strict=True)]
    fixed = {limit.resource: limit.fixed for limit in limits}
    costs = {key: math.fsum([fixed.get(key, 0.0), *(choice.costs[key] for choice in chosen)]) for key in resources}
    return Solution(tuple(map(int, picks)), math.fsum(choice.score for choice in chosen), costs, gap)
