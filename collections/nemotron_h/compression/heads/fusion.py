"""Fuse rotations into the weights of a model in memory, and merge its key-value heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import Weight
from nemotron_h.compression.heads.alignment import LayerAlignment
from nemotron_h.inference.model import GenerationModel

Alignments = Mapping[int, LayerAlignment]


def aligned_model(model: GenerationModel, alignments: Alignments, definition: ModelDefinition) -> GenerationModel:
    """Return the aligned model in memory; layers without attention are the parent's own.

    Args:
        model: the parent.
        alignments: of all its layers with attention.
        definition: of `aligned_definition`: with the parent's number of key-value heads they are aligned alone.
    """
    layers = list(model.layers)
    for layer, alignment in alignments.items():
        heads, w = alignment.heads, layers[layer]
        merge = definition.blocks[layer].attention_heads().groups < heads.groups
        qkv, proj = (fields(w)[place].name for place in (heads.qkv, heads.proj))
        before, after = (layer_weights(d, layer)[heads.qkv] for d in (model.definition, definition))
        parts = alignment.qkv(*before.to_theirs(getattr(w, qkv)).values(), merge)
        (fused_qkv,) = after.to_ours(torch.cat(parts)).values()
        fused = {qkv: fused_qkv, proj: alignment.proj(getattr(w, proj))}
        layers[layer] = replace(w, **{name: tensor.to(model.dtype) for name, tensor in fused.items()})
    return GenerationModel(definition, model.embedding, layers, model.final_norm, model.output)


def layer_weights(definition: ModelDefinition, layer: int) -> list[Weight]:
    """Return the rows of a layer in the table of weights; without a prefix of their names."""
    return [Weight(**vars(row)) for row in definition.blocks[layer].tensors("", "")]


class PooledLayers(Sequence[Any]):
    """The parent's layers with each key-value head the mean of its group, rotated back: they compute what the merged
    layers do, with as many heads as before, in the order of before.
    """

    def __init__(self, model: GenerationModel, alignments: Alignments) -> None:
        self.layers, self.definition, self.alignments = model.layers, model.definition, alignments

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> Any:
        w = self.layers[layer]
        if layer not in self.alignments:
            return w
        alignment = self.alignments[layer]
        name = fields(w)[alignment.heads.qkv].name
        row, qkv = layer_weights(self.definition, layer)[alignment.heads.qkv], getattr(w, name)
        queries, keys, values = row.to_theirs(qkv).values()
        parts = (queries, *(each.to(qkv.dtype) for each in alignment.pooled(keys, values)))
        (pooled,) = row.to_ours(torch.cat(parts)).values()
        return replace(w, **{name: pooled})
