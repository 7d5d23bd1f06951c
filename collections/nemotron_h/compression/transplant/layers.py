"""Choose attention layers of a parent to become Mamba-2 layers, and define the child. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron_h.architecture.blocks.transplant import CONV_KERNEL, MIXER, Transplant
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.hybrid import candidates
from nemotron_h.compression.child import definition_of_layers
from nemotron_h.core.errors import UserError


def listed(parent: ModelDefinition, text: str, origin: str) -> list[int]:
    """Return the layers that a list names, such as `0,2,4`, ascending.

    Errors:
        UserError: no list of numbers, or one is no attention layer.
    """
    attention = candidates(parent, origin)
    there = f"attention layers of {parent.name}: {', '.join(map(str, attention))}"
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isascii() and part.isdecimal())]:
        raise UserError(f"--layers = {text!r}: {wrong[0]!r} is no number of a layer", hint=there)
    layers = sorted(map(int, parts))
    if len(set(layers)) < len(layers):
        raise UserError(f"--layers = {text!r} names a layer twice", hint="name each once")
    for layer in layers:
        if layer >= parent.num_layers:
            raise UserError(f"--layers = {text!r}: {parent.name} has layers 0 to {parent.num_layers - 1}", hint=there)
        if layer not in attention:
            raise UserError(
                f"--layers = {text!r}: layer {layer} of {parent.name} is {parent.blocks[layer].title}, not attention",
                hint=there,
            )
    return layers


def all_but_every(parent: ModelDefinition, every: int, origin: str) -> list[int]:
    """Return all attention layers but each `every`-th, of which the first is number `every`: with 2 the first, third,
    fifth become Mamba-2, as where 2408.15237 replaces half.

    Errors:
        UserError: there are fewer, or all stay.
    """
    attention = candidates(parent, origin)
    if not 2 <= every <= len(attention):
        raise UserError(
            f"--every = {every}: {parent.name} has {len(attention)} attention layers, of which every one or none would "
            "stay",
            hint=f"give 2 to {len(attention)}, or --layers" if len(attention) > 1 else f"use --layers {attention[0]}",
        )
    return [layer for number, layer in enumerate(attention, 1) if number % every]


def check_count(parent: ModelDefinition, count: int, origin: str) -> list[int]:
    """Return the layers that `count` are to be chosen of.

    Errors:
        UserError: there are fewer, or exactly as many, so that there is no choice.
    """
    attention = candidates(parent, origin)
    if count >= len(attention):
        every = ",".join(map(str, attention))
        raise UserError(
            f"--count = {count}: {parent.name} has {len(attention)} attention layers, so there is no choice",
            hint=f"give fewer, or transplant all: --layers {every}",
        )
    return attention


def child_definition(parent: ModelDefinition, chosen: Mapping[int, Transplant], name: str) -> ModelDefinition:
    """Return the definition of a parent with transplanted layers: an ordinary one.

    The model's widths are those that most layers have; the others state theirs in `overrides`. Positions stay where
    attention does.
    """
    layers = []
    for layer, block in enumerate(parent.blocks):
        if layer in chosen:
            layers.append((MIXER, chosen[layer].widths(parent.conv_kernel or CONV_KERNEL)))
        else:
            layers.append((type(block), {key: getattr(block, key) for key in block.widths}))
    return definition_of_layers(parent, layers, parent.hidden_size, name, "transplanted")
