"""Alignment of key-value heads (arXiv 2412.20677): which heads of a layer make a group, and how each is rotated.

With a rotation R of a head's keys and N of its values, for that head and all query heads that read it

    W_k <- R^T W_k,  W_q <- R^T W_q,  W_v <- N^T W_v,  W_o <- W_o N

leave the layer's function as it is: q^T R R^T k = q^T k, W_o N N^T v = W_o v. Merging then replaces the keys and the
values of a group by their mean.

Axes: g key-value heads, q query heads of each, d channels of a head, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import AttentionHeads
from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.compression.heads.grouping import Groups, best_groups
from nemotron_h.compression.heads.moments import Moments
from nemotron_h.compression.heads.procrustes import (
    agreement,
    best_rotation,
    energies,
    energy,
    group_rotations,
    shared_energy,
)
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name


@dataclass(frozen=True)
class LayerAlignment:
    """Groups and rotations of the heads of a layer, in the order of its parent.

    Attributes:
        heads: of the parent.
        groups: its key-value heads, all in groups of one size.
        keys, values: rotations R and N, float64 [g, d, d].
        similarity: by `keys` and `values`: of each two heads after the best rotation of one onto the other, the cosine
            of all that they compute, [g, g].
        lost: by `keys` and `values`: the share of their squares that merging loses.
        lost_by_neighbours: likewise, of the mean of neighbours as they are.
    """

    heads: AttentionHeads
    groups: Groups
    keys: Tensor
    values: Tensor
    similarity: Mapping[str, list[list[float]]] = field(default_factory=dict)
    lost: Mapping[str, float] = field(default_factory=dict)
    lost_by_neighbours: Mapping[str, float] = field(default_factory=dict)

    def qkv(self, queries: Tensor, keys: Tensor, values: Tensor, merge: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's matrices [heads x d, h] with the rotations in them, group by group.

        Args:
            merge: a group's keys and values become their mean.
        """
        of_queries = self._ordered(_rotated(self.keys[:, None], self._split(queries, self.heads.queries)))
        both = []
        for matrix, rotations in ((keys, self.keys), (values, self.values)):
            rotated = self._ordered(_rotated(rotations, self._split(matrix)))
            both.append(rotated.unflatten(0, (len(self.groups), -1)).mean(1) if merge else rotated)
        return of_queries.flatten(0, 2), both[0].flatten(0, 1), both[1].flatten(0, 1)

    def proj(self, proj: Tensor) -> Tensor:
        """Return the output projection [h, heads x d] with the values' rotations in it, group by group."""
        by_head = self._split(proj.T, self.heads.queries)
        return self._ordered(_rotated(self.values[:, None], by_head)).flatten(0, 2).T

    def pooled(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [heads x d, h] in the parent's order and orientation, each head its group's mean: with
        the parent's queries and output projection they compute what the merged layer does.
        """
        both = []
        for matrix, rotations in ((keys, self.keys), (values, self.values)):
            heads = _rotated(rotations, self._split(matrix))
            for group in self.groups:
                heads[list(group)] = heads[list(group)].mean(0)
            both.append(_rotated(rotations.mT, heads).flatten(0, 1))
        return both[0], both[1]

    def record(self) -> dict[str, Any]:
        """Return groups, similarities and losses, for JSON."""
        names = ("similarity", "lost", "lost_by_neighbours")
        return {"groups": [list(group) for group in self.groups], **{n: v for n in names if (v := getattr(self, n))}}

    def line(self) -> str:
        """Return groups and losses on a line."""
        parts = [f"{part} lose {self.lost[part]:.1%} ({self.lost_by_neighbours[part]:.1%})" for part in self.lost]
        return ", ".join([" ".join("+".join(map(str, group)) for group in self.groups), *parts])

    def _split(self, matrix: Tensor, queries: int = 0) -> Tensor:
        """Return rows by head in float64: [g, d, h], of queries [g, q, d, h]."""
        return matrix.double().unflatten(0, (self.heads.groups, *([queries] if queries else []), self.heads.dim))

    def _ordered(self, by_head: Tensor) -> Tensor:
        """Return heads in the order of the groups."""
        return by_head[[head for group in self.groups for head in group]]


def _rotated(rotations: Tensor, rows: Tensor) -> Tensor:
    return rotations.mT @ rows


def attention_layers(definition: ModelDefinition, kv_heads: int, origin: str) -> dict[int, AttentionHeads]:
    """Return layer -> its heads, of all that have attention.

    Args:
        kv_heads: groups that they are to be put into.
        origin: the checkpoint, to name in an error.
    Errors:
        UserError: there are none, a layer's key-value heads are no multiple of `kv_heads`, or all have just as many.
    """
    layers = {n: heads for n, block in enumerate(definition.blocks) if (heads := block.attention_heads())}
    if not layers:
        raise UserError(
            f"{origin}: {definition.name} has no layer with attention, so no key-value heads",
            hint="prune it otherwise: nemotron-h prune",
        )
    for layer, heads in layers.items():
        heads.check_free(f"{origin}: --kv-heads = {kv_heads}")
        if kv_heads < 1 or heads.groups % kv_heads:
            own = heads.key in definition.overrides.get(layer, {})
            where = f"model.overrides.{layer}.{heads.key}" if own else f"model.{heads.key}"
            fits = [n for n in range(1, heads.groups + 1) if all(each.groups % n == 0 for each in layers.values())]
            raise UserError(
                f"{origin}: --kv-heads = {kv_heads} does not divide {where} = {heads.groups} (layer {layer})",
                hint=f"what divides the heads of all layers: {', '.join(map(str, fits))}",
            )
    if all(heads.groups == kv_heads for heads in layers.values()):
        raise UserError(
            f"{origin}: --kv-heads = {kv_heads} is what every layer of {definition.name} has: nothing is merged",
            hint="give fewer" if kv_heads > 1 else "there is no less than one",
        )
    return layers


def align_layer(
    moments: Moments, heads: AttentionHeads, kv_heads: int, seed: int = 0, groups: Groups | None = None
) -> LayerAlignment:
    """Group the heads of a layer and rotate each group into agreement.

    Groups have the largest sum of what their heads agree in after the best rotations, keys and values weighing the
    same: with s the summed squares of all heads, sum over pairs (tr R^T K_i^T K_j / s_k + tr N^T V_i^T V_j / s_v). For
    groups of two that is what merging loses least of.

    Args:
        moments: of the layer.
        kv_heads: groups; divides the layer's heads.
        seed: of the search.
        groups: these, without a search.
    """
    parts = {"keys": (moments.keys, heads.rotary), "values": (moments.values, 0)}
    agreements = {}
    for part, (cross, rotary) in parts.items():
        agreements[part] = agreement(best_rotation(cross, rotary), cross)
    shares = [agreements[part] / _positive(energy(cross)) for part, (cross, _) in parts.items()]
    groups = groups or best_groups(sum(shares).numpy(), heads.groups // kv_heads, seed)
    rotations, lost, by_neighbours, similarity = {}, {}, {}, {}
    for part, (cross, rotary) in parts.items():
        rotations[part] = torch.empty(heads.groups, heads.dim, heads.dim, dtype=torch.float64)
        for group in map(list, groups):
            rotations[part][group] = group_rotations(cross[group][:, group], rotary)
        lost[part] = _lost(cross, groups, rotations[part])
        unrotated = torch.eye(heads.dim, dtype=torch.float64).expand(heads.groups, -1, -1)
        by_neighbours[part] = _lost(cross, neighbours(heads, kv_heads), unrotated)
        norms = energies(cross).sqrt()
        cosines = agreements[part] / (norms[:, None] * norms).clamp(min=torch.finfo(torch.float64).tiny)
        similarity[part] = [[round(cosine, 4) for cosine in row] for row in cosines.tolist()]
    return LayerAlignment(heads, groups, rotations["keys"], rotations["values"], similarity, lost, by_neighbours)


def _positive(number: float) -> float:
    return number or 1.0  # heads that compute zeros alone agree in nothing


def _lost(cross: Tensor, groups: Groups, rotations: Tensor) -> float:
    shared = sum(shared_energy(cross[group][:, group], rotations[group]) for group in map(list, groups))
    return 1 - shared / _positive(energy(cross))


def neighbours(heads: AttentionHeads, kv_heads: int) -> Groups:
    """Return groups of heads that follow each other, as models with grouped queries are made by plain pooling."""
    size = heads.groups // kv_heads
    return tuple(tuple(range(start, start + size)) for start in range(0, heads.groups, size))


def plain_mean(heads: AttentionHeads, kv_heads: int) -> LayerAlignment:
    """Return neighbours in groups, as they are (mean pooling: arXiv 2305.13245, 2.1)."""
    unrotated = torch.eye(heads.dim, dtype=torch.float64).repeat(heads.groups, 1, 1)
    return LayerAlignment(heads, neighbours(heads, kv_heads), unrotated, unrotated)


def align(
    moments: Mapping[int, Moments],
    layers: Mapping[int, AttentionHeads],
    kv_heads: int,
    seed: int = 0,
    done: Callable[[int, LayerAlignment], None] = lambda *_: None,
) -> dict[int, LayerAlignment]:
    """Return layer -> its alignment.

    Args:
        layers: of `attention_layers`.
        kv_heads, seed: as of `align_layer`.
        done: told of each layer.
    """
    alignments = {}
    for layer, heads in layers.items():
        alignments[layer] = align_layer(moments[layer], heads, kv_heads, seed)
        done(layer, alignments[layer])
    return alignments


def aligned_definition(parent: ModelDefinition, kv_heads: int | None, name: str) -> ModelDefinition:
    """Return the definition of a model whose heads are merged to so many in every layer; None: aligned alone."""
    check_name("the model's name", name)
    if kv_heads is None:
        return replace(parent, name=name).counted()
    (key,) = {heads.key for block in parent.blocks if (heads := block.attention_heads())}
    others = {layer: {k: v for k, v in widths.items() if k != key} for layer, widths in parent.overrides.items()}
    definition = replace(
        parent,
        name=name,
        expect=Expect(),
        overrides={layer: widths for layer, widths in others.items() if widths},
        sources={**parent.sources, key: f"merged from {parent.name}"},
        **{key: kv_heads},
    )
    definition.validate_structure(name)
    return definition.counted()
