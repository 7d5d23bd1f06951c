"""Feed-forward layer of an image encoder at run time.

Axes: n tiles, l positions of a tile, c channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.vision_ffn import VisionFFN
from nemotron_h.model.blocks.running import Masks, Parts, Rotary, Running, Surroundings, Watch
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class RunningVisionFFN(Running):
    """A GELU FFN; `layer_scale` and the residual stream are the encoder's."""

    kind = VisionFFN
    Weights = dict
    block: VisionFFN

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return our layer."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nemotron_h.model.vision_layers import VisionFFNLayer

        return ModuleSpec(
            module=VisionFFNLayer, submodules=parts, params={"block": self.block, "epsilon": self.epsilon}
        )

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, n, c]."""
        return layer(hidden)

    def whole(
        self, ops: Ops, w: dict[str, Tensor], h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output [n, l, c] of the same normalised, before LayerScale."""
        inner = F.gelu(F.linear(h, w["linear_fc1.weight"], w["linear_fc1.bias"]))
        return F.linear(inner, w["linear_fc2.weight"], w["linear_fc2.bias"])
