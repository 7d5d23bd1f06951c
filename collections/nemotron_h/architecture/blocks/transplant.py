"""The Mamba-2 layer that begins from an attention layer's weights (Mamba in the Llama, arXiv 2408.15237): its widths,
and what of the attention has no place in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron_h.architecture.blocks.attention import Attention
from nemotron_h.architecture.blocks.block import AttentionHeads, Block
from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.core.errors import UserError

#: kind that a transplanted layer is
MIXER = Mamba
#: taps of its convolution where the parent has none (2408.15237: `d_conv` of its code)
CONV_KERNEL = 4


@dataclass(frozen=True)
class Transplant:
    """An attention layer as a mixer, a head for each query head.

    Attributes:
        attention: the layer.
        groups: of the mixer; the query heads of a group follow each other and share B and C.
    """

    attention: Attention
    groups: int

    @property
    def heads(self) -> AttentionHeads:
        """Return the attention's heads."""
        return self.attention.attention_heads()

    def widths(self, conv_kernel: int) -> dict[str, int]:
        """Return the mixer's widths, by their keys in the model: channels and states of a head are the attention's."""
        dim = self.attention.head_dim
        return dict(
            zip(MIXER.widths, (self.attention.num_attention_heads, dim, self.groups, dim, conv_kernel), strict=True)
        )

    def dropped(self) -> list[str]:
        """Return the model's keys of what the attention has and the mixer has not."""
        positions = ["position_embedding"] if self.attention.rotary_dim else []
        return [*positions, *self.heads.fixed]


def attention_layers(blocks: Sequence[Block]) -> list[int]:
    """Return the layers that can be transplanted: those that are attention and nothing else."""
    return [layer for layer, block in enumerate(blocks) if isinstance(block, Attention)]


def transplants(blocks: Sequence[Block], layers: Sequence[int], groups: int | None, key: str) -> dict[int, Transplant]:
    """Return layer -> its transplant.

    Args:
        layers: of `attention_layers`.
        groups: of every mixer; None is one for each query head.
        key: of `groups`, begins an error.
    Errors:
        UserError: `groups` does not divide the query heads of a layer.
    """
    heads: Mapping[int, int] = {layer: blocks[layer].num_attention_heads for layer in layers}
    for layer, count in heads.items():
        if groups and count % groups:
            fits = [n for n in range(1, count + 1) if not any(each % n for each in heads.values())]
            raise UserError(
                f"{key} = {groups} does not divide the {count} query heads of layer {layer}",
                hint=f"what divides those of all layers: {', '.join(map(str, fits))}",
            )
    return {layer: Transplant(blocks[layer], groups or count) for layer, count in heads.items()}
