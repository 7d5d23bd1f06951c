"""Attention layers of a Transformer that becomes a hybrid: which there are, how many stay, where. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemotron_h.architecture.blocks.transplant import attention_layers
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError

#: ours: tokens of a window whose matrices are compared; one then has 256 MiB in float32, and several are held
LONGEST_MATRIX = 8192


def candidates(parent: ModelDefinition, origin: str) -> list[int]:
    """Return the attention layers of a parent.

    Args:
        origin: begins an error.
    Errors:
        UserError: it has none.
    """
    layers = attention_layers(parent.blocks)
    if not layers:
        kinds = ", ".join(f"{kind.letter} ({kind.title})" for kind in parent.kinds)
        raise UserError(
            f"{origin}: {parent.name} has no layer that is attention alone (*), so nothing to transplant",
            hint=f"it has {kinds}",
        )
    return layers


def counts(parent: ModelDefinition, shares: Sequence[float], key: str) -> list[int]:
    """Return how many attention layers stay after each round: the nearest whole number of each share, halves up.

    Args:
        shares: of the parent's attention layers.
        key: of the recipe, to begin an error.
    Errors:
        UserError: there is no share, or no attention; a share keeps all layers, none where it is above 0, or as many
            as the one before it.
    """
    layers = len(candidates(parent, key))
    if not shares:
        raise UserError(f"{key} is empty", hint="give a share of each round, such as [0.5, 0.25, 0.0]")
    stay, before = [], layers
    for share in shares:
        count = math.floor(share * layers + 0.5)
        said = f"{key} has {share:g}: of {layers} attention layers of {parent.name} that is {count}, to the nearest"
        if share and not count:
            raise UserError(said, hint=f"give 0 for no attention, or {1 / layers:.3g} for one layer")
        if count >= before:
            hint = "shares fall from round to round, each by a layer at least, the first from all"
            raise UserError(f"{said}, where {before} are left", hint=hint)
        stay.append(count)
        before = count
    return stay


def evenly(layers: Sequence[int], count: int) -> list[int]:
    """Return so many layers, spread evenly, of which the last is the last: of half the second, fourth, ... as where
    2408.15237 replaces half, of a quarter the fourth, eighth, ...
    """
    return [layers[-(-(number * len(layers)) // count) - 1] for number in range(1, count + 1)]


def check_matrices(length: int, key: str) -> None:
    """Refuse windows of which the matrices of heads would take too much memory.

    Args:
        length: tokens of a window.
        key: that states it, begins the error.
    """
    if length > LONGEST_MATRIX:
        raise UserError(
            f"{key} = {length:,}: a matrix of every head would have {length:,} x {length:,} elements",
            hint=f"{LONGEST_MATRIX:,} tokens at most (2408.10189 has 2,048), or train no matrices",
        )
