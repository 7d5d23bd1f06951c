"""From a candidate's numbers to a child: the most important layers and channels stay. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nemotron_h.architecture.definition import FFN, LAYER_NAMES, MAMBA, ModelDefinition
from nemotron_h.compression.candidates import Candidate
from nemotron_h.compression.child import Child
from nemotron_h.compression.importance import Scores


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` highest scores, ascending; of equal ones the first stay."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_layers(pattern: str, scores: np.ndarray, counts: dict[str, int]) -> tuple[int, ...]:
    """The most important layers of each type.

    Args:
        pattern: of the parent.
        scores: [layers].
        counts: letter -> how many stay.
    """
    kept: list[int] = []
    for symbol, count in counts.items():
        layers = np.array([number for number, letter in enumerate(pattern) if letter == symbol], dtype=np.int64)
        kept.extend(layers[top(scores[layers], count)].tolist())
    return tuple(sorted(kept))


def kept_heads(x: np.ndarray, channels: np.ndarray, groups: int, count: int) -> np.ndarray:
    """The most important heads of each group (2504.11409): by the norm of their scores over the kept channels.

    Args:
        x: scores [heads, head_dim].
        channels: of a head, that stay.
        groups: that share B and C.
        count: heads that stay, in all groups together.
    """
    by_group = np.linalg.norm(x[:, channels], axis=1).reshape(groups, -1)
    return np.concatenate([top(scores, count // groups) + n * by_group.shape[1] for n, scores in enumerate(by_group)])


def child_of(parent: ModelDefinition, scores: Scores, candidate: Candidate) -> Child:
    """The child that a candidate stands for: the same layers and channels each time."""
    counts = {symbol: candidate.count(symbol) for symbol in LAYER_NAMES}
    layers = kept_layers(parent.pattern, scores.layers, counts)

    def of(symbol: str) -> Iterable[int]:
        return (layer for layer in layers if parent.pattern[layer] == symbol)

    # a channel's score is its norm over all heads (2504.11409)
    channels = {n: top(np.linalg.norm(scores.x[n], axis=0), candidate.mamba_head_dim) for n in of(MAMBA)}
    heads = {
        n: kept_heads(scores.x[n], channels[n], parent.mamba_num_groups, candidate.mamba_num_heads) for n in of(MAMBA)
    }
    neurons = {n: top(scores.neurons[n], candidate.ffn_hidden_size) for n in of(FFN)}
    child = Child(layers, top(scores.hidden, candidate.hidden_size), neurons, heads, channels)
    child.check(parent)
    return child
