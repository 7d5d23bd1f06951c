"""Rank shapes of a number of parameters by predicted loss, under a bound of latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.laws.law import Law
from nemotron_h.laws.shapes import enumerate_shapes
from nemotron_h.planning.latency import Latency

#: seconds that a bound is of
PARTS = ("decode", "prefill")


@dataclass(frozen=True)
class Ranked:
    """Shape with its predictions.

    Attributes:
        definition: counted and valid.
        loss: predicted by the law.
        latency: in the scenario that was asked for.
    """

    definition: ModelDefinition
    loss: float
    latency: Latency


@dataclass(frozen=True)
class Ranking:
    """Shapes under a bound, and why others are not among them.

    Attributes:
        shapes: the least loss first.
        slower: shapes above the bound.
        outside_law: shapes that are deeper or wider than the law's runs.
        not_measured: shapes whose layers are smaller or larger than those that were measured.
    """

    shapes: list[Ranked]
    slower: int
    outside_law: int
    not_measured: int


def rank(
    like: ModelDefinition,
    parameters: int,
    tokens: float,
    law: Law,
    latency: Callable[[ModelDefinition], Latency | None],
    bound: float | None = None,
    part: str = "decode",
    tensor: int = 1,
) -> Ranking:
    """Return the shapes of a number of parameters, ranked.

    Args:
        like: as of `enumerate_shapes`.
        tokens: that are trained.
        latency: of a model; None where it is not known.
        bound: seconds; None is none.
        part: of `Latency`, that the bound is of.
        tensor: ranks over which every layer has to split.
    Errors:
        UserError: nothing is left; names the reason, and the fastest there is.
    """
    shapes, slower, outside, unknown = [], [], 0, 0
    for definition in enumerate_shapes(like, parameters, tensor):
        if not law.covers(definition):
            outside += 1
        elif (seconds := latency(definition)) is None:
            unknown += 1
        elif bound is not None and getattr(seconds, part) > bound:
            slower.append(getattr(seconds, part))
        else:
            shapes.append(Ranked(definition, law.loss(definition, tokens), seconds))
    if not shapes and slower:
        raise UserError(
            f"none of {len(slower):,} shapes of {parameters:,} parameters has a {part} below {bound * 1e3:,.3g} ms",
            hint=f"the fastest has {min(slower) * 1e3:,.3g} ms: raise --latency-below or lower --parameters",
        )
    if not shapes:
        raise UserError(
            f"no shape of {parameters:,} parameters can be ranked: {outside:,} are deeper or wider than the law's "
            f"runs, {unknown:,} have layers smaller or larger than those that were measured",
            hint="ask for other --parameters, or measure wider layers: nemotron-h layer-costs --hidden ...",
        )
    return Ranking(sorted(shapes, key=lambda each: each.loss), len(slower), outside, unknown)
