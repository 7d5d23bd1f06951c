"""Freeze parts of a Megatron model: they get no gradient, no optimizer state, and stay as they were loaded."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from nemotron_h.architecture.frozen import EMBEDDING, OUTPUT, frozen_parts
from nemotron_h.architecture.vision import PROJECTOR, VISION


def freeze(model: nn.Module, frozen: Collection[str]) -> None:
    """Freeze this rank's part of a model.

    Args:
        model: a `NemotronHMegatronModel`.
        frozen: checked by `check_frozen`.
    """
    definition = model.config.definition()
    blocks, frozen = definition.blocks, frozen_parts(frozen, definition)
    for layer in model.decoder.layers:
        if blocks[layer.layer_number - 1].name in frozen:
            layer.requires_grad_(False)
    if model.pre_process and EMBEDDING in frozen:
        model.embedding.requires_grad_(False)
    if model.post_process and OUTPUT in frozen:
        model.decoder.final_norm.requires_grad_(False)
        model.output_weight.requires_grad_(False)
    for part in (VISION, PROJECTOR):
        if part in frozen and model.pre_process:
            getattr(model, part).requires_grad_(False)
