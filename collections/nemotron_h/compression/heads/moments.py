"""Cross moments of the key-value heads of each attention layer over text: all that aligning them asks of it.

Axes: g key-value heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotron_h.compression.forward import Forward
from nemotron_h.compression.importance import check_tokens
from nemotron_h.compression.measure import LAYER_ELEMENTS, widest
from nemotron_h.inference.model import GenerationModel

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Moments:
    """X_i^T X_j of each two heads of a layer, summed over tokens; float64 [g, g, d, d].

    Attributes:
        keys: X_i are its keys [tokens, d] before positions rotate them.
        values: its values.
    """

    keys: Tensor
    values: Tensor


@torch.inference_mode()
def measure_moments(
    model: GenerationModel, windows: np.ndarray, advance: Advance = lambda _: None, device: str | None = None
) -> dict[int, Moments]:
    """Return layer -> its moments, for all layers that have attention, in one forward pass up to the last of them.

    Args:
        windows: token ids, int64 [samples, length].
        advance: told of windows that are done.
        device: see `Forward`.
    Errors:
        UserError: token ids that the model lacks.
    """
    check_tokens(windows, model.definition)
    forward, definition = Forward(model, device=device), model.definition
    all_heads = {n: heads for n, block in enumerate(definition.blocks) if (heads := block.attention_heads())}
    sums = {
        n: torch.zeros(2, *[heads.groups * heads.dim] * 2, dtype=torch.float64, device=forward.device)
        for n, heads in all_heads.items()
    }
    rows = max(1, LAYER_ELEMENTS // (windows.shape[1] * widest(forward)))
    for start in range(0, len(windows), rows):
        x = forward.embed(torch.from_numpy(windows[start : start + rows]))
        for number in range(max(all_heads) + 1):
            weights = forward.weights(number)
            if number in sums:
                h = forward.norm(x, weights.norm)
                for total, part in zip(sums[number], model.running[number].keys_and_values(weights, h), strict=True):
                    wide = part.flatten(2).flatten(0, 1).double()  # [tokens, g d]
                    total.addmm_(wide.T, wide)
            if number < max(all_heads):
                x = x + forward.layer(number, weights, x)
        advance(len(x))
    return {n: Moments(*(_by_heads(total, all_heads[n].groups) for total in both)) for n, both in sums.items()}


def _by_heads(total: Tensor, groups: int) -> Tensor:
    """Return [g, g, d, d] of [g d, g d], on the CPU."""
    return total.cpu().unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
