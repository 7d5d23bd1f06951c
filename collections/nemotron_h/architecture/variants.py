"""Variants of the layers of a parent (2411.19146, 2): the layer itself, a narrower one, a linear one, none.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.blocks.registry import kind_named
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.pruned_widths import check_width
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.schema.puzzle import LibrarySchema

#: names of variants that are no widths
PARENT, LINEAR, NO_OP = "parent", "linear", "no_op"
#: kind that a linear variant is
LINEAR_KIND = "linear"
#: keys of a library that are widths
WIDTHS = tuple(f.name for f in fields(LibrarySchema) if f.name not in (LINEAR, NO_OP))


@dataclass(frozen=True)
class Variant:
    """Variant of a layer: itself, or what may stand in its place.

    Attributes:
        name: `parent`, `linear`, `no_op`, or its widths, as `mamba_num_heads=8,mamba_head_dim=16`.
        block: the layer; None is no layer.
        widths: that differ from the parent's, by their keys in the model.
    """

    name: str
    block: Block | None
    widths: Mapping[str, int]

    @property
    def trained(self) -> bool:
        """Tell whether it has weights of its own."""
        return self.name not in (PARENT, NO_OP)


def variants_of(parent: ModelDefinition, library: LibrarySchema) -> list[dict[str, Variant]]:
    """Return the variants of each layer by name, the layer itself first."""
    return [_of_layer(parent, layer, library) for layer in range(parent.num_layers)]


def _of_layer(parent: ModelDefinition, layer: int, library: LibrarySchema) -> dict[str, Variant]:
    block = parent.blocks[layer]
    own = {key: getattr(block, key) for key in WIDTHS if key in block.widths}
    choices = [sorted({getattr(block, key), *getattr(library, key)}, reverse=True) for key in own]
    variants = []
    for values in product(*choices):
        widths = {key: value for key, value in zip(own, values, strict=True) if value < own[key]}
        if any(value > own[key] for key, value in zip(own, values, strict=True)):
            continue  # an override of this layer is narrower than what the library names
        name = ",".join(f"{key}={value}" for key, value in widths.items()) or PARENT
        overrides = {**parent.overrides.get(layer, {}), **widths}
        variants.append(Variant(name, parent.block(block.letter, overrides) if widths else block, widths))
    if block.name in library.linear:
        variants.append(Variant(LINEAR, parent.block(kind_named(LINEAR_KIND).letter), {}))
    if block.name in library.no_op:
        variants.append(Variant(NO_OP, None, {}))
    return {variant.name: variant for variant in variants}


def check_library(parent: ModelDefinition, library: LibrarySchema, origin: str) -> None:
    """Check that a library fits a parent.

    Errors:
        UserError: a width that no layer can have, a kind that the parent lacks, or a library of nothing.
    """
    heads = {heads.key: heads for block in parent.blocks if (heads := block.attention_heads())}
    for key in WIDTHS:
        name = f"{origin}: puzzle.library.{key}"
        for width in getattr(library, key):
            if key not in heads:
                check_width(parent, key, width, name)
                continue
            heads[key].check_free(f"{name} has {width}")
            if heads[key].groups % width:
                fits = [n for n in range(1, heads[key].groups + 1) if heads[key].groups % n == 0]
                raise UserError(
                    f"{name} has {width}, which does not divide the {heads[key].groups} of {parent.name}",
                    hint=f"give some of {', '.join(map(str, fits))}",
                )
    there = [kind.name for kind in parent.kinds]
    for key in (LINEAR, NO_OP):
        for kind in getattr(library, key):
            check_one_of(f"puzzle.library.{key}", kind, there, f"{origin}: ")
    if all(len(variants) == 1 for variants in variants_of(parent, library)):
        raise UserError(
            f"{origin}: puzzle.library has no variant of any layer of {parent.name}",
            hint=f"give values of {', '.join((*WIDTHS, LINEAR, NO_OP))}",
        )
