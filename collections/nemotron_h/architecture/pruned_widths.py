"""Widths that pruning can make smaller, as the blocks of a model state them. Imports no torch."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError


def check_width(definition: ModelDefinition, key: str, width: int, name: str) -> None:
    """Refuse a width that no child of a model can have.

    Args:
        key: of the model.
        width: of the child.
        name: how the error names it, such as `minipuzzle.grid.num_experts`.
    Errors:
        UserError: no layer can lose it; the parent has less; groups, or what a token passes, forbid it.
    """
    axes = {axis for block in definition.blocks for axis in block.axes()}
    known = ["hidden_size", *sorted({axis.key for axis in axes})]
    if key not in known:
        raise UserError(
            f"{name} has {width}: {definition.name} has no layers that can be pruned by {key}",
            hint=f"it can be made smaller by {', '.join(known)}",
        )
    most = getattr(definition, key)
    if not 1 <= width <= most:
        raise UserError(
            f"{name} has {width}; {definition.name} has {most}", hint=f"it can only shrink: give 1 to {most}"
        )
    for part in {part for kind in definition.kinds for part, whole in kind.at_most if whole == key}:
        if width < (least := getattr(definition, part)):
            raise UserError(
                f"{name} has {width}, less than the {part} of {definition.name}, {least}",
                hint=f"give {least} or more: pruning leaves {part} as it is",
            )
    for axis in axes:
        if axis.key == key and width % axis.groups:
            raise UserError(
                f"{name} has {width}, which is no multiple of the {axis.groups} groups of {definition.name}",
                hint=f"every group has to keep as many {axis.name} as the others",
            )
