"""Rotary positions of a definition: their keys, and the rules between them. Imports no torch.

A scaled model (Llama 3.1's `rope_type: llama3`) was trained on `rope_original_length` tokens and turns slow channels
`rope_scaling_factor` times slower: those whose wave is longer than `rope_original_length / rope_low_freq_factor`. Waves
shorter than `rope_original_length / rope_high_freq_factor` stay, and those between are blended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemotron_h.architecture.blocks.families import WITHOUT_POSITIONS
from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.architecture.definition import ModelDefinition

POSITION_EMBEDDINGS = ("none", "rope")
#: all four or none
SCALING_KEYS = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
#: what has a meaning with `rope` only
ROPE_KEYS = ("rope_base", "rope_percent", *SCALING_KEYS)


def check_positions(definition: ModelDefinition, origin: str) -> None:
    """Check the positions of a model whose family and widths are checked.

    Args:
        origin: the file or recipe to name in an error.
    Errors:
        UserError: names the key, the origin, and the value that would fit.
    """
    d = definition
    if d.position_embedding == "none":
        for key in ROPE_KEYS:
            if getattr(d, key):
                raise UserError(
                    f"{origin}: model.{key} = {getattr(d, key)} has no use: model.position_embedding is none",
                    hint=f"leave model.{key} out, or set model.position_embedding to rope",
                )
        return
    if d.family in WITHOUT_POSITIONS:
        raise UserError(
            f"{origin}: model.position_embedding = {d.position_embedding}; the family has none (paper 2.1)",
            hint="nearest: none",
        )
    if not any(kind.attends for kind in d.kinds):
        raise UserError(
            f"{origin}: model.position_embedding = {d.position_embedding}, "
            "but the pattern has no attention layer to apply it in",
            hint="nearest: none",
        )
    if d.rope_base <= 0:
        raise UserError(f"{origin}: model.rope_base is 0; it has to be positive", hint="give model.rope_base")
    width = d.rotary_dim
    if not 0 < d.rope_percent <= 1 or width < 2 or width % 2:
        fits = [n / d.head_dim for n in range(2, d.head_dim + 1, 2)]
        closest = min(fits, key=lambda part: abs(part - d.rope_percent), default=None)
        raise UserError(
            f"{origin}: model.rope_percent = {d.rope_percent} rotates {width} of {d.head_dim} channels; "
            "it has to be in (0, 1], and to rotate an even number of them",
            hint=f"nearest: {closest}",
        )
    _check_scaling(d, origin)
    for index, widths in d.overrides.items():
        if "head_dim" in widths:
            raise UserError(
                f"{origin}: model.overrides.{index}.head_dim: rotary angles are computed once for all layers",
                hint="leave it out, or set model.position_embedding to none",
            )


def _check_scaling(d: ModelDefinition, origin: str) -> None:
    stated = {key: getattr(d, key) for key in SCALING_KEYS}
    if missing := [key for key, value in stated.items() if not value]:
        if len(missing) < len(stated):
            raise UserError(
                f"{origin}: model.{' and model.'.join(missing)} is missing beside the other keys of scaled positions",
                hint=f"state {', '.join(SCALING_KEYS)}, or none of them",
            )
        return
    if d.rope_scaling_factor < 1 or d.rope_low_freq_factor >= d.rope_high_freq_factor:
        raise UserError(
            f"{origin}: model.rope_scaling_factor = {d.rope_scaling_factor}, model.rope_low_freq_factor = "
            f"{d.rope_low_freq_factor}, model.rope_high_freq_factor = {d.rope_high_freq_factor}: the first has to be 1 "
            "or more, the second below the third",
            hint="Llama 3.1 has 8, 1 and 4",
        )
