"""Choose the layers and channels of a candidate's child: the most important ones stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemotron_h.architecture.blocks.block import Block, Indices
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.compression.candidates import Candidate
from nemotron_h.compression.child import Child, whole_axes
from nemotron_h.compression.importance import Scores
from nemotron_h.core.errors import UserError


def top(scores: np.ndarray, count: int) -> Indices:
    """Return the places of the `count` highest scores, ascending; of equal ones the first stay."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def top_layers(pattern: str, scores: np.ndarray, counts: Mapping[str, int]) -> tuple[int, ...]:
    """Return the most important layers of each kind.

    Args:
        pattern: of the parent.
        scores: [layers].
        counts: letter -> how many stay.
    """
    chosen: list[int] = []
    for symbol, count in counts.items():
        layers = np.array([number for number, letter in enumerate(pattern) if letter == symbol], dtype=np.int64)
        chosen.extend(layers[top(scores[layers], count)].tolist())
    return tuple(sorted(chosen))


def top_channels(block: Block, scores: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, Indices]:
    """Return what stays of a layer's axes, the last axis chosen first (2504.11409).

    The score of a place on one of several axes is the norm over the others, of those of their places that stay as far
    as that is decided: a Mamba-2 channel's over all heads, a head's over the channels that stay.

    Args:
        scores: activation -> [size of axis, ...] over its axes.
        widths: key of the model -> how many stay, in all groups together.
    Errors:
        UserError: the scores lack an activation by which channels would go.
    """
    chosen = whole_axes(block)
    for activation, axes in block.activations().items():
        if all(widths[axis.key] == axis.size for axis in axes):
            continue
        if activation not in scores:
            raise UserError(
                f"the importance says nothing of {axes[-1].name}: it was measured by an earlier version",
                hint="measure the importance again",
            )
        values = scores[activation]
        if axes[-1].each:
            outer, axis = axes
            rows = values[chosen[outer.name]]
            chosen[axis.name] = np.stack([top(row, widths[axis.key]) for row in rows])
            continue
        for place, axis in reversed(list(enumerate(axes))):
            others = tuple(n for n in range(values.ndim) if n != place)
            by_place = np.linalg.norm(values, axis=others) if others else values
            by_group, count = by_place.reshape(axis.groups, -1), widths[axis.key] // axis.groups
            size = by_group.shape[1]
            chosen[axis.name] = np.concatenate([top(each, count) + n * size for n, each in enumerate(by_group)])
            values = values[(slice(None),) * place + (chosen[axis.name],)]
    return chosen


def child_of(parent: ModelDefinition, scores: Scores, candidate: Candidate) -> Child:
    """Return the child that a candidate stands for: the same layers and channels each time."""
    # layers of a kind that a grid has no list for stay
    counts = {**{letter: parent.count(letter) for letter in parent.pattern}, **candidate.layers}
    layers = top_layers(parent.pattern, scores.layers, counts)
    widths = candidate.widths
    chosen = {layer: top_channels(parent.blocks[layer], scores.inner.get(layer, {}), widths) for layer in layers}
    child = Child(layers, top(scores.hidden, candidate.hidden_size), chosen)
    child.check(parent)
    return child
