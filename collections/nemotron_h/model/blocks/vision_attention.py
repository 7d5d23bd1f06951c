"""Attention of an image encoder at run time.

Axes: n tiles, l positions of a tile, c channels, h heads, d channels of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.vision_attention import VisionAttention
from nemotron_h.model.blocks.running import Masks, Parts, Rotary, Running, Surroundings, Watch
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class RunningVisionAttention(Running):
    """Attention in both directions; `layer_scale` and the residual stream are the encoder's."""

    kind = VisionAttention
    Weights = dict
    block: VisionAttention

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return our layer."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nemotron_h.model.vision_layers import VisionAttentionLayer

        return ModuleSpec(
            module=VisionAttentionLayer, submodules=parts, params={"block": self.block, "epsilon": self.epsilon}
        )

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, n, c]."""
        return layer(hidden)

    def whole(
        self, ops: Ops, w: dict[str, Tensor], h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output [n, l, c] of the same normalised, before LayerScale."""
        qkv = F.linear(h, w["linear_qkv.weight"], w.get("linear_qkv.bias"))
        query, key, value = qkv.unflatten(-1, (-1, 3, self.block.head_dim)).unbind(-2)  # [n, l, h, d]
        if self.block.qk_norm:
            query, key = (
                F.rms_norm(each.flatten(2), h.shape[-1:], w[f"{name}_norm.weight"], self.epsilon).view_as(each)
                for name, each in (("q", query), ("k", key))
            )
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
        return F.linear(out.transpose(1, 2).flatten(2), w["linear_proj.weight"], w["linear_proj.bias"])
