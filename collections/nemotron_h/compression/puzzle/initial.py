"""Weights of a variant before it is trained: what is left of the layer that it stands for.

Narrower ones keep the most important channels; key-value heads are merged, aligned or as their plain mean; a linear
layer is the least-squares fit of what the layer adds on what it reads. Weights are as a checkpoint holds them, a tensor
for each row of `Block.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import LINEAR, Variant
from nemotron_h.compression.child import whole_axes
from nemotron_h.compression.heads.alignment import LayerAlignment, align_layer, plain_mean
from nemotron_h.compression.heads.fusion import merged_tensors
from nemotron_h.compression.heads.moments import Moments
from nemotron_h.compression.importance import Scores
from nemotron_h.compression.selection import top_channels
from nemotron_h.compression.slicing import cut
from nemotron_h.export.source import ModelSource

#: ours: of the mean square of the input, added to every channel of a fit that the text may not determine
RIDGE = 1e-6


@dataclass(frozen=True)
class Fit:
    """Sums over tokens that determine a linear layer.

    Attributes:
        inputs: X^T X of normalised inputs, float64 [h, h].
        outputs: X^T Y with what the layer adds, float64 [h, h].
    """

    inputs: Tensor
    outputs: Tensor

    def matrix(self) -> Tensor:
        """Return W [h, h] of the least sum of |W x - y|^2."""
        ridge = RIDGE * self.inputs.diagonal().mean() * torch.eye(len(self.inputs), dtype=torch.float64)
        return torch.linalg.solve(self.inputs + ridge, self.outputs).T


@dataclass(frozen=True)
class Knowledge:
    """Measurements of the parent that variants are made by.

    Attributes:
        scores: of its channels.
        moments: layer -> of its key-value heads; None merges neighbours as they are.
        fits: layer -> of a linear layer in its place.
    """

    scores: Scores
    moments: Mapping[int, Moments] | None
    fits: Mapping[int, Fit]


def layer_tensors(source: ModelSource, layer: int) -> list[Tensor]:
    """Return a layer's weights of a checkpoint, in the order of `Block.tensors`."""
    prefix = f"decoder.layers.{layer}."
    return [source.read_row(row) for row in source.rows if next(iter(row.ours)).startswith(prefix)]


def initial_tensors(
    parent: ModelDefinition, layer: int, variant: Variant, tensors: list[Tensor], knowledge: Knowledge
) -> list[Tensor]:
    """Return the weights of a variant that has its own.

    Args:
        tensors: of the parent's layer, in float32 or wider.
    """
    if variant.name == LINEAR:
        return [tensors[0].clone(), knowledge.fits[layer].matrix().to(tensors[0].dtype)]
    block, widths = parent.blocks[layer], dict(variant.widths)
    if alignment := merging(parent, layer, variant, knowledge):
        key = alignment.heads.key
        merged = parent.block(block.letter, {**parent.overrides.get(layer, {}), key: widths.pop(key)})
        tensors, block = merged_tensors(block, merged, alignment, tensors), merged
    if widths:
        kept = whole_axes(block) | top_channels(
            block, knowledge.scores.inner.get(layer, {}), {**{a.key: a.size for a in block.axes()}, **widths}
        )
        parts = block.cuts(kept, np.arange(parent.hidden_size))
        tensors = [cut(tensor, part) for tensor, part in zip(tensors, parts, strict=True)]
    return [tensor.clone() for tensor in tensors]


def merging(parent: ModelDefinition, layer: int, variant: Variant, knowledge: Knowledge) -> LayerAlignment | None:
    """Return how a variant's key-value heads are merged; None where it has all of its layer's."""
    heads = parent.blocks[layer].attention_heads()
    if heads is None or heads.key not in variant.widths:
        return None
    count = variant.widths[heads.key]
    if knowledge.moments is None:
        return plain_mean(heads, count)
    return align_layer(knowledge.moments[layer], heads, count)
