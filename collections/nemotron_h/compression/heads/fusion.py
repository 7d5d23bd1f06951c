"""Fuse rotations into the weights of a model in memory, and merge its key-value heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
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
        blocks = (each.blocks[layer] for each in (model.definition, definition))
        layers[layer] = type(layers[layer])(*merged_tensors(*blocks, alignment, list(vars(layers[layer]).values())))
    return GenerationModel(definition, model.embedding, layers, model.final_norm, model.output)


def merged_tensors(block: Block, merged: Block, alignment: LayerAlignment, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a layer's weights with the rotations in them, and its key-value heads merged.

    Args:
        block, merged: the layer before and after; with as many key-value heads it is aligned alone.
        tensors: a row of `Block.tensors` each.
    """
    qkv, proj = alignment.heads.qkv, alignment.heads.proj
    before, after = (qkv_row(each) for each in (block, merged))
    fewer = merged.attention_heads().groups < alignment.heads.groups
    parts = alignment.qkv(*before.to_theirs(tensors[qkv]).values(), merge=fewer)
    (fused,) = after.to_ours(torch.cat(parts)).values()
    changed = list(tensors)
    changed[qkv], changed[proj] = fused.to(tensors[qkv].dtype), alignment.proj(tensors[proj]).to(tensors[proj].dtype)
    return changed


def qkv_row(block: Block) -> Weight:
    """Return the row of queries with keys and values in the table of weights; without a prefix of its names."""
    return Weight(**vars(list(block.tensors("", ""))[block.attention_heads().qkv]))


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
        row, qkv = qkv_row(self.definition.blocks[layer]), getattr(w, name)
        queries, keys, values = row.to_theirs(qkv).values()
        parts = (queries, *(each.to(qkv.dtype) for each in alignment.pooled(keys, values)))
        (pooled,) = row.to_ours(torch.cat(parts)).values()
        return replace(w, **{name: pooled})
